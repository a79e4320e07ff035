// The backward passes of the inverted bottleneck's training. With g = dout and y = scale z + shift
// (the depthwise and expand norm with the batch's statistics), wide tensors cross memory so:
//   backward_project     dy2 = (g W2) act'(y2), dW2 = act(y2)^T g       reads z2, writes dy2
//   backward_gate        with squeeze-excite only: dy2 in place         reads z2, dy2, writes dy2
//   backward_depthwise   dz2 from dy2 and z2, dpre = dw^T(dz2) act'(y1) reads dy2, z2, z1, writes
//   dpre backward_expand      dz1 from dpre and z1; dW1 = dz1^T x, dx = dz1 W1   reads dpre, z1
//   twice
// A pass whose result is a sum over pixels is divided by blocks of channels, never by pixels alone,
// so that its sums have one order whatever the number of threads.

#include "cpu/depthwise.h"
#include "cpu/kernels/mbconv_train.h"
#include "cpu/stencil_tile.h"
#include "cpu/wide.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

constexpr int64_t kStripPixels = kTrainStripPixels;

// One cache line of channels at a time.
constexpr int kPair = 16 / kWidth > 1 ? 2 : 1;

// The plain case: gradient [pixel][kTilePitch] of act(y) becomes dy2; act(y) goes to `values`.
template <Activation kind>
void activation_backward(const float* z2, int64_t pixels, const float* scale, const float* shift,
                         const float* gradient, float* values, float* dy2, double* sums,
                         double* products) {
  for (int64_t lane = 0; lane < kWideBlock; lane += kPair * kWidth) {
    Vec a[kPair], b[kPair];
    Vec sum[kPair] = {};
    Vec product[kPair] = {};
    unroll<kPair>([&](auto i) __attribute__((always_inline)) {
      a[i] = load(scale + lane + i * kWidth);
      b[i] = load(shift + lane + i * kWidth);
    });
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      unroll<kPair>([&](auto i) __attribute__((always_inline)) {
        const int64_t at = lane + i * kWidth;
        const Vec z = load(z2 + pixel * kWideBlock + at);
        const ValueAndSlope y = activate_and_slope<kind>(fma(z, a[i], b[i]));
        const Vec d = load(gradient + pixel * kTilePitch + at) * y.slope;
        store(values + pixel * kTilePitch + at, y.value);
        store(dy2 + pixel * kWideBlock + at, d);
        sum[i] += d;
        product[i] = fma(d, z, product[i]);
      });
    }
    for (int i = 0; i < kPair * kWidth; ++i) {
      sums[lane + i] += static_cast<double>(sum[i / kWidth][i % kWidth]);
      products[lane + i] += static_cast<double>(product[i / kWidth][i % kWidth]);
    }
  }
}

// The same with squeeze-excite: dy2 takes the gradient of gate * act(y) as it is, `values` takes
// gate * act(y), and gate_sums the sum of gradient * act(y).
template <Activation kind>
void gated_backward(const float* z2, int64_t pixels, const float* scale, const float* shift,
                    const float* gate, const float* gradient, float* values, float* dy2,
                    float* gate_sums) {
  for (int64_t lane = 0; lane < kWideBlock; lane += kWidth) {
    const Vec a = load(scale + lane);
    const Vec b = load(shift + lane);
    const Vec factor = load(gate + lane);
    Vec sum = {};
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      Vec y[1] = {fma(load(z2 + pixel * kWideBlock + lane), a, b)};
      activate<kind, 1>(y);
      const Vec g = load(gradient + pixel * kTilePitch + lane);
      store(values + pixel * kTilePitch + lane, y[0] * factor);
      store(dy2 + pixel * kWideBlock + lane, g);
      sum = fma(g, y[0], sum);
    }
    store(gate_sums + lane, load(gate_sums + lane) + sum);
  }
}

// `rows` rows of dpre from a tile of dz2 at the resolution of z1, which starts two rows above.
template <Activation kind>
void stencil_backward(const StencilTile& tile, const float* z1, int64_t rows, int64_t width,
                      const float* scale, const float* shift, const float* taps, float* dpre,
                      double* sums, double* products, double* grad_weights, int64_t tap_stride) {
  for (int64_t lane = 0; lane < kWideBlock; lane += kWidth) {
    const Vec a = load(scale + lane);
    const Vec b = load(shift + lane);
    Vec sum = {};
    Vec product = {};
    Vec grad_taps[kTaps] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const float* line = tile.data + row * tile.row_floats + lane;
      for (int64_t column = 0; column < width; ++column) {
        const int64_t at = (row * width + column) * kWideBlock + lane;
        const Vec z = load(z1 + at);
        const ValueAndSlope h = activate_and_slope<kind>(fma(z, a, b));
        Vec partial[3] = {};
        unroll<kTaps>([&](auto tap) __attribute__((always_inline)) {
          constexpr int64_t i = tap / 3;
          constexpr int64_t j = tap % 3;
          const Vec d = load(line + (2 - i) * tile.row_floats + (column + 2 - j) * kTilePitch);
          partial[j] = fma(d, load(taps + tap * kWideBlock + lane), partial[j]);
          grad_taps[tap] = fma(d, h.value, grad_taps[tap]);
        });
        const Vec d = (partial[0] + partial[1] + partial[2]) * h.slope;
        store(dpre + at, d);
        sum += d;
        product = fma(d, z, product);
      }
    }
    for (int i = 0; i < kWidth; ++i) {
      sums[lane + i] += static_cast<double>(sum[i]);
      products[lane + i] += static_cast<double>(product[i]);
    }
    unroll<kTaps>([&](auto tap) __attribute__((always_inline)) {
      for (int i = 0; i < kWidth; ++i) {
        grad_weights[tap * tap_stride + lane + i] += static_cast<double>(grad_taps[tap][i]);
      }
    });
  }
}

