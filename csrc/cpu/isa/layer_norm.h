#pragma once

#include "cpu/isa/simd.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// The sum of function(value), which takes vectors and floats.
template <class Function>
inline float sum_over(const float* values, int64_t count, Function&& function) {
  constexpr int kSums = 4;  // hide the latency of the additions
  Vec sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= count; i += kSums * kWidth) {
    unroll<kSums>([&](auto j) __attribute__((always_inline)) {
      sums[j] += function(load(values + i + j * kWidth));
    });
  }
  for (; i + kWidth <= count; i += kWidth) sums[0] += function(load(values + i));
  float sum = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) sum += function(values[i]);
  return sum;
}

// Layer norm of one row, in place. weight, bias: [channels] or null.
inline void normalize_row(int64_t channels, float eps, const float* weight, const float* bias,
                          float* row) {
  const float factor = 1.0f / static_cast<float>(channels);
  const float mean = factor * sum_over(row, channels, [](auto value) { return value; });
  const float variance = factor * sum_over(row, channels, [=](auto value) {
                           const auto centred = value - mean;
                           return centred * centred;
                         });
  const float scale = 1.0f / __builtin_sqrtf(variance + eps);
  int64_t i = 0;
  for (; i + kWidth <= channels; i += kWidth) {
    Vec value = (load(row + i) - mean) * scale;
    if (weight) value *= load(weight + i);
    if (bias) value += load(bias + i);
    store(row + i, value);
  }
  for (; i < channels; ++i) {
    row[i] = (row[i] - mean) * scale;
    if (weight) row[i] *= weight[i];
    if (bias) row[i] += bias[i];
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
