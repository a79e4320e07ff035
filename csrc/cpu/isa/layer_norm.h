#pragma once

#include "cpu/isa/product.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// The sum of function(value), which takes vectors and floats.
template <class Element, class Function>
inline float sum_over(const Element* values, int64_t count, Function&& function) {
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
  float rest[kWidth];
  widen(values + i, count - i, rest);
  for (int64_t j = 0; i + j < count; ++j) sum += function(rest[j]);
  return sum;
}

// Layer norm of one row, which may be written where it is. weight, bias: [channels] or null.
template <class From, class Writer>
inline void normalize_row(int64_t channels, float eps, const float* weight, const float* bias,
                          const From* from, Writer to) {
  const float factor = 1.0f / static_cast<float>(channels);
  const float mean = factor * sum_over(from, channels, [](auto value) { return value; });
  const float variance = factor * sum_over(from, channels, [=](auto value) {
                           const auto centred = value - mean;
                           return centred * centred;
                         });
  const float scale = 1.0f / __builtin_sqrtf(variance + eps);
  int64_t i = 0;
  for (; i + kWidth <= channels; i += kWidth) {
    Vec value = (load(from + i) - mean) * scale;
    if (weight) value *= load(weight + i);
    if (bias) value += load(bias + i);
    to.store(i, value);
  }
  float rest[kWidth];
  widen(from + i, channels - i, rest);
  for (int64_t j = 0; i + j < channels; ++j) {
    rest[j] = (rest[j] - mean) * scale;
    if (weight) rest[j] *= weight[i + j];
    if (bias) rest[j] += bias[i + j];
  }
  write_part(to, i, rest, channels - i);
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
