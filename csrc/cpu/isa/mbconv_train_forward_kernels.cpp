// The forward passes of the inverted bottleneck's training. Wide tensors (E channels) cross memory
// as often as stands beside each pass; everything between is in tiles of 64 channels that stay in
// cache: in float whatever the type of the wide tensors, but for what a product reads, which is in
// the product's own type (cpu/isa/product.h).
//   expand               z1 = (x - mu) W'^T and its sums              writes z1
//   depthwise            z2 = dw(act(a1 z1 + b1)) and its moments     reads z1, writes z2
//   project              act(a2 z2 + b2) W2^T                         reads z2
// The backward passes are in mbconv_train_backward_kernels.cpp, weights in
// mbconv_train_weight_kernels.cpp.

#include "cpu/common/mbconv_train_kernels.h"
#include "cpu/isa/depthwise.h"
#include "cpu/isa/lane_moments.h"
#include "cpu/isa/stencil_tile.h"
#include "cpu/isa/wide.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

namespace {

// Elements from one pixel to the next in tiles of what a product reads; see mbconv_strip.h.
template <class Kind>
constexpr int64_t kRowPitch = kWideBlock + 16 * Kind::kPerWord;

template <class Kind, class Element>
void make_rows(const Element* x, int64_t pixels, int64_t channels, const float* shift, float scale,
               typename Kind::Element* rows) {
  const int64_t columns = round_up(channels, kPanel);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, rows += columns) {
    const auto centred = [&](Vec value, int64_t i) __attribute__((always_inline)) {
      return (shift ? value - load_part(shift + i, channels - i) : value) * scale;
    };
    int64_t i = 0;
    for (; i + kWidth <= channels; i += kWidth) store(rows + i, centred(load(x + i), i));
    if (i < channels) {
      float rest[kWidth] = {};
      widen(x + i, channels - i, rest);
      store_part(rest, centred(load(rest), i), channels - i);
      store(rows + i, load(rest));
      i += kWidth;
    }
    for (; i < columns; i += kWidth) store(rows + i, Vec{});
  }
}

// sums[0][kWideBlock], sums[stride][kWideBlock] += z, z^2 of `pixels` pixels of a block.
void add_moments(const float* z, int64_t pixels, double* sums, int64_t stride) {
  for (int64_t lane = 0; lane < kWideBlock; lane += kLaneFloats) {
    Lanes sum = {};
    Lanes square = {};
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const Lanes value = load_lanes(z + pixel * kWideBlock + lane);
      unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
        sum.v[i] += value.v[i];
        square.v[i] = fma(value.v[i], value.v[i], square.v[i]);
      });
    }
    flush(sum, sums + lane);
    flush(square, sums + stride + lane);
  }
}

// totals[kWideBlock] += act(scale * z + shift) of `pixels` pixels of a block.
template <Activation kind, class Element>
void add_activated(const Element* z, int64_t pixels, const float* scale, const float* shift,
                   double* totals) {
  for (int64_t lane = 0; lane < kWideBlock; lane += kLaneFloats) {
    const Lanes a = load_lanes(scale + lane);
    const Lanes b = load_lanes(shift + lane);
    Lanes sum = {};
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      Lanes value = load_lanes(z + pixel * kWideBlock + lane);
      unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
        value.v[i] = fma(value.v[i], a.v[i], b.v[i]);
      });
      activate<kind, kLanes, Element>(value.v);
      unroll<kLanes>([&](auto i) __attribute__((always_inline)) { sum.v[i] += value.v[i]; });
    }
    flush(sum, totals + lane);
  }
}

// output = (sums + bias) keep + addend for one pixel; bias and addend may be null.
template <class Element, class Output>
void finish_pixel(const float* sums, int64_t channels, const float* bias, float keep,
                  const Element* addend, Output* output) {
  const auto finished = [&](Vec sum, int64_t i) __attribute__((always_inline)) {
    return (bias ? sum + load_part(bias + i, channels - i) : sum) * keep;
  };
  int64_t i = 0;
  for (; i + kWidth <= channels; i += kWidth) {
    const Vec value = finished(load(sums + i), i);
    store(output + i, addend ? value + load(addend + i) : value);
  }
  if (i < channels) {
    float rest[kWidth] = {};
    if (addend) widen(addend + i, channels - i, rest);
    const Vec value = finished(load(sums + i), i);
    store(rest, addend ? value + load(rest) : value);
    narrow(rest, channels - i, output + i);
  }
}

}  // namespace

