#pragma once

// Tensors of E channels as training keeps them: [images][blocks of kWideChannels
// channels][pixels][kWideChannels], in float or a 16-bit type. Each block of an image is
// contiguous, which is how every pass reads it. Lanes beyond E in the last block hold anything and
// reach no result; vectors of coefficients are padded to whole blocks.

#include "cpu/common/mbconv_train_kernels.h"
#include "cpu/isa/activation.h"
#include "cpu/isa/gemm.h"
#include "cpu/isa/lanes.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

constexpr int64_t kWideBlock = kWideChannels;
constexpr int64_t kStripPixels = kTrainStripPixels;
// Floats from one pixel to the next in tiles; see mbconv_strip.h.
constexpr int64_t kTilePitch = kWideBlock + 16;

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
