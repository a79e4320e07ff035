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

// Passes of a kind read and write its elements. Those of bfloat16 products have all wide tensors in
// bfloat16; those of float take any type, which they convert in a buffer.
template <class Kind>
[[gnu::always_inline]] inline typename Kind::Element* elements_of(const Wide& wide) {
  return static_cast<typename Kind::Element*>(wide.data);
}

// `pixels` pixels from an offset on: where they lie, or converted into `buffer`.
template <class Kind>
inline const typename Kind::Element* read_pixels(const Wide& wide, int64_t offset, int64_t pixels,
                                                 float* buffer) {
  if constexpr (Kind::kElementType == ElementType::float32) {
    if (wide.type != ElementType::float32) {
      const void* data = wide.data;
      with_elements(wide.type, data, [&](auto* elements) __attribute__((always_inline)) {
        widen(elements + offset, pixels * kWideBlock, buffer);
      });
      return buffer;
    }
  }
  return elements_of<Kind>(wide) + offset;
}

// Where to write pixels: their place, or `buffer`, from which write_pixels converts them.
template <class Kind>
inline typename Kind::Element* place_of_pixels(const Wide& wide, int64_t offset, float* buffer) {
  if constexpr (Kind::kElementType == ElementType::float32) {
    if (wide.type != ElementType::float32) return buffer;
  }
  return elements_of<Kind>(wide) + offset;
}

template <class Kind>
inline void write_pixels([[maybe_unused]] const Wide& wide, [[maybe_unused]] int64_t offset,
                         [[maybe_unused]] int64_t pixels,
                         [[maybe_unused]] const typename Kind::Element* buffer) {
  if constexpr (Kind::kElementType == ElementType::float32) {
    if (wide.type == ElementType::float32) return;
    with_elements(wide.type, wide.data, [&](auto* elements) __attribute__((always_inline)) {
      narrow(buffer, pixels * kWideBlock, elements + offset);
    });
  }
}

// to[pixel][pitch] = act(scale * wide + shift) * factor for `pixels` pixels of one block; factor
// may be null. Element: what the results are rounded to, here or later.
template <Activation kind, class Element, class Writer>
inline void activate_pixels(const Element* wide, int64_t pixels, const float* scale,
                            const float* shift, const float* factor, Writer to, int64_t pitch) {
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
        activate<kind, kLanes, Element>(value.v);
        if (factor) {
          unroll<kLanes>([&](auto i) __attribute__((always_inline)) { value.v[i] *= f.v[i]; });
        }
        unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
          to.store(pixel * pitch + lane + i * kWidth, value.v[i]);
        });
      }
    }
  });
}

// Calls store(pixel, lane, values) with a * first + b * second + c of `pixels` pixels of one block.
template <class Element, class Store>
[[gnu::always_inline]] inline void combine_pixels(const Element* first, const Element* second,
                                                  int64_t pixels, const float* a, const float* b,
                                                  const float* c, Store&& store) {
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
        store(pixel, lane, value);
      }
    }
  });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
