// Training passes of the inverted bottleneck. Each wide tensor (E channels) crosses memory as often
// as stands beside it; everything between is in tiles of 64 channels that stay in cache.
//   expand               z1 = (x - mu) W'^T and its sums              writes z1
//   depthwise            z2 = dw(act(a1 z1 + b1)) and its moments     reads z1, writes z2
//   project              act(a2 z2 + b2) W2^T                         reads z2
// The backward passes are in mbconv_train_backward.cpp.

#include "cpu/kernels/mbconv_train.h"

#include "cpu/depthwise.h"
#include "cpu/stencil_tile.h"
#include "cpu/wide.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

// Mean and squared deviations of one lane group of `pixels` pixels, around a shift that is one of
// the values, so that a large mean costs no precision.
void lane_moments(const float* wide, int64_t pixels, int64_t pitch, double* mean,
                  double* deviations) {
  constexpr int64_t kFlush = 256;  // additions in float before double takes over
  const Lanes shift = load_lanes(wide);
  double sums[kLaneFloats] = {};
  double squares[kLaneFloats] = {};
  for (int64_t first = 0; first < pixels; first += kFlush) {
    Lanes sum = {};
    Lanes square = {};
    for (int64_t pixel = first; pixel < smaller(first + kFlush, pixels); ++pixel) {
      const Lanes value = load_lanes(wide + pixel * pitch);
      unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
        const Vec shifted = value.v[i] - shift.v[i];
        sum.v[i] += shifted;
        square.v[i] = fma(shifted, shifted, square.v[i]);
      });
    }
    flush(sum, sums);
    flush(square, squares);
  }
  float shifts[kLaneFloats];
  store_lanes(shifts, shift);
  for (int64_t i = 0; i < kLaneFloats; ++i) {
    const double offset = sums[i] / static_cast<double>(pixels);
    mean[i] = static_cast<double>(shifts[i]) + offset;
    deviations[i] = squares[i] - offset * sums[i];
  }
}

}  // namespace

int64_t train_panelled(int64_t columns) { return round_up(columns, kPanel); }

void train_moments(const float* x, int64_t pixels, int64_t channels, double* moments) {
  int64_t channel = 0;
  for (; channel + kLaneFloats <= channels; channel += kLaneFloats) {
    lane_moments(x + channel, pixels, channels, moments + channel, moments + channels + channel);
  }
  for (; channel < channels; ++channel) {
    const double shift = static_cast<double>(x[channel]);
    double sum = 0.0;
    double square = 0.0;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const double value = static_cast<double>(x[pixel * channels + channel]) - shift;
      sum += value;
      square += value * value;
    }
    const double offset = sum / static_cast<double>(pixels);
    moments[channel] = shift + offset;
    moments[channels + channel] = square - offset * sum;
  }
}

void train_rows(const float* x, int64_t pixels, int64_t channels, const float* shift, float scale,
                float* rows) {
  const int64_t columns = round_up(channels, kPanel);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, rows += columns) {
    int64_t i = 0;
    for (; i + kWidth <= channels; i += kWidth) {
      const Vec value = shift ? load(x + i) - load(shift + i) : load(x + i);
      store(rows + i, value * scale);
    }
    for (; i < channels; ++i) rows[i] = (shift ? x[i] - shift[i] : x[i]) * scale;
    for (; i < columns; ++i) rows[i] = 0.0f;
  }
}

void train_pack(const float* weight, int64_t stride, int64_t columns, int64_t depth,
                float* packed) {
  pack(weight, stride, columns, depth, nullptr, nullptr, packed);
}

void train_pack_transposed(const float* weight, int64_t stride, int64_t columns, int64_t depth,
                           float* packed) {
  for (int64_t first = 0; first < columns; first += kPanel) {
    for (int64_t k = 0; k < depth; ++k) {
      const float* source = weight + k * stride + first;
      for (int64_t i = 0; i < kPanel; ++i) packed[i] = first + i < columns ? source[i] : 0.0f;
      packed += kPanel;
    }
  }
}