void train_rows(Product product, const Map& x, int64_t first, int64_t pixels, int64_t channels,
                const float* shift, float scale, float* rows, double* sums) {
  const int64_t columns = round_up(channels, kPanel);
  const void* data = x.data;
  with_unscaled_product(product, [&](auto kind) __attribute__((always_inline)) {
    auto* elements = elements_of<decltype(kind)>(rows);
    with_elements(x.type, data, [&](auto* from) __attribute__((always_inline)) {
      make_rows<decltype(kind)>(from + first * channels, pixels, channels, shift, scale, elements);
    });
    for (int64_t i = 0; sums && i < channels; i += kWidth) {
      Vec sum = {};
      for (int64_t pixel = 0; pixel < pixels; ++pixel) sum += load(elements + pixel * columns + i);
      for (int64_t j = 0; j < smaller(kWidth, channels - i); ++j) {
        sums[i + j] += static_cast<double>(sum[j]);
      }
    }
  });
}

void train_expand(const TrainShape& shape, const PixelRange& range, const Blocks& blocks,
                  const float* rows, const float* packed, float* scratch, const Wide& z1,
                  double* sums) {
  with_unscaled_product(shape.product, [&](auto kind) __attribute__((always_inline)) {
    using Kind = decltype(kind);
    const int64_t depth = words_of<Kind>(shape.in_channels);
    const int64_t words = words_of<Kind>(round_up(shape.in_channels, kPanel));
    const int64_t count = range.last - range.first;
    const float* a = rows + (range.image * shape.in_pixels() + range.first) * words;
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const int64_t at =
          plane_offset(z1, shape.in_pixels(), range.image, block) + range.first * kWideBlock;
      float* out = place_of_pixels<FloatProduct>(z1, at, scratch);
      gemm<Kind>(count, valid_channels(shape.wide_channels, block), depth, {a, words, 1},
                 packed + block * kWideBlock * depth, depth * kPanel, kPanel, out, kWideBlock,
                 false);
      write_pixels<FloatProduct>(z1, at, count, out);
      if (sums) add_moments(out, count, sums + block * kWideBlock, shape.padded_wide());
    }
  });
}

void train_depthwise(const TrainShape& shape, int64_t image, int64_t block, const Wide& z1,
                     const ScaleShift& norm, const float* weights, float* scratch, const Wide& z2,
                     double* moments) {
  const int64_t channel = block * kWideBlock;
  const int64_t in_offset = plane_offset(z1, shape.in_pixels(), image, block);
  const int64_t out_offset = plane_offset(z2, shape.out_pixels(), image, block);
  float taps[kTaps * kWideBlock];
  float zeros[kWideBlock] = {};
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    __builtin_memcpy(taps + tap * kWideBlock, weights + tap * shape.padded_wide() + channel,
                     sizeof(zeros));
  }
  const StencilScratch memory = forward_scratch(shape, scratch);
  StencilTile tile(memory.tile, forward_columns(shape));
  const int64_t step = strip_rows(shape.out_height, shape.stride, tile.columns);
  constexpr int kGroups = kWideBlock / kLaneFloats;
  Moments<kLanes> statistics[kGroups];
  const auto compute_strip = [&](auto product, int64_t first) __attribute__((always_inline)) {
    using Kind = decltype(product);
    const int64_t last = smaller(first + step, shape.out_height);
    const int64_t begin = first * shape.stride - shape.top;
    tile.move_to(begin, begin + (last - first - 1) * shape.stride + 3);
    const auto inside = [&](int64_t row) { return row >= 0 && row < shape.height; };
    tile.fill(inside, [&](int64_t row, float* line) __attribute__((always_inline)) {
      const auto* in = read_pixels<Kind>(z1, in_offset + row * shape.width * kWideBlock,
                                         shape.width, memory.line);
      with_activation(shape.expand_activation, [&](auto kind) __attribute__((always_inline)) {
        activate_pixels<decltype(kind)::value>(
            in, shape.width, norm.scale + channel, norm.shift + channel, nullptr,
            Rounded<float>(line + shape.left * kTilePitch), kTilePitch);
      });
    });
    const int64_t pixels = (last - first) * shape.out_width;
    const int64_t at = out_offset + first * shape.out_width * kWideBlock;
    auto* out = place_of_pixels<Kind>(z2, at, memory.strip);
    const DepthwiseShape stencil = {last - first,
                                    shape.out_width,
                                    kWideBlock,
                                    kTilePitch,
                                    tile.row_floats,
                                    kWideBlock,
                                    shape.out_width * kWideBlock};
    depthwise(stencil, shape.stride, Activation::identity, tile.data, taps, zeros,
              typename Kind::Writer(out));
    for (int group = 0; moments && group < kGroups; ++group) {
      const auto* values = out + group * kLaneFloats;
      if (first == 0) statistics[group].start(values);
      statistics[group].add(values, pixels, kWideBlock);
    }
    write_pixels<Kind>(z2, at, pixels, out);
  };
  with_unscaled_product(shape.product, [&](auto product) __attribute__((always_inline)) {
    for (int64_t first = 0; first < shape.out_height; first += step) compute_strip(product, first);
  });
  if (!moments) return;
  for (int group = 0; group < kGroups; ++group) {
    double* means = moments + channel + group * kLaneFloats;
    statistics[group].finish(shape.out_pixels(), means, means + shape.padded_wide());
  }
}

