#pragma once

#include "cuda/launchers.h"
#include "cuda/ptx.cuh"

namespace moat_kernels::cuda {

// GELU(x) = relu(x) - t Phi(-t) with t = |x|. The logarithm of Phi(-t) is nearly a parabola, so a
// polynomial of low degree and one exponential, which has a unit of its own, follow it: nine
// instructions, where erff and its branches would cost more than the depthwise convolution itself.
// The fit is that of moat_kernels/ops/triton_support/activations.py; beyond kGeluRange the product
// is below 1e-7 and is held constant.
constexpr float kGeluRange = 5.6f;

// Absolute error 7e-7; NaN stays NaN.
__device__ __forceinline__ float gelu(float x) {
  const float t = min_or_nan(fabsf(x), kGeluRange);
  float q = -0.000473294089f;
  q = fmaf(q, t, 0.00708446186f);
  q = fmaf(q, t, -0.05182717f);
  q = fmaf(q, t, -0.459992647f);
  q = fmaf(q, t, -1.15078783f);
  q = fmaf(q, t, -1.00003767f);
  return fmaf(-t, exp2_approximately(q), fmaxf(x, 0.0f));
}

struct ValueAndSlope {
  float value;
  float slope;
};

// Absolute errors 4e-7 and 5e-7; NaN stays NaN. Phi(-t) = phi(t) times Mills' ratio, which is a
// polynomial in 1 / (t + 3.85) to 3e-7 of what counts; the slope needs phi(t) anyway. 17
// instructions, and none of them a branch.
__device__ __forceinline__ ValueAndSlope gelu_and_slope(float x) {
  const float t = min_or_nan(fabsf(x), 6.0f);
  // exp(-t^2 / 2) / sqrt(2 pi)
  const float density = exp2_approximately(fmaf(t * -0.721347520f, t, -1.32574806f));
  const float r = reciprocal_approximately(t + 3.85f);
  float mills = 344.093367f;
  mills = fmaf(mills, r, -110.290559f);
  mills = fmaf(mills, r, 27.3133520f);
  mills = fmaf(mills, r, -1.16240675f);
  mills = fmaf(mills, r, 0.0790556355f);
  const float tail = mills * density;
  const float slope = fmaf(-t, density, tail);
  return {fmaf(-t, tail, fmaxf(x, 0.0f)), x > 0.0f ? 1.0f - slope : slope};
}

__device__ __forceinline__ float activate(Activation kind, float x) {
  return kind == Activation::gelu ? gelu(x) : x;
}

template <Activation kind>
__device__ __forceinline__ float activate(float x) {
  return activate(kind, x);
}

template <Activation kind>
__device__ __forceinline__ ValueAndSlope activate_and_slope(float x) {
  if constexpr (kind == Activation::gelu) return gelu_and_slope(x);
  return {x, 1.0f};
}

}  // namespace moat_kernels::cuda
