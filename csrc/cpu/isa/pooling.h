#pragma once

// Pools of maps [pixel][channel].

#include "cpu/common/pool.h"
#include "cpu/isa/simd.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// destination[i] = max(destination[i], source[i]); NaN stays NaN.
template <class Element>
inline void take_maximum(const Element* source, int64_t count, float* destination) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const int64_t valid = smaller(kWidth, count - i);
    float from[kWidth];
    widen(source + i, valid, from);
    for (int64_t j = 0; j < valid; ++j) {
      const float value = from[j];
      if (value > destination[i + j] || value != value) destination[i + j] = value;
    }
  }
}

// One pixel of the pooled map, of what values_of(pixel) points to: the `channels` values of a pixel
// of the map, which it may write where it wrote those of another.
template <class Values>
inline void pool_pixel(const Pool& pool, int64_t height, int64_t width, int64_t channels,
                       int64_t row, int64_t column, float* pooled, Values&& values_of) {
  const bool average = pool.kind == PoolKind::average;
  const float start = average ? 0.0f : -__builtin_inff();
  for (int64_t i = 0; i < channels; ++i) pooled[i] = start;
  const int64_t top = row * pool.stride - pool.top;
  const int64_t left = column * pool.stride - pool.left;
  int64_t count = 0;
  for (int64_t y = larger(top, 0); y < smaller(top + pool.size, height); ++y) {
    for (int64_t x = larger(left, 0); x < smaller(left + pool.size, width); ++x) {
      if (average) {
        add(values_of(y * width + x), channels, pooled);
      } else {
        take_maximum(values_of(y * width + x), channels, pooled);
      }
      ++count;
    }
  }
  if (average) {
    const float factor =
        1.0f / static_cast<float>(pool.counts_padding ? pool.size * pool.size : count);
    for (int64_t i = 0; i < channels; ++i) pooled[i] *= factor;
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