// weights_gradient [kWideBlock][columns] (+)= tile [pixels][kTilePitch]^T rows [pixels][columns].
void accumulate_weight(const float* tile, const float* rows, int64_t pixels, int64_t columns,
                       bool accumulate, float* weights_gradient) {
  gemm(kWideBlock, columns, pixels, {tile, 1, kTilePitch}, rows, kPanel, columns, weights_gradient,
       columns, accumulate);
}

}  // namespace

void train_backward_project(const TrainShape& shape, int64_t block, int64_t first, int64_t last,
                            const float* grad_rows, const float* z2, const float* scale,
                            const float* shift, const float* gate, const float* packed,
                            float* tiles, float* dy2, float* grad_weight, double* sums,
                            float* grad_gate) {
  const int64_t columns = round_up(shape.out_channels, kPanel);
  const int64_t channel = block * kWideBlock;
  float* gradient = tiles;
  float* values = tiles + kStripPixels * kTilePitch;
  for (int64_t image = first; image < last; ++image) {
    const int64_t wide = wide_offset(shape.blocks(), shape.out_pixels(), image, block);
    for (int64_t pixel = 0; pixel < shape.out_pixels(); pixel += kStripPixels) {
      const int64_t count = smaller(kStripPixels, shape.out_pixels() - pixel);
      const float* rows = grad_rows + (image * shape.out_pixels() + pixel) * columns;
      const float* z = z2 + wide + pixel * kWideBlock;
      float* d = dy2 + wide + pixel * kWideBlock;
      gemm(count, kWideBlock, shape.out_channels, {rows, columns, 1}, packed,
           shape.out_channels * kPanel, kPanel, gradient, kTilePitch, false);
      with_activation(shape.depthwise_activation, [&](auto kind) __attribute__((always_inline)) {
        constexpr Activation kKind = decltype(kind)::value;
        if (gate) {
          const int64_t at = image * shape.padded_wide() + channel;
          gated_backward<kKind>(z, count, scale + channel, shift + channel, gate + at, gradient,
                                values, d, grad_gate + at);
        } else {
          activation_backward<kKind>(z, count, scale + channel, shift + channel, gradient, values,
                                     d, sums + channel, sums + shape.padded_wide() + channel);
        }
      });
      accumulate_weight(values, rows, count, columns, image > first || pixel > 0, grad_weight);
    }
  }
}

void train_backward_gate(const TrainShape& shape, int64_t image, int64_t block, const float* z2,
                         const float* scale, const float* shift, const float* gate,
                         const float* grad_mean, float* dy2, double* sums) {
  const int64_t channel = block * kWideBlock;
  const int64_t wide = wide_offset(shape.blocks(), shape.out_pixels(), image, block);
  with_activation(shape.depthwise_activation, [&](auto kind) __attribute__((always_inline)) {
    for (int64_t lane = 0; lane < kWideBlock; lane += kWidth) {
      const Vec a = load(scale + channel + lane);
      const Vec b = load(shift + channel + lane);
      const Vec factor = load(gate + image * shape.padded_wide() + channel + lane);
      const Vec offset = load(grad_mean + image * shape.padded_wide() + channel + lane);
      for (int64_t first = 0; first < shape.out_pixels(); first += kStripPixels) {
        Vec sum = {};
        Vec product = {};
        const int64_t last = smaller(first + kStripPixels, shape.out_pixels());
        for (int64_t pixel = first; pixel < last; ++pixel) {
          const int64_t at = wide + pixel * kWideBlock + lane;
          const Vec z = load(z2 + at);
          const Vec slope = activate_and_slope<decltype(kind)::value>(fma(z, a, b)).slope;
          const Vec d = fma(factor, load(dy2 + at), offset) * slope;
          store(dy2 + at, d);
          sum += d;
          product = fma(d, z, product);
        }
        for (int i = 0; i < kWidth; ++i) {
          sums[channel + lane + i] += static_cast<double>(sum[i]);
          sums[shape.padded_wide() + channel + lane + i] += static_cast<double>(product[i]);
        }
      }
    }
  });
}

