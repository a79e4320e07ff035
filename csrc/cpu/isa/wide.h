#pragma once

// Tensors of E channels as training keeps them: [images][blocks of kWideChannels
// channels][pixels][kWideChannels], in float or a 16-bit type. Each block of an image is
// contiguous, which is how every pass reads it. Lanes beyond E in the last block hold anything and
// reach no result; vectors of coefficients are padded to whole blocks.

#include "cpu/common/mbconv_train_kernels.h"
#include "cpu/isa/activation.h"
#include "cpu/isa/gemm.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

constexpr int64_t kWideBlock = kWideChannels;
constexpr int64_t kStripPixels = kTrainStripPixels;
// Floats from one pixel to the next in tiles; see mbconv_strip.h.
constexpr int64_t kTilePitch = kWideBlock + 16;
// Vectors handled together, so that whole cache lines are read and latencies overlap.
constexpr int kLanes = 4;
constexpr int64_t kLaneFloats = kLanes * kWidth;

inline int64_t valid_channels(int64_t channels, int64_t block) {
  return smaller(kWideBlock, channels - block * kWideBlock);
}

// Elements before a block of an image of `pixels`.
inline int64_t plane_offset(const Wide& wide, int64_t pixels, int64_t image, int64_t block) {
  return (image * wide.blocks + block - wide.first) * pixels * kWideBlock;
}

inline float* floats_of(const Wide& wide) { return static_cast<float*>(wide.data); }

// `pixels` pixels from an offset on as floats: where they lie, or converted into `buffer`.
inline const float* read_pixels(const Wide& wide, int64_t offset, int64_t pixels, float* buffer) {
  if (wide.type == ElementType::float32) return floats_of(wide) + offset;
  const void* data = wide.data;
  with_elements(wide.type, data, [&](auto* elements) __attribute__((always_inline)) {
    widen(elements + offset, pixels * kWideBlock, buffer);
  });
  return buffer;
}

// Where to write pixels as floats: their place, or `buffer`, from which write_pixels converts them.
inline float* place_of_pixels(const Wide& wide, int64_t offset, float* buffer) {
  return wide.type == ElementType::float32 ? floats_of(wide) + offset : buffer;
}

inline void write_pixels(const Wide& wide, int64_t offset, int64_t pixels, const float* buffer) {
  if (wide.type == ElementType::float32) return;
  with_elements(wide.type, wide.data, [&](auto* elements) __attribute__((always_inline)) {
    narrow(buffer, pixels * kWideBlock, elements + offset);
  });
}

// Four vectors of one pixel.
struct Lanes {
  Vec v[kLanes];
};

[[gnu::always_inline]] inline Lanes load_lanes(const float* source) {
  Lanes lanes;
  unroll<kLanes>([&](auto i)
                     __attribute__((always_inline)) { lanes.v[i] = load(source + i * kWidth); });
  return lanes;
}

[[gnu::always_inline]] inline void store_lanes(float* destination, const Lanes& lanes) {
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

// tile[pixel][kTilePitch] = act(scale * wide + shift) * factor for `pixels` pixels of one block;
// factor may be null.
template <Activation kind>
inline void activate_pixels(const float* wide, int64_t pixels, const float* scale,
                            const float* shift, const float* factor, float* tile) {
  for_pixel_runs(pixels, [&](int64_t first, int64_t last) __attribute__((always_inline)) {
    for (int64_t lane = 0; lane < kWideBlock; lane += kLaneFloats) {
      const Lanes a = load_lanes(scale + lane);
      const Lanes b = load_lanes(shift + lane);
      const Lanes f = factor ? load_lanes(factor + lane) : a;
      for (int64_t pixel = first; pixel < last; ++pixel) {
        Lanes value = load_lanes(wide + pixel * kWideBlock + lane);
        unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
          value.v[i] = fma(value.v[i], a.v[i], b.v[i]);
        });
        activate<kind, kLanes>(value.v);
        if (factor) {
          unroll<kLanes>([&](auto i) __attribute__((always_inline)) { value.v[i] *= f.v[i]; });
        }
        store_lanes(tile + pixel * kTilePitch + lane, value);
      }
    }
  });
}

// tile[pixel] = a * first + b * second + c, for `pixels` pixels of one block; pitch: floats from
// one pixel of the tile to the next. `copy`, which may be `first`, takes the same densely.
inline void combine_pixels(const float* first, const float* second, int64_t pixels, const float* a,
                           const float* b, const float* c, float* tile, int64_t pitch,
                           float* copy = nullptr) {
  for_pixel_runs(pixels, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t lane = 0; lane < kWideBlock; lane += kLaneFloats) {
      const Lanes wa = load_lanes(a + lane);
      const Lanes wb = load_lanes(b + lane);
      const Lanes wc = load_lanes(c + lane);
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const int64_t at = pixel * kWideBlock + lane;
        Lanes value;
        unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
          const Vec base = fma(load(second + at + i * kWidth), wb.v[i], wc.v[i]);
          value.v[i] = fma(load(first + at + i * kWidth), wa.v[i], base);
        });
        store_lanes(tile + pixel * pitch + lane, value);
        if (copy) store_lanes(copy + at, value);
      }
    }
  });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
