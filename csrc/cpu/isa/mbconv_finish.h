#pragma once

// The end of the inverted bottleneck for a strip of output rows:
//   output = shortcut(x) + drop_path_scale (sum + bias)
// with the shortcut pooled and projected where the block asks for it.

#include "cpu/isa/mbconv_pack.h"
#include "cpu/isa/pooling.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// One pixel [C_in] of the pooled input.
template <class Element>
inline void pool_input(const MBConvProblem& problem, const Element* x, int64_t row, int64_t column,
                       float* pooled) {
  const int64_t channels = problem.in_channels;
  pool_pixel(problem.pool, problem.height, problem.width, channels, row, column, pooled,
             [&](int64_t pixel) { return x + pixel * channels; });
}

// sums = (sums + bias) * scale for one pixel.
inline void scale_and_shift(const float* bias, float scale, int64_t columns, float* sums) {
  for (int64_t i = 0; i < columns; i += kWidth) {
    store(sums + i, (load(sums + i) + load(bias + i)) * scale);
  }
}

// The shortcut's input for one pixel of the output: added to `sums`, or left in `pooled`, from
// where it is projected.
template <class Element>
inline void take_shortcut(const MBConvProblem& problem, const Element* x, int64_t row,
                          int64_t column, float* pooled, float* sums) {
  if (problem.pool.kind != PoolKind::none) {
    pool_input(problem, x, row, column, pooled);
    if (!problem.projects_shortcut) add(pooled, problem.in_channels, sums);
    return;
  }
  const Element* source = x + (row * problem.width + column) * problem.in_channels;
  if (problem.projects_shortcut) {
    widen(source, problem.in_channels, pooled);
  } else {
    add(source, problem.in_channels, sums);
  }
}

// sums [pixels][panelled C_out] of the output rows [first, last) -> output. `pooled` is scratch for
// [pixels][C_in].
// Kind: of the product that made the sums.
template <class Kind>
inline void finish_rows(const MBConvProblem& problem, const float* packed, int64_t image,
                        int64_t first, int64_t last, float* sums, float* pooled) {
  const PackedLayout layout = packed_layout(problem);
  const int64_t columns = panelled(problem.out_channels);
  const int64_t pixels = (last - first) * problem.out_width;
  const float scale = problem.drop_path_scale ? problem.drop_path_scale[image] : 1.0f;
  using Side = typename Kind::Side;
  const int64_t words = shortcut_words(problem);
  const bool projects = problem.residual && problem.projects_shortcut;
  const int64_t begin =
      (image * problem.out_height + first) * problem.out_width * problem.out_channels;
  const auto write = [&](int64_t pixel) {
    with_elements(problem.output_type, problem.output, [&](auto* out) {
      narrow(sums + pixel * columns, problem.out_channels,
             out + begin + pixel * problem.out_channels);
    });
  };
  to_numbers<Kind>(pixels, columns, columns, packed + layout.project_factor, nullptr, sums);
  with_elements(problem.x_type, problem.x, [&](auto* x) __attribute__((always_inline)) {
    x += image * problem.height * problem.width * problem.in_channels;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      scale_and_shift(packed + layout.project_bias, scale, columns, sums + pixel * columns);
      if (problem.residual) {
        take_shortcut(problem, x, first + pixel / problem.out_width, pixel % problem.out_width,
                      pooled + pixel * problem.in_channels, sums + pixel * columns);
      }
      if (projects) {
        // Words take no more room, so that they follow one another before the next pixel.
        to_words<Side>(pooled + pixel * problem.in_channels, problem.in_channels,
                       pooled + pixel * words);
      } else {
        write(pixel);
      }
    }
  });
  if (!projects) return;
  gemm<Side>(pixels, problem.out_channels, words, {pooled, words, 1}, packed + layout.shortcut,
             words * kPanel, kPanel, sums, columns, true);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    scale_and_shift(packed + layout.shortcut_bias, 1.0f, columns, sums + pixel * columns);
    write(pixel);
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