void train_backward_depthwise(const TrainShape& shape, int64_t image, int64_t block,
                              const float* dy2, const float* z2, const float* z1,
                              const float* const coefficients[5], const float* weights,
                              float* scratch, float* dpre, double* sums, double* grad_weights) {
  const int64_t channel = block * kWideBlock;
  const int64_t out_offset = wide_offset(shape.blocks(), shape.out_pixels(), image, block);
  const int64_t in_offset = wide_offset(shape.blocks(), shape.in_pixels(), image, block);
  const int64_t stride = shape.stride;
  float taps[kTaps * kWideBlock];
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    __builtin_memcpy(taps + tap * kWideBlock, weights + tap * shape.padded_wide() + channel,
                     kWideBlock * sizeof(float));
  }
  StencilTile tile(scratch, backward_columns(shape));
  // Output column q is at q * stride - left + 2 of the tile; the first and last that are inside.
  const int64_t first_column = larger(divide_up(shape.left - 2, stride), 0);
  const int64_t last_column =
      smaller((tile.columns - 1 + shape.left - 2) / stride + 1, shape.out_width);
  const auto inside = [&](int64_t row) {
    return row >= 0 && row % stride == 0 && row / stride < shape.out_height;
  };
  const int64_t step = strip_rows(shape.height, 1, tile.columns);
  for (int64_t first = 0; first < shape.height; first += step) {
    const int64_t last = smaller(first + step, shape.height);
    tile.move_to(first + shape.top - 2, last + shape.top);
    tile.fill(inside, [&](int64_t row, float* line) __attribute__((always_inline)) {
      const int64_t at = out_offset + (row / stride * shape.out_width + first_column) * kWideBlock;
      combine_pixels(dy2 + at, z2 + at, last_column - first_column, coefficients[0] + channel,
                     coefficients[1] + channel, coefficients[2] + channel,
                     line + (first_column * stride - shape.left + 2) * kTilePitch,
                     stride * kTilePitch);
    });
    const int64_t at = in_offset + first * shape.width * kWideBlock;
    with_activation(shape.expand_activation, [&](auto kind) __attribute__((always_inline)) {
      stencil_backward<decltype(kind)::value>(
          tile, z1 + at, last - first, shape.width, coefficients[3] + channel,
          coefficients[4] + channel, taps, dpre + at, sums + channel,
          sums + shape.padded_wide() + channel, grad_weights + channel, shape.padded_wide());
    });
  }
}

void train_backward_expand_weight(const TrainShape& shape, int64_t block, int64_t first,
                                  int64_t last, const float* dpre, const float* z1,
                                  const float* const coefficients[3], const float* rows,
                                  float* tile, float* grad_weight) {
  const int64_t columns = round_up(shape.in_channels, kPanel);
  const int64_t channel = block * kWideBlock;
  for (int64_t image = first; image < last; ++image) {
    const int64_t wide = wide_offset(shape.blocks(), shape.in_pixels(), image, block);
    for (int64_t pixel = 0; pixel < shape.in_pixels(); pixel += kStripPixels) {
      const int64_t count = smaller(kStripPixels, shape.in_pixels() - pixel);
      const int64_t at = wide + pixel * kWideBlock;
      combine_pixels(dpre + at, z1 + at, count, coefficients[0] + channel,
                     coefficients[1] + channel, coefficients[2] + channel, tile);
      accumulate_weight(tile, rows + (image * shape.in_pixels() + pixel) * columns, count, columns,
                        image > first || pixel > 0, grad_weight);
    }
  }
}

void train_backward_expand_input(const TrainShape& shape, const PixelRange& range,
                                 const float* dpre, const float* z1,
                                 const float* const coefficients[3], const float* packed,
                                 const float* rows, const float* factor, const float* offset,
                                 const float* addend, float* tile, float* dx) {
  const int64_t channels = shape.in_channels;
  const int64_t columns = round_up(channels, kPanel);
  const int64_t count = range.last - range.first;
  float* sums = tile + kStripPixels * kTilePitch;
  for (int64_t block = 0; block < shape.blocks(); ++block) {
    const int64_t channel = block * kWideBlock;
    const int64_t at = wide_offset(shape.blocks(), shape.in_pixels(), range.image, block) +
                       range.first * kWideBlock;
    combine_pixels(dpre + at, z1 + at, count, coefficients[0] + channel, coefficients[1] + channel,
                   coefficients[2] + channel, tile);
    const int64_t depth = valid_channels(shape.wide_channels, block);
    gemm(count, channels, depth, {tile, kTilePitch, 1}, packed + channel * columns, depth * kPanel,
         kPanel, sums, columns, block > 0);
  }
  const int64_t first = range.image * shape.in_pixels() + range.first;
  rows += first * columns;
  dx += first * channels;
  if (addend) addend += first * channels;
  for (int64_t pixel = 0; pixel < count; ++pixel) {
    const float* sum = sums + pixel * columns;
    const float* row = rows + pixel * columns;
    float* out = dx + pixel * channels;
    const float* extra = addend ? addend + pixel * channels : nullptr;
    int64_t i = 0;
    for (; i + kWidth <= channels; i += kWidth) {
      Vec value = fma(load(row + i), load(factor + i), load(sum + i) + load(offset + i));
      if (extra) value += load(extra + i);
      store(out + i, value);
    }
    for (; i < channels; ++i) {
      out[i] = sum[i] + row[i] * factor[i] + offset[i] + (extra ? extra[i] : 0.0f);
    }
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
