#pragma once

// Channels of a pixel in groups of some vectors.

#include "cpu/isa/simd.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// Vectors handled together, so that whole cache lines are read and latencies overlap.
constexpr int kLanes = 4;
constexpr int64_t kLaneFloats = kLanes * kWidth;

// Four vectors of one pixel.
struct Lanes {
  Vec v[kLanes];
};

template <class Element>
[[gnu::always_inline]] inline Lanes load_lanes(const Element* source) {
  Lanes lanes;
  unroll<kLanes>([&](auto i)
                     __attribute__((always_inline)) { lanes.v[i] = load(source + i * kWidth); });
  return lanes;
}

template <class Element>
[[gnu::always_inline]] inline void store_lanes(Element* destination, const Lanes& lanes) {
  unroll<kLanes>(
      [&](auto i) __attribute__((always_inline)) { store(destination + i * kWidth, lanes.v[i]); });
}

// totals[0 .. kLaneFloats) += sums, in double.
inline void flush(const Lanes& sums, double* totals) {
  float values[kLaneFloats];
  store_lanes(values, sums);
  for (int64_t i = 0; i < kLaneFloats; ++i) totals[i] += static_cast<double>(values[i]);
}

// Calls function(first, last) over runs of pixels short enough that a run's lines are still in the
// L1 cache for its next channels, and its pages open for the prefetcher.
template <class Function>
[[gnu::always_inline]] inline void for_pixel_runs(int64_t pixels, Function&& function) {
  constexpr int64_t kRunPixels = 16;
  for (int64_t first = 0; first < pixels; first += kRunPixels) {
    function(first, smaller(first + kRunPixels, pixels));
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