void train_expand(const TrainShape& shape, const PixelRange& range, const float* rows,
                  const float* packed, float* z1, double* sums) {
  const int64_t depth = shape.in_channels;
  const int64_t columns = round_up(depth, kPanel);
  const int64_t count = range.last - range.first;
  const float* a = rows + (range.image * shape.in_pixels() + range.first) * columns;
  for (int64_t block = 0; block < shape.blocks(); ++block) {
    float* out = z1 + wide_offset(shape.blocks(), shape.in_pixels(), range.image, block) +
                 range.first * kWideBlock;
    gemm(count, valid_channels(shape.wide_channels, block), depth, {a, columns, 1},
         packed + block * kWideBlock * depth, depth * kPanel, kPanel, out, kWideBlock, false);
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

void train_depthwise(const TrainShape& shape, int64_t image, int64_t block, const float* z1,
                     const float* scale, const float* shift, const float* weights, float* scratch,
                     float* z2, double* moments) {
  const int64_t first_channel = block * kWideBlock;
  const float* in = z1 + wide_offset(shape.blocks(), shape.in_pixels(), image, block);
  float* out = z2 + wide_offset(shape.blocks(), shape.out_pixels(), image, block);
  float taps[kTaps * kWideBlock];
  float zeros[kWideBlock] = {};
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    __builtin_memcpy(taps + tap * kWideBlock, weights + tap * shape.padded_wide() + first_channel,
                     sizeof(zeros));
  }
  StencilTile tile(scratch, forward_columns(shape));
  const int64_t step = strip_rows(shape.out_height, shape.stride, tile.columns);
  for (int64_t first = 0; first < shape.out_height; first += step) {
    const int64_t last = smaller(first + step, shape.out_height);
    const int64_t begin = first * shape.stride - shape.top;
    tile.move_to(begin, begin + (last - first - 1) * shape.stride + 3);
    const auto inside = [&](int64_t row) { return row >= 0 && row < shape.height; };
    tile.fill(inside, [&](int64_t row, float* line) __attribute__((always_inline)) {
      with_activation(shape.expand_activation, [&](auto kind) __attribute__((always_inline)) {
        activate_pixels<decltype(kind)::value>(in + row * shape.width * kWideBlock, shape.width,
                                               scale + first_channel, shift + first_channel,
                                               nullptr, line + shape.left * kTilePitch);
      });
    });
    const DepthwiseShape stencil = {last - first, shape.out_width, kWideBlock,
                                    kTilePitch,   tile.row_floats, kWideBlock};
    depthwise(stencil, shape.stride, Activation::identity, tile.data, taps, zeros,
              out + first * shape.out_width * kWideBlock);
  }
  if (!moments) return;
  for (int64_t lane = 0; lane < kWideBlock; lane += kLaneFloats) {
    lane_moments(out + lane, shape.out_pixels(), kWideBlock, moments + first_channel + lane,
                 moments + shape.padded_wide() + first_channel + lane);
  }
}

int64_t train_stencil_scratch(const TrainShape& shape) {
  const int64_t columns = larger(forward_columns(shape), backward_columns(shape));
  const int64_t forward_rows = (shape.out_height - 1) * shape.stride + 3;
  const int64_t strip = strip_rows(shape.out_height, shape.stride, forward_columns(shape));
  const int64_t backward_strip = strip_rows(shape.height, 1, backward_columns(shape));
  const int64_t rows =
      larger(smaller(forward_rows, (strip - 1) * shape.stride + 3), backward_strip + 2);
  return rows * columns * kTilePitch;
}

void train_pool(const TrainShape& shape, int64_t image, int64_t block, const float* z2,
                const float* scale, const float* shift, float* means) {
  const float* in = z2 + wide_offset(shape.blocks(), shape.out_pixels(), image, block);
  const int64_t channel = block * kWideBlock;
  const double factor = 1.0 / static_cast<double>(shape.out_pixels());
  with_activation(shape.depthwise_activation, [&](auto kind) __attribute__((always_inline)) {
    for (int64_t lane = 0; lane < kWideBlock; lane += kLaneFloats) {
      const Lanes a = load_lanes(scale + channel + lane);
      const Lanes b = load_lanes(shift + channel + lane);
      double totals[kLaneFloats] = {};
      for (int64_t row = 0; row < shape.out_height; ++row) {
        Lanes sum = {};
        for (int64_t column = 0; column < shape.out_width; ++column) {
          Lanes value = load_lanes(in + (row * shape.out_width + column) * kWideBlock + lane);
          unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
            value.v[i] = fma(value.v[i], a.v[i], b.v[i]);
          });
          activate<decltype(kind)::value, kLanes>(value.v);
          unroll<kLanes>([&](auto i) __attribute__((always_inline)) { sum.v[i] += value.v[i]; });
        }
        flush(sum, totals);
      }
      for (int64_t i = 0; i < kLaneFloats; ++i) {
        means[channel + lane + i] = static_cast<float>(totals[i] * factor);
      }
    }
  });
}

void train_project(const TrainShape& shape, const PixelRange& range, const float* z2,
                   const float* scale, const float* shift, const float* gate, const float* packed,
                   const float* bias, const float* drop_path_scale, const float* addend,
                   float* tiles, float* output) {
  const int64_t channels = shape.out_channels;
  const int64_t columns = round_up(channels, kPanel);
  const int64_t count = range.last - range.first;
  float* sums = tiles + kTrainStripPixels * kTilePitch;
  for (int64_t block = 0; block < shape.blocks(); ++block) {
    const int64_t channel = block * kWideBlock;
    const float* in = z2 + wide_offset(shape.blocks(), shape.out_pixels(), range.image, block) +
                      range.first * kWideBlock;
    const float* factor = gate ? gate + range.image * shape.padded_wide() + channel : nullptr;
    with_activation(shape.depthwise_activation, [&](auto kind) __attribute__((always_inline)) {
      activate_pixels<decltype(kind)::value>(in, count, scale + channel, shift + channel, factor,
                                             tiles);
    });
    const int64_t depth = valid_channels(shape.wide_channels, block);
    gemm(count, channels, depth, {tiles, kTilePitch, 1}, packed + channel * columns, depth * kPanel,
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
