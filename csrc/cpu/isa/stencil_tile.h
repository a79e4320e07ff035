#pragma once

// A sliding window of rows [rows][columns][kTilePitch] with a zero border, for one block of
// channels.

#include "cpu/common/mbconv_train_kernels.h"
#include "cpu/isa/wide.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// Output rows per strip, such that the rows below take half an L2 cache at most.
inline int64_t strip_rows(int64_t out_height, int64_t stride, int64_t columns) {
  constexpr int64_t kFloats = 40 * 1024;
  const int64_t fitting = larger((kFloats / (columns * kTilePitch) - 3) / stride + 1, 2);
  return divide_up(out_height, divide_up(out_height, fitting));
}

// Columns of the tile of z1, and of the tile of dz2 spread to the resolution of z1.
inline int64_t forward_columns(const TrainShape& shape) {
  return larger(shape.left + shape.width, (shape.out_width - 1) * shape.stride + 3);
}
inline int64_t backward_columns(const TrainShape& shape) { return shape.width + 2; }

// Memory of a pass over one block of an image: the tile of rows, one line of pixels and one strip
// of results or of z1, both as floats where the wide tensor holds another type.
struct StencilScratch {
  float* tile;
  float* line;
  float* strip;
  int64_t size;  // floats
};

inline StencilScratch stencil_scratch(int64_t tile_pixels, int64_t line_pixels,
                                      int64_t strip_pixels, float* memory) {
  StencilScratch scratch;
  scratch.tile = memory;
  scratch.line = memory + tile_pixels * kTilePitch;
  scratch.strip = scratch.line + line_pixels * kWideBlock;
  scratch.size = tile_pixels * kTilePitch + (line_pixels + strip_pixels) * kWideBlock;
  return scratch;
}

inline StencilScratch forward_scratch(const TrainShape& shape, float* memory) {
  const int64_t columns = forward_columns(shape);
  const int64_t strip = strip_rows(shape.out_height, shape.stride, columns);
  const int64_t rows = (strip - 1) * shape.stride + 3;
  return stencil_scratch(rows * columns, shape.width, strip * shape.out_width, memory);
}

inline StencilScratch backward_scratch(const TrainShape& shape, float* memory) {
  const int64_t columns = backward_columns(shape);
  const int64_t strip = strip_rows(shape.height, 1, columns);
  return stencil_scratch((strip + 2) * columns, shape.out_width, strip * shape.width, memory);
}

struct StencilTile {
  float* data;
  int64_t columns, row_floats;
  int64_t first = 0, last = INT64_MIN / 2;  // rows of the padded map that the tile holds
  int64_t kept = 0;                         // how many of them were there before

  StencilTile(float* data, int64_t columns)
      : data(data), columns(columns), row_floats(columns * kTilePitch) {}

  // Moves to the rows [begin, end), keeping those already there. Rows only move down.
  void move_to(int64_t begin, int64_t end) {
    kept = larger(last - begin, 0);
    if (kept > 0) {
      __builtin_memmove(data, data + (begin - first) * row_floats,
                        static_cast<size_t>(kept * row_floats) * sizeof(float));
    }
    first = begin;
    last = end;
  }

  // Clears the new rows and calls write(row, line) for those that inside(row) holds.
  template <class Inside, class Write>
  [[gnu::always_inline]] void fill(Inside&& inside, Write&& write) {
    for (int64_t row = first + kept; row < last; ++row) {
      float* line = data + (row - first) * row_floats;
      __builtin_memset(line, 0, static_cast<size_t>(row_floats) * sizeof(float));
      if (inside(row)) write(row, line);
    }
  }
};

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
