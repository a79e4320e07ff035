#pragma once

// Activations of vectors, and their derivatives.

#include "cpu/isa/simd.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// e^x, relative error 2e-7; 0 below -87.3, infinity above 88.7, NaN for NaN.
[[gnu::always_inline]] inline Vec exponential(Vec x) {
  constexpr float kLowest = -87.3365f;
  constexpr float kHighest = 88.7228f;
  const Vec clamped = minimum(broadcast(88.3f), maximum(broadcast(kLowest), x));
  // Adding 1.5 * 2^23 rounds to an integer.
  const Vec n = fma(clamped, broadcast(1.44269504f), broadcast(12582912.0f)) - 12582912.0f;
  // ln 2 in two parts, so that n * ln 2 is exact to the end of clamped.
  const Vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  // Cephes' expf: e^r = 1 + r + r^2 p(r) on [-ln2/2, ln2/2].
  Vec p = fma(broadcast(1.9875691500e-4f), r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  const IntVec exponent = __builtin_convertvector(n, IntVec);
  const Vec result = (Vec)((IntVec)p + (exponent << 23));
  const Vec bounded = x > kHighest ? broadcast(__builtin_inff()) : result;
  return x < kLowest ? Vec{} : (x != x ? x : bounded);
}

[[gnu::always_inline]] inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

// GELU(x) = relu(x) - t Phi(-t) with t = |x|. Phi(-t) falls like a Gaussian; its 16th root is
// nearly a straight line, so a polynomial of low degree raised to the 16th power follows it without
// a division or an exponential. Beyond kGeluRange the product is below 1e-7 and is held constant.
constexpr float kGeluRange = 5.6f;
// The minimax fit of degree 7 to Phi(-t)^(1/16), weighted by its effect on the product, with no
// more than 2e-6 of error relative to Phi(-t) up to t = 3: otherwise GELU of small values would be
// wrong by much more than they are rounded, by 2e-5 of themselves with degree 6.
constexpr float kGeluRoot[8] = {0.957603276f,     -0.0477544479f,  -0.0178525094f,
                                -0.00126736599f,  0.000593481236f, -6.05484865e-06f,
                                -7.74350065e-06f, 5.80434119e-07f};

// max(x, 0), but NaN for -infinity, which GELU in PyTorch multiplies by Phi(x) = 0.
[[gnu::always_inline]] inline Vec gelu_relu(Vec x) { return minimum(absolute(x), x + absolute(x)); }

// NaN stays NaN.
[[gnu::always_inline]] inline Vec relu(Vec x) { return maximum(Vec{}, x); }

// positive(x) - t q(t)^(2^squarings) with t = min(|x|, range), count vectors at once to hide
// latencies.
template <int squarings, int degree, int count, class Positive>
[[gnu::always_inline]] inline void gelu_by_root(const float (&root)[degree + 1], float range,
                                                Vec (&x)[count], Positive&& positive) {
  Vec t[count];
  Vec q[count];
  unroll<count>([&](auto i) __attribute__((always_inline)) {
    t[i] = minimum(broadcast(range), absolute(x[i]));
    q[i] = broadcast(root[degree]);
  });
  unroll<degree>([&](auto k) __attribute__((always_inline)) {
    unroll<count>([&](auto i) __attribute__((always_inline)) {
      q[i] = fma(q[i], t[i], broadcast(root[degree - 1 - k]));
    });
  });
  unroll<squarings>([&](auto) __attribute__((always_inline)) {
    unroll<count>([&](auto i) __attribute__((always_inline)) { q[i] = q[i] * q[i]; });
  });
  unroll<count>([&](auto i)
                    __attribute__((always_inline)) { x[i] = positive(x[i]) - t[i] * q[i]; });
}

// x * Phi(x). Absolute error 2.9e-7 (PyTorch's own: 3.8e-7 to 1.2e-6), and 1.6e-6 of the result
// where |x| <= 1.
template <int count>
[[gnu::always_inline]] inline void gelu(Vec (&x)[count]) {
  gelu_by_root<4, 7, count>(kGeluRoot, kGeluRange, x, gelu_relu);
}

// The same of results that are rounded to 16 or 8 bits: with an error below 2^-11 of the result,
// an eighth of what bfloat16 rounds by, plus 2^-15. The fit of degree 4 to Phi(-t)^(1/8). The
// smallest result, and not NaN, is that of -infinity.
template <int count>
[[gnu::always_inline]] inline void rounded_gelu(Vec (&x)[count]) {
  constexpr float kRoot[5] = {0.916699572f, -0.0890805349f, -0.0368491522f, 0.00318264685f,
                              0.000417200844f};
  gelu_by_root<3, 4, count>(kRoot, 5.0f, x, relu);
}

struct ValueAndSlope {
  Vec value;
  Vec slope;
};

// GELU as above, and its derivative, whose absolute error is 7.8e-7. With h(t) = t q^16,
// h' = q^15 (q + 16 t q'), and the coefficients of q + 16 t q' are (1 + 16 k) q_k.
[[gnu::always_inline]] inline ValueAndSlope gelu_and_slope(Vec x) {
  const Vec t = minimum(broadcast(kGeluRange), absolute(x));
  Vec q = broadcast(kGeluRoot[7]);
  Vec r = broadcast(kGeluRoot[7] * 113.0f);
  unroll<7>([&](auto k) __attribute__((always_inline)) {
    q = fma(q, t, broadcast(kGeluRoot[6 - k]));
    r = fma(r, t, broadcast(kGeluRoot[6 - k] * (1.0f + 16.0f * (6 - k))));
  });
  const Vec q2 = q * q;
  const Vec q4 = q2 * q2;
  const Vec q8 = q4 * q4;
  const Vec q15 = q8 * q4 * (q2 * q);
  const Vec slope = r * q15;
  return {gelu_relu(x) - t * (q15 * q), x > 0.0f ? 1.0f - slope : slope};
}

[[gnu::always_inline]] inline ValueAndSlope silu_and_slope(Vec x) {
  const Vec gate = sigmoid(x);
  const Vec value = x * gate;
  return {value, gate + value * (1.0f - gate)};
}

// x sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3), which is 0.5 x (1 + tanh u).
[[gnu::always_inline]] inline ValueAndSlope gelu_tanh_and_slope(Vec x) {
  constexpr float kScale = 2.0f * 0.7978845608f;
  constexpr float kCubic = 0.044715f;
  const Vec square = x * x;
  const Vec gate = sigmoid(kScale * x * (1.0f + kCubic * square));
  const Vec slope = kScale * (1.0f + 3.0f * kCubic * square);
  return {x * gate, gate + x * gate * (1.0f - gate) * slope};
}

// count vectors through an activation, in place. Element: what the results are rounded to.
template <Activation kind, int count, class Element = float>
[[gnu::always_inline]] inline void activate(Vec (&x)[count]) {
  if constexpr (kind == Activation::gelu) {
    if constexpr (sizeof(Element) < sizeof(float)) {
      rounded_gelu<count>(x);
    } else {
      gelu<count>(x);
    }
  } else if constexpr (kind != Activation::identity) {
    unroll<count>([&](auto i) __attribute__((always_inline)) {
      if constexpr (kind == Activation::gelu_tanh) x[i] = gelu_tanh_and_slope(x[i]).value;
      if constexpr (kind == Activation::silu) x[i] = x[i] * sigmoid(x[i]);
      if constexpr (kind == Activation::relu) x[i] = relu(x[i]);
    });
  }
}

template <Activation kind>
[[gnu::always_inline]] inline ValueAndSlope activate_and_slope(Vec x) {
  if constexpr (kind == Activation::gelu) return gelu_and_slope(x);
  if constexpr (kind == Activation::gelu_tanh) return gelu_tanh_and_slope(x);
  if constexpr (kind == Activation::silu) return silu_and_slope(x);
  if constexpr (kind == Activation::relu) {
    return {relu(x), x > 0.0f ? broadcast(1.0f) : (x != x ? x : Vec{})};
  }
  return {x, broadcast(1.0f)};
}

// Calls function(Constant<kind>) for a kind known at run time.
template <class Function>
[[gnu::always_inline]] inline void with_activation(Activation kind, Function&& function) {
  switch (kind) {
    case Activation::identity:
      return function(Constant<Activation::identity>{});
    case Activation::gelu:
      return function(Constant<Activation::gelu>{});
    case Activation::gelu_tanh:
      return function(Constant<Activation::gelu_tanh>{});
    case Activation::silu:
      return function(Constant<Activation::silu>{});
    case Activation::relu:
      return function(Constant<Activation::relu>{});
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
