#pragma once

// Depthwise 3x3 convolution of rows that lie in cache:
//   out[y][x] = act(bias + sum over 3x3 taps of w[i][j] * in[y*stride + i][x*stride + j])
// on rows [pixels][channels] that already hold the zero border. A run of four outputs shares its
// loads; the nine weights of kWidth channels stay in registers along a row.

#include "cpu/isa/activation.h"
#include "cpu/isa/product.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

constexpr int kTaps = 9;
constexpr int kRun = 4;

// One run of outputs for kWidth channels. pixel, row: floats from one pixel, row of `in` to the
// next.
template <int stride, int outputs, Activation kind, class Writer>
[[gnu::always_inline]] inline void depthwise_run(const float* in, int64_t pixel, int64_t row,
                                                 const Vec (&weights)[kTaps], Vec bias, Writer out,
                                                 int64_t out_pixel) {
  constexpr int kColumns = (outputs - 1) * stride + 3;
  Vec sums[outputs];
  unroll<outputs>([&](auto x) __attribute__((always_inline)) { sums[x] = bias; });
  unroll<3>([&](auto i) __attribute__((always_inline)) {
    const float* line = in + i * row;
    unroll<kColumns>([&](auto column) __attribute__((always_inline)) {
      const Vec value = load(line + column * pixel);
      unroll<3>([&](auto j) __attribute__((always_inline)) {
        constexpr int offset = decltype(column)::value - decltype(j)::value;
        if constexpr (offset >= 0 && offset % stride == 0 && offset / stride < outputs) {
          sums[offset / stride] = fma(value, weights[3 * i + j], sums[offset / stride]);
        }
      });
    });
  });
  activate<kind, outputs, typename Writer::Element>(sums);
  unroll<outputs>([&](auto x)
                      __attribute__((always_inline)) { out.store(x * out_pixel, sums[x]); });
}

// `rows` rows of `columns` outputs for `channels` channels, a multiple of kWidth. pixel, row:
// floats from one pixel, row of `in` to the next; out_pixel, out_row: elements from one pixel, row
// of `out` to the next. weights: [9][channels].
struct DepthwiseShape {
  int64_t rows, columns, channels, pixel, row, out_pixel, out_row;
};

template <int stride, Activation kind, class Writer>
inline void depthwise_rows(const DepthwiseShape& shape, const float* in, const float* weights,
                           const float* bias, Writer out) {
  const int64_t pixel = shape.pixel;
  const int64_t out_pixel = shape.out_pixel;
  for (int64_t y = 0; y < shape.rows; ++y) {
    for (int64_t channel = 0; channel < shape.channels; channel += kWidth) {
      Vec taps[kTaps];
      unroll<kTaps>([&](auto i) __attribute__((always_inline)) {
        taps[i] = load(weights + i * shape.channels + channel);
      });
      const Vec start = load(bias + channel);
      const float* line = in + y * stride * shape.row + channel;
      const Writer result = out.at(y * shape.out_row + channel);
      int64_t x = 0;
      for (; x + kRun <= shape.columns; x += kRun) {
        depthwise_run<stride, kRun, kind>(line + x * stride * pixel, pixel, shape.row, taps, start,
                                          result.at(x * out_pixel), out_pixel);
      }
      for (; x < shape.columns; ++x) {
        depthwise_run<stride, 1, kind>(line + x * stride * pixel, pixel, shape.row, taps, start,
                                       result.at(x * out_pixel), out_pixel);
      }
    }
  }
}

// The same with stride (1 or 2) and activation known at run time.
template <class Writer>
inline void depthwise(const DepthwiseShape& shape, int64_t stride, Activation activation,
                      const float* in, const float* weights, const float* bias, Writer out) {
  with_activation(activation, [&](auto kind) __attribute__((always_inline)) {
    constexpr Activation kKind = decltype(kind)::value;
    if (stride == 1) {
      depthwise_rows<1, kKind>(shape, in, weights, bias, out);
    } else {
      depthwise_rows<2, kKind>(shape, in, weights, bias, out);
    }
  });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
