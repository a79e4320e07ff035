#pragma once

#include "cpu/isa/simd.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// Mean and squared deviations of `vectors` vectors of channels, around a shift that is one of the
// values, so that a large mean costs no precision.
template <int vectors>
struct Moments {
  static constexpr int64_t kFloats = vectors * kWidth;
  Vec shift[vectors];
  double sums[kFloats] = {};
  double squares[kFloats] = {};

  template <class Element>
  void start(const Element* values) {
    unroll<vectors>([&](auto i)
                        __attribute__((always_inline)) { shift[i] = load(values + i * kWidth); });
  }

  template <class Element>
  void add(const Element* values, int64_t pixels, int64_t pitch) {
    constexpr int64_t kFlush = 256;  // additions in float before double takes over
    for (int64_t first = 0; first < pixels; first += kFlush) {
      Vec sum[vectors] = {};
      Vec square[vectors] = {};
      for (int64_t pixel = first; pixel < smaller(first + kFlush, pixels); ++pixel) {
        unroll<vectors>([&](auto i) __attribute__((always_inline)) {
          const Vec shifted = load(values + pixel * pitch + i * kWidth) - shift[i];
          sum[i] += shifted;
          square[i] = fma(shifted, shifted, square[i]);
        });
      }
      for (int64_t i = 0; i < kFloats; ++i) {
        sums[i] += static_cast<double>(sum[i / kWidth][i % kWidth]);
        squares[i] += static_cast<double>(square[i / kWidth][i % kWidth]);
      }
    }
  }

  void finish(int64_t pixels, double* mean, double* deviations) const {
    for (int64_t i = 0; i < kFloats; ++i) {
      const double offset = sums[i] / static_cast<double>(pixels);
      mean[i] = static_cast<double>(shift[i / kWidth][i % kWidth]) + offset;
      deviations[i] = squares[i] - offset * sums[i];
    }
  }
};

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
