// The forward passes of the inverted bottleneck's training. Wide tensors (E channels) cross memory
// as often as stands beside each pass; everything between is in tiles of 64 channels that stay in
// cache, in float whatever the type of the wide tensors.
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

void train_rows(const float* x, int64_t pixels, int64_t channels, const float* shift, float scale,
                float* rows, double* sums) {
  const int64_t columns = round_up(channels, kPanel);
  float* row = rows;
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, row += columns) {
    int64_t i = 0;
    for (; i + kWidth <= channels; i += kWidth) {
      const Vec value = shift ? load(x + i) - load(shift + i) : load(x + i);
      store(row + i, value * scale);
    }
    for (; i < channels; ++i) row[i] = (shift ? x[i] - shift[i] : x[i]) * scale;
    for (; i < columns; ++i) row[i] = 0.0f;
  }
  if (!sums) return;
  for (int64_t first = 0; first < channels; first += kWidth) {
    Vec sum = {};
    for (int64_t pixel = 0; pixel < pixels; ++pixel) sum += load(rows + pixel * columns + first);
    for (int64_t i = 0; i < smaller(kWidth, channels - first); ++i) {
      sums[first + i] += static_cast<double>(sum[i]);
    }
  }
}

void train_expand(const TrainShape& shape, const PixelRange& range, const Blocks& blocks,
                  const float* rows, const float* packed, float* scratch, const Wide& z1,
                  double* sums) {
  const int64_t depth = shape.in_channels;
  const int64_t columns = round_up(depth, kPanel);
  const int64_t count = range.last - range.first;
  const float* a = rows + (range.image * shape.in_pixels() + range.first) * columns;
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t at =
        plane_offset(z1, shape.in_pixels(), range.image, block) + range.first * kWideBlock;
    float* out = place_of_pixels(z1, at, scratch);
    gemm(count, valid_channels(shape.wide_channels, block), depth, {a, columns, 1},
         packed + block * kWideBlock * depth, depth * kPanel, kPanel, out, kWideBlock, false);
    write_pixels(z1, at, count, out);
    if (!sums) continue;
    for (int64_t lane = 0; lane < kWideBlock; lane += kLaneFloats) {
      Lanes sum = {};
      Lanes square = {};
      for (int64_t pixel = 0; pixel < count; ++pixel) {
        const Lanes value = load_lanes(out + pixel * kWideBlock + lane);
        unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
          sum.v[i] += value.v[i];
          square.v[i] = fma(value.v[i], value.v[i], square.v[i]);
        });
      }
      flush(sum, sums + block * kWideBlock + lane);
      flush(square, sums + shape.padded_wide() + block * kWideBlock + lane);
    }
  }
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
  for (int64_t first = 0; first < shape.out_height; first += step) {
    const int64_t last = smaller(first + step, shape.out_height);
    const int64_t begin = first * shape.stride - shape.top;
    tile.move_to(begin, begin + (last - first - 1) * shape.stride + 3);
    const auto inside = [&](int64_t row) { return row >= 0 && row < shape.height; };
    tile.fill(inside, [&](int64_t row, float* line) __attribute__((always_inline)) {
      const float* in =
          read_pixels(z1, in_offset + row * shape.width * kWideBlock, shape.width, memory.line);
      with_activation(shape.expand_activation, [&](auto kind) __attribute__((always_inline)) {
        activate_pixels<decltype(kind)::value>(in, shape.width, norm.scale + channel,
                                               norm.shift + channel, nullptr,
                                               line + shape.left * kTilePitch);
      });
    });
    const int64_t pixels = (last - first) * shape.out_width;
    const int64_t at = out_offset + first * shape.out_width * kWideBlock;
    float* out = place_of_pixels(z2, at, memory.strip);
    const DepthwiseShape stencil = {last - first, shape.out_width, kWideBlock,
                                    kTilePitch,   tile.row_floats, kWideBlock};
    depthwise(stencil, shape.stride, Activation::identity, tile.data, taps, zeros,
              Rounded<float>(out));
    write_pixels(z2, at, pixels, out);
    if (!moments) continue;
    for (int group = 0; group < kGroups; ++group) {
      const float* values = out + group * kLaneFloats;
      if (first == 0) statistics[group].start(values);
      statistics[group].add(values, pixels, kWideBlock);
    }
  }
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
    const float* in = read_pixels(z2, offset + first * kWideBlock, count, scratch);
    with_activation(shape.depthwise_activation, [&](auto kind) __attribute__((always_inline)) {
      for (int64_t lane = 0; lane < kWideBlock; lane += kLaneFloats) {
        const Lanes a = load_lanes(norm.scale + channel + lane);
        const Lanes b = load_lanes(norm.shift + channel + lane);
        Lanes sum = {};
        for (int64_t pixel = 0; pixel < count; ++pixel) {
          Lanes value = load_lanes(in + pixel * kWideBlock + lane);
          unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
            value.v[i] = fma(value.v[i], a.v[i], b.v[i]);
          });
          activate<decltype(kind)::value, kLanes>(value.v);
          unroll<kLanes>([&](auto i) __attribute__((always_inline)) { sum.v[i] += value.v[i]; });
        }
        flush(sum, totals + lane);
      }
    });
  }
  for (int64_t i = 0; i < kWideBlock; ++i) {
    means[channel + i] = static_cast<float>(totals[i] * factor);
  }
}

void train_project(const TrainShape& shape, const PixelRange& range, const Wide& z2,
                   const ScaleShift& norm, const float* gate, const float* packed,
                   const float* bias, const float* drop_path_scale, const float* addend,
                   float* scratch, float* output) {
  const int64_t channels = shape.out_channels;
  const int64_t columns = round_up(channels, kPanel);
  const int64_t count = range.last - range.first;
  float* tile = scratch;
  float* line = tile + kStripPixels * kTilePitch;
  float* sums = line + kStripPixels * kWideBlock;
  for (int64_t block = 0; block < shape.blocks(); ++block) {
    const int64_t channel = block * kWideBlock;
    const int64_t at =
        plane_offset(z2, shape.out_pixels(), range.image, block) + range.first * kWideBlock;
    const float* in = read_pixels(z2, at, count, line);
    const float* factor = gate ? gate + range.image * shape.padded_wide() + channel : nullptr;
    with_activation(shape.depthwise_activation, [&](auto kind) __attribute__((always_inline)) {
      activate_pixels<decltype(kind)::value>(in, count, norm.scale + channel, norm.shift + channel,
                                             factor, tile);
    });
    const int64_t depth = valid_channels(shape.wide_channels, block);
    gemm(count, channels, depth, {tile, kTilePitch, 1}, packed + channel * columns, depth * kPanel,
         kPanel, sums, columns, block > 0);
  }
  const float keep = drop_path_scale ? drop_path_scale[range.image] : 1.0f;
  const int64_t first = (range.image * shape.out_pixels() + range.first) * channels;
  for (int64_t pixel = 0; pixel < count; ++pixel) {
    const float* sum = sums + pixel * columns;
    const float* extra = addend ? addend + first + pixel * channels : nullptr;
    float* out = output + first + pixel * channels;
    int64_t i = 0;
    for (; i + kWidth <= channels; i += kWidth) {
      Vec value = load(sum + i);
      if (bias) value += load(bias + i);
      value *= keep;
      if (extra) value += load(extra + i);
      store(out + i, value);
    }
    for (; i < channels; ++i) {
      out[i] = (sum[i] + (bias ? bias[i] : 0.0f)) * keep + (extra ? extra[i] : 0.0f);
    }
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