int64_t train_scratch(const TrainShape& shape) {
  const int64_t strip = kStripPixels * (2 * kTilePitch + kWideBlock);
  const int64_t columns = round_up(larger(shape.in_channels, shape.out_channels), kPanel);
  const int64_t end = kStripPixels * (kTilePitch + kWideBlock + columns);
  return larger(larger(strip, end), larger(forward_scratch(shape, nullptr).size,
                                           backward_scratch(shape, nullptr).size));
}

void train_pool(const TrainShape& shape, int64_t image, int64_t block, const Wide& z2,
                const ScaleShift& norm, float* scratch, float* means) {
  const int64_t offset = plane_offset(z2, shape.out_pixels(), image, block);
  const int64_t channel = block * kWideBlock;
  const double factor = 1.0 / static_cast<double>(shape.out_pixels());
  double totals[kWideBlock] = {};
  for (int64_t first = 0; first < shape.out_pixels(); first += kStripPixels) {
    const int64_t count = smaller(kStripPixels, shape.out_pixels() - first);
    with_unscaled_product(shape.product, [&](auto product) __attribute__((always_inline)) {
      using Kind = decltype(product);
      const auto* in = read_pixels<Kind>(z2, offset + first * kWideBlock, count, scratch);
      with_activation(shape.depthwise_activation, [&](auto kind) __attribute__((always_inline)) {
        add_activated<decltype(kind)::value>(in, count, norm.scale + channel, norm.shift + channel,
                                             totals);
      });
    });
  }
  for (int64_t i = 0; i < kWideBlock; ++i) {
    means[channel + i] = static_cast<float>(totals[i] * factor);
  }
}

void train_project(const TrainShape& shape, const PixelRange& range, const Wide& z2,
                   const ScaleShift& norm, const float* gate, const float* packed,
                   const float* bias, const float* drop_path_scale, const Map& addend,
                   float* scratch, const Map& output) {
  const int64_t channels = shape.out_channels;
  const int64_t columns = round_up(channels, kPanel);
  const int64_t count = range.last - range.first;
  float* tile = scratch;
  float* line = tile + kStripPixels * kTilePitch;
  float* sums = line + kStripPixels * kWideBlock;
  with_unscaled_product(shape.product, [&](auto product) __attribute__((always_inline)) {
    using Kind = decltype(product);
    constexpr int64_t kPitch = kRowPitch<Kind>;
    for (int64_t block = 0; block < shape.blocks(); ++block) {
      const int64_t channel = block * kWideBlock;
      const int64_t at =
          plane_offset(z2, shape.out_pixels(), range.image, block) + range.first * kWideBlock;
      const auto* in = read_pixels<Kind>(z2, at, count, line);
      const float* factor = gate ? gate + range.image * shape.padded_wide() + channel : nullptr;
      with_activation(shape.depthwise_activation, [&](auto kind) __attribute__((always_inline)) {
        activate_pixels<decltype(kind)::value>(
            in, count, norm.scale + channel, norm.shift + channel, factor,
            Rounded<typename Kind::Element>(elements_of<Kind>(tile)), kPitch);
      });
      const int64_t depth = words_of<Kind>(valid_channels(shape.wide_channels, block));
      gemm<Kind>(count, channels, depth, {tile, kPitch / Kind::kPerWord, 1},
                 packed + words_of<Kind>(channel) * columns, depth * kPanel, kPanel, sums, columns,
                 block > 0);
    }
  });
  const float keep = drop_path_scale ? drop_path_scale[range.image] : 1.0f;
  const int64_t first = (range.image * shape.out_pixels() + range.first) * channels;
  with_elements(output.type, output.data, [&](auto* out) {
    with_elements(addend.type, addend.data, [&](auto* extra) {
      for (int64_t pixel = 0; pixel < count; ++pixel) {
        const int64_t at = first + pixel * channels;
        finish_pixel(sums + pixel * columns, channels, bias, keep, extra ? extra + at : extra,
                     out + at);
      }
    });
  });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
