#pragma once

// A 3x3 convolution of stride 1 by Winograd's F(2x2, 3x3):
//   Y = A^T [(G g G^T) * (B^T d B)] A
// for tiles d of 4x4 pixels and Y of 2x2: 16 products of channels where the sum over the kernel has
// 36. B and A hold 0, 1 and -1 only and G halves, so rounding grows by a small factor only. The
// tiles' transforms, their products and the weights of the stem take about half an L2 cache.

#include "cpu/isa/gemm.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

constexpr int64_t kPoints = 16;     // places of a transformed tile
constexpr int64_t kMostTiles = 32;  // that are computed together

// A pair of output rows. Pixels are `channels` floats apart, those of the output `outputs`, both
// multiples of kWidth; the weights are [kPoints][panels][words of the channels][kPanel].
struct WinogradRows {
  int64_t columns;  // of the output; the input has two more, and one beyond where they are odd
  int64_t channels, outputs;
  int64_t row_stride;  // of the input, floats
  const float* weights;
};

// Floats from one place to the next. Not a power of two, which would map all places of a tile to
// one set of the L1 cache.
inline int64_t point_stride(int64_t channels) { return kMostTiles * channels + 16; }

inline int64_t winograd_weights_size(Product kind, int64_t channels, int64_t outputs) {
  return kPoints * round_up(outputs, kPanel) * words_of(side_of(kind), channels);
}
inline int64_t winograd_scratch_size(int64_t channels, int64_t outputs) {
  return kPoints * (point_stride(channels) + point_stride(outputs));
}

// One kernel g [3][3] -> to[point * stride].
inline void transform_kernel(const float* g, int64_t stride, float* to) {
  float rows[4][3];
  for (int64_t j = 0; j < 3; ++j) {
    const float even = 0.5f * (g[j] + g[6 + j]);
    const float odd = 0.5f * g[3 + j];
    rows[0][j] = g[j];
    rows[1][j] = even + odd;
    rows[2][j] = even - odd;
    rows[3][j] = g[6 + j];
  }
  for (const auto& row : rows) {
    const float even = 0.5f * (row[0] + row[2]);
    const float odd = 0.5f * row[1];
    const float values[4] = {row[0], even + odd, even - odd, row[2]};
    for (const float value : values) {
      *to = value;
      to += stride;
    }
  }
}

// B^T d of one row or column of four.
[[gnu::always_inline]] inline void transform_input(Vec& d0, Vec& d1, Vec& d2, Vec& d3) {
  const Vec t0 = d0 - d2;
  const Vec t1 = d1 + d2;
  const Vec t2 = d2 - d1;
  const Vec t3 = d1 - d3;
  d0 = t0;
  d1 = t1;
  d2 = t2;
  d3 = t3;
}

// The tiles [first, first + count) of a pair of rows -> transformed [kPoints][tile][words].
template <class Kind>
inline void transform_tiles(const WinogradRows& rows, const float* input, int64_t first,
                            int64_t count, float* transformed) {
  const int64_t stride = point_stride(rows.channels);
  for (int64_t tile = 0; tile < count; ++tile) {
    const float* from = input + 2 * (first + tile) * rows.channels;
    const auto to = typename Kind::Writer(elements_of<Kind>(transformed)).at(tile * rows.channels);
    for (int64_t channel = 0; channel < rows.channels; channel += kWidth) {
      Vec d[4][4];
      unroll<16>([&](auto i) __attribute__((always_inline)) {
        d[i / 4][i % 4] =
            load(from + (i / 4) * rows.row_stride + (i % 4) * rows.channels + channel);
      });
      unroll<4>([&](auto j) __attribute__((always_inline)) {
        transform_input(d[0][j], d[1][j], d[2][j], d[3][j]);
      });
      unroll<4>([&](auto i) __attribute__((always_inline)) {
        transform_input(d[i][0], d[i][1], d[i][2], d[i][3]);
      });
      unroll<16>([&](auto i) __attribute__((always_inline)) {
        to.store(i * stride * Kind::kPerWord + channel, d[i / 4][i % 4]);
      });
    }
  }
}

// Products [kPoints][tile][outputs] -> tiles of the output, plus bias. Columns beyond the last are
// left out. Returns whether all results are finite.
inline bool transform_back(const WinogradRows& rows, const float* products, int64_t first,
                           int64_t count, const float* bias, float* result) {
  const int64_t outputs = rows.outputs;
  const int64_t stride = point_stride(outputs);
  Vec check = {};
  for (int64_t tile = 0; tile < count; ++tile) {
    const int64_t column = 2 * (first + tile);
    for (int64_t channel = 0; channel < outputs; channel += kWidth) {
      const float* from = products + tile * outputs + channel;
      const Vec shift = load(bias + channel);
      Vec sums[2][4];
      unroll<4>([&](auto j) __attribute__((always_inline)) {
        const Vec m0 = load(from + j * stride);
        const Vec m1 = load(from + (4 + j) * stride);
        const Vec m2 = load(from + (8 + j) * stride);
        const Vec m3 = load(from + (12 + j) * stride);
        sums[0][j] = m0 + m1 + m2;
        sums[1][j] = m1 - m2 - m3;
      });
      unroll<2>([&](auto i) __attribute__((always_inline)) {
        float* out = result + (i * rows.columns + column) * outputs + channel;
        const Vec left = sums[i][0] + sums[i][1] + sums[i][2] + shift;
        check += left * 0.0f;
        store(out, left);
        if (column + 1 < rows.columns) {
          const Vec right = sums[i][1] - sums[i][2] - sums[i][3] + shift;
          check += right * 0.0f;
          store(out + outputs, right);
        }
      });
    }
  }
  return sum_of_lanes(check) == 0.0f;
}

// result [2][columns][outputs] of a pair of rows; `input` starts a row above and a column before.
// Returns whether all of it is finite: a value that is not would spread to pixels that do not see
// it.
template <class Kind>
inline bool winograd_rows(const WinogradRows& rows, const float* input, const float* bias,
                          float* scratch, float* result) {
  const int64_t channels = rows.channels;
  const int64_t words = words_of<Kind>(channels);
  const int64_t stride = point_stride(channels);
  const int64_t product_stride = point_stride(rows.outputs);
  float* transformed = scratch;
  float* products = scratch + kPoints * stride;
  const int64_t tiles = divide_up(rows.columns, 2);
  const int64_t groups = divide_up(tiles, kMostTiles);
  bool finite = true;
#if defined(__AMX_TILE__)
  const TileRegisters registers;  // configured once for all products
#endif
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = tiles * group / groups;
    const int64_t count = tiles * (group + 1) / groups - first;
    transform_tiles<Kind>(rows, input, first, count, transformed);
    for (int64_t point = 0; point < kPoints; ++point) {
      gemm<Kind>(count, rows.outputs, words, {transformed + point * stride, words, 1},
                 rows.weights + point * round_up(rows.outputs, kPanel) * words, words * kPanel,
                 kPanel, products + point * product_stride, rows.outputs, false);
    }
    finite &= transform_back(rows, products, first, count, bias, result);
  }
  return finite;
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
