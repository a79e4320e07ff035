#pragma once

#include "cuda/launchers.h"
#include "cuda/ptx.cuh"

namespace moat_kernels::cuda {

// GELU(x) = relu(x) - t Phi(-t) with t = |x|. The 16th root of Phi(-t) is nearly a straight line,
// so a polynomial of low degree raised to the 16th power follows it: a dozen instructions, where
// erff and its branches would cost more than the depthwise convolution itself. The fits are those
// of csrc/cpu/isa/activation.h; beyond kGeluRange the product is below 1e-7 and is held constant.
constexpr float kGeluRange = 5.6f;

// Absolute error 5e-7.
__device__ __forceinline__ float gelu(float x) {
  const float t = fminf(kGeluRange, fabsf(x));
  float q = -1.17588206e-06f;
  q = fmaf(q, t, -3.52191528e-05f);
  q = fmaf(q, t, 0.000658403849f);
  q = fmaf(q, t, -0.00134401256f);
  q = fmaf(q, t, -0.0178059563f);
  q = fmaf(q, t, -0.0477672964f);
  q = fmaf(q, t, 0.957604408f);
  q = q * q;
  q = q * q;
  q = q * q;
  q = q * q;
  return (x < 0.0f ? 0.0f : x) - t * q;  // NaN stays NaN
}

struct ValueAndSlope {
  float value;
  float slope;
};

// Absolute errors 4e-7 and 9e-7. With h(t) = t q^16, h' = q^15 (q + 16 t q').
__device__ __forceinline__ ValueAndSlope gelu_and_slope(float x) {
  const float t = fminf(kGeluRange, fabsf(x));
  float q = 6.17843966e-07f;
  float r = 113.0f * 6.17843966e-07f;
  q = fmaf(q, t, -8.13178212e-06f);
  r = fmaf(r, t, 97.0f * -8.13178212e-06f);
  q = fmaf(q, t, -4.58297382e-06f);
  r = fmaf(r, t, 81.0f * -4.58297382e-06f);
  q = fmaf(q, t, 0.0005910084f);
  r = fmaf(r, t, 65.0f * 0.0005910084f);
  q = fmaf(q, t, -0.00126567588f);
  r = fmaf(r, t, 49.0f * -0.00126567588f);
  q = fmaf(q, t, -0.0178526528f);
  r = fmaf(r, t, 33.0f * -0.0178526528f);
  q = fmaf(q, t, -0.0477546751f);
  r = fmaf(r, t, 17.0f * -0.0477546751f);
  q = fmaf(q, t, 0.957603335f);
  r = fmaf(r, t, 0.957603335f);
  const float q2 = q * q;
  const float q4 = q2 * q2;
  const float q15 = q4 * q4 * q4 * q2 * q;
  const float slope = r * q15;
  const float value = (x < 0.0f ? 0.0f : x) - t * (q15 * q);
  if (x != x) return {x, x};
  return {value, x > 0.0f ? 1.0f - slope : slope};
}

__device__ __forceinline__ float activate(Activation kind, float x) {
  return kind == Activation::gelu ? gelu(x) : x;
}

__device__ __forceinline__ ValueAndSlope activate_and_slope(Activation kind, float x) {
  if (kind == Activation::gelu) return gelu_and_slope(x);
  return {x, 1.0f};
}

}  // namespace moat_kernels::cuda
