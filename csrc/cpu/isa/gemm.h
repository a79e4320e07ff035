#pragma once

// Products of small matrices that lie in cache: C[rows x columns] += A[rows x depth] B[depth x
// columns]. B is packed in panels of kPanel columns ([columns/kPanel][depth][kPanel], padded with
// zeros), so that the inner loop reads it in order. The micro-kernel holds a block of kRows x
// kPanel of C in registers: 12 of the 16 that AVX2 has. Each step of depth loads two vectors of B,
// broadcasts kRows elements of A and does 12 fused multiply-adds, which is what the FMA units can
// take while the loads stay below their own limit. All sizes along the depth are in words
// (product.h), which in float are elements.

#include "cpu/isa/tiles.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

constexpr int kRows = 6;
constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kWidth;

inline int64_t panelled(int64_t columns) { return round_up(columns, kPanel); }

// Panels of B beyond this depth would not stay in a 32 KB L1 cache beside the rows of A.
constexpr int64_t kDepth = 384;

// A matrix by its strides in words.
struct Strided {
  const float* data;
  int64_t row_stride;
  int64_t depth_stride;
};

inline Strided from_depth(Strided a, int64_t k) {
  return {a.data + k * a.depth_stride, a.row_stride, a.depth_stride};
}

// Memory that will be read soon. While a product runs it asks for a cache line in every four steps
// of depth, so that operands from beyond the caches arrive while others are used.
struct Ahead {
  const float* next;
  const float* end;
};

constexpr int64_t kLineWords = 16;
constexpr int kIntoL2 = 2;  // of the prefetch instruction: what it asks for is too much for L1

// What a product reads after a piece of a panel of packed B, which is `depth` of `panel_depth`
// steps deep: that piece of the next panel or, after the last one, what lies behind in memory,
// which is the next piece or another operand.
inline Ahead after_piece(const float* piece, int64_t depth, int64_t panel_depth, bool last_panel) {
  const float* next = piece + (last_panel ? depth : panel_depth) * kPanel;
  return {next, next + depth * kPanel};
}

// One step of depth: c += a[0 .. rows) * b.
template <class Kind, int rows, int vectors>
[[gnu::always_inline]] inline void multiply_step(const float* a, const float* a3,
                                                 int64_t row_stride, const float* b,
                                                 typename Kind::Sum (&c)[rows][vectors]) {
  Vec panel[vectors];
  unroll<vectors>([&](auto j) __attribute__((always_inline)) { panel[j] = load(b + j * kWidth); });
  unroll<rows>([&](auto i) __attribute__((always_inline)) {
    const Vec factor = Kind::broadcast_word(i < 3 ? a + i * row_stride : a3 + (i - 3) * row_stride);
    unroll<vectors>([&](auto j) __attribute__((always_inline)) {
      c[i][j] = Kind::multiply_add(factor, panel[j], c[i][j]);
    });
  });
}

// c += A B for one block of rows and `vectors` vectors of columns of a panel. b_stride: words from
// one step of depth to the next in B, kPanel if B is packed.
template <class Kind, int rows, int vectors>
[[gnu::always_inline]] inline void multiply(Strided a, const float* b, int64_t b_stride,
                                            int64_t depth,
                                            typename Kind::Sum (&result)[rows][vectors],
                                            Ahead& ahead) {
  typename Kind::Sum c[rows][vectors];
  unroll<rows * vectors>([&](auto i) __attribute__((always_inline)) {
    c[i / vectors][i % vectors] = result[i / vectors][i % vectors];
  });
  const float* a0 = a.data;
  const float* a3 = a.data + 3 * a.row_stride;
  if (a.depth_stride == 1 && b_stride == kPanel) {
    // Beyond the end it asks for one line again and again, which costs next to nothing.
    const int64_t line = ahead.next < ahead.end ? kLineWords : 0;
    for (int64_t k = depth / 4; k > 0; --k) {
      unroll<4>([&](auto step) __attribute__((always_inline)) {
        multiply_step<Kind, rows, vectors>(a0 + step, a3 + step, a.row_stride, b + step * kPanel,
                                           c);
      });
      __builtin_prefetch(ahead.next, 0, kIntoL2);
      ahead.next += line;
      a0 += 4;
      a3 += 4;
      b += 4 * kPanel;
      // Two pointers and multiples of one stride address all rows; without this GCC keeps a pointer
      // per row and runs out of registers.
      asm volatile("" : "+r"(a0), "+r"(a3), "+r"(b));
    }
    depth %= 4;
  }
  for (; depth > 0; --depth) {
    multiply_step<Kind, rows, vectors>(a0, a3, a.row_stride, b, c);
    a0 += a.depth_stride;
    a3 += a.depth_stride;
    b += b_stride;
    asm volatile("" : "+r"(a0), "+r"(a3), "+r"(b));
  }
  unroll<rows * vectors>([&](auto i) __attribute__((always_inline)) {
    result[i / vectors][i % vectors] = c[i / vectors][i % vectors];
  });
}

// Calls function(Constant<rows>, first_row) over blocks of at most kRows rows, as even as possible:
// 49 rows are 4 x 6 + 5 x 5 and not 8 x 6 + 1, whose last block would be slow.
template <class Function>
[[gnu::always_inline]] inline void for_row_blocks(int64_t rows, Function&& function) {
  const int64_t blocks = divide_up(rows, kRows);
  int64_t first = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t count = rows / blocks + (block < rows % blocks);
    switch (count) {
      case 1:
        function(Constant<1>{}, first);
        break;
      case 2:
        function(Constant<2>{}, first);
        break;
      case 3:
        function(Constant<3>{}, first);
        break;
      case 4:
        function(Constant<4>{}, first);
        break;
      case 5:
        function(Constant<5>{}, first);
        break;
      default:
        function(Constant<6>{}, first);
        break;
    }
    first += count;
  }
}

// Calls function(Constant<vectors>, first_column) over panels of `columns` columns; a last panel
// that needs one vector only is given as such.
template <class Function>
[[gnu::always_inline]] inline void for_panels(int64_t columns, Function&& function) {
  for (int64_t first = 0; first < columns; first += kPanel) {
    if (columns - first <= kWidth) {
      function(Constant<1>{}, first);
    } else {
      function(Constant<kVectors>{}, first);
    }
  }
}

template <class Kind>
inline void gemm_on_vectors(int64_t rows, int64_t columns, int64_t depth, Strided a, const float* b,
                            int64_t panel_stride, int64_t depth_stride, float* c, int64_t c_stride,
                            bool accumulate, const float* bias) {
  const int64_t pieces = larger(divide_up(depth, kDepth), 1);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = depth * piece / pieces;
    const int64_t count = depth * (piece + 1) / pieces - first;
    const bool reads_c = accumulate || piece > 0;
    for_panels(columns, [&](auto vectors, int64_t column) __attribute__((always_inline)) {
      constexpr int kBlockVectors = decltype(vectors)::value;
      const float* panel = b + column / kPanel * panel_stride + first * depth_stride;
      Ahead ahead = after_piece(panel, count, panel_stride / kPanel, column + kPanel >= columns);
      for_row_blocks(rows, [&](auto block_rows, int64_t row) __attribute__((always_inline)) {
        constexpr int kBlockRows = decltype(block_rows)::value;
        float* block = c + row * c_stride + column;
        typename Kind::Sum sums[kBlockRows][kBlockVectors] = {};
        if (reads_c || bias) {
          const float* start = reads_c ? block : bias + column;
          const int64_t start_stride = reads_c ? c_stride : 0;
          unroll<kBlockRows * kBlockVectors>([&](auto i) __attribute__((always_inline)) {
            constexpr int r = i / kBlockVectors;
            constexpr int v = i % kBlockVectors;
            sums[r][v] = load_as<typename Kind::Sum>(start + r * start_stride + v * kWidth);
          });
        }
        const Strided rows_of_a = {a.data + row * a.row_stride + first * a.depth_stride,
                                   a.row_stride, a.depth_stride};
        multiply<Kind, kBlockRows, kBlockVectors>(rows_of_a, panel, depth_stride, count, sums,
                                                  ahead);
        unroll<kBlockRows * kBlockVectors>([&](auto i) __attribute__((always_inline)) {
          constexpr int r = i / kBlockVectors;
          constexpr int v = i % kBlockVectors;
          store(block + r * c_stride + v * kWidth, sums[r][v]);
        });
      });
    });
  }
}

#if defined(__AMX_TILE__)

// Tiles of A and B take the same room of the L1 cache: at this depth they and C share 48 KB.
constexpr int64_t kDepthOnTiles = 192;

// Memory ahead for products on tiles: each step asks for so many lines that a panel is there when
// all blocks of rows have used the one before.
struct TilesAhead {
  Ahead ahead;
  int64_t lines;

  TilesAhead(Ahead ahead, TileDepth depth, int64_t rows)
      : ahead(ahead),
        lines(divide_up(depth.words * kPanel, kLineWords * divide_up(rows, kTileBlock))) {}

  [[gnu::always_inline]] void operator()() {
    for (int64_t i = 0; i < lines && ahead.next < ahead.end; ++i) {
      __builtin_prefetch(ahead.next, 0, kIntoL2);
      ahead.next += kLineWords;
    }
  }
};

// copy[row][k] = the words of a transposed matrix, for whole vectors of rows and k.
inline void transpose_words(Strided a, int64_t rows, int64_t depth, Matrix<float> copy) {
  for (int64_t row = 0; row < rows; row += kWidth) {
    for (int64_t k = 0; k < depth; k += kWidth) {
      Vec words[kWidth];
      unroll<kWidth>([&](auto i) __attribute__((always_inline)) {
        words[i] = k + i < depth ? load(a.data + row + (k + i) * a.depth_stride) : Vec{};
      });
      transpose(words);
      unroll<kWidth>([&](auto i) __attribute__((always_inline)) {
        store(copy.at(row + i, k).data, words[i]);
      });
    }
  }
}

// The part of `gemm` on tiles: of a depth of at most kDepthOnTiles, without the words that are left
// over.
template <class Kind>
inline void gemm_on_tiles(int64_t rows, int64_t columns, TileDepth depth, Strided a, const float* b,
                          int64_t panel_stride, int64_t depth_stride, Matrix<const float> start,
                          Matrix<float> c) {
  if (rows == 0) return;
  TileRegisters registers;
  registers.configure(rows, depth);
  const auto multiply = [&](auto tiles, Matrix<const float> block, int64_t row, int64_t count,
                            int64_t column, auto&& ahead) __attribute__((always_inline)) {
    multiply_tiles<Kind, decltype(tiles)::value>(
        count, columns - column, block, {b + column / kPanel * panel_stride, depth_stride}, depth,
        start.data ? start.at(row, column) : start, c.at(row, column), ahead);
  };
  if (a.depth_stride == 1) {
    for (int64_t column = 0; column < columns; column += kPanel) {
      const float* panel = b + column / kPanel * panel_stride;
      TilesAhead ahead(
          after_piece(panel, depth.covered(), panel_stride / kPanel, column + kPanel >= columns),
          depth, rows);
      for_tile_rows(
          rows, [&](auto tiles, int64_t row, int64_t count) __attribute__((always_inline)) {
            multiply(tiles, {a.data + row * a.row_stride, a.row_stride}, row, count, column, ahead);
          });
    }
    return;
  }
  // A power of two would map the rows of the copy to few sets of a cache.
  constexpr int64_t kPitch = kDepthOnTiles + 16;
  alignas(64) float memory[kTileBlock * kPitch];
  const Matrix<float> copy = {memory, kPitch};
  for_tile_rows(rows, [&](auto tiles, int64_t row, int64_t count) __attribute__((always_inline)) {
    transpose_words({a.data + row, 1, a.depth_stride}, count, depth.covered(), copy);
    for (int64_t column = 0; column < columns; column += kPanel) {
      multiply(tiles, {memory, kPitch}, row, count, column, [] {});
    }
  });
}

// sums[row][vector] = those of a panel in memory.
template <class Sum, int rows>
[[gnu::always_inline]] inline void load_sums(const float* panel, Sum (&sums)[rows][kVectors]) {
  unroll<rows * kVectors>([&](auto i) __attribute__((always_inline)) {
    sums[i / kVectors][i % kVectors] =
        load_as<Sum>(panel + i / kVectors * kPanel + i % kVectors * kWidth);
  });
}

// Calls finish(column, row, sums[rows][kVectors]) for blocks of rows of start + A B, where A is
// [rows][words] and B has panels for `columns` columns, one behind the other; start: a row of sums,
// or null for zeros. Sums take their way through memory that stays in L1.
template <class Kind, class Finish>
[[gnu::always_inline]] inline void finished_on_tiles(int64_t rows, int64_t columns, int64_t words,
                                                     const float* a, const float* panels,
                                                     const float* start, Finish&& finish) {
  if (rows == 0) return;  // tiles cannot be configured for none
  const TileDepth depth(words);
  TileRegisters registers;
  registers.configure(rows, depth);
  alignas(64) float memory[kTileBlock * kPanel];
  for (int64_t column = 0; column < columns; column += kPanel) {
    const float* panel = panels + column * words;
    const float* start_of_panel = start ? start + column : nullptr;
    TilesAhead ahead(after_piece(panel, words, words, true), depth, rows);
    for_tile_rows(
        rows, [&](auto tiles, int64_t first, int64_t count) __attribute__((always_inline)) {
          const float* block = a + first * words;
          multiply_tiles<Kind, decltype(tiles)::value, kVectors>(
              count, {block, words}, {panel, kPanel}, depth, {start_of_panel, 0}, {memory, kPanel},
              ahead);
          for_row_blocks(count, [&](auto block_rows, int64_t row) __attribute__((always_inline)) {
            constexpr int kCount = decltype(block_rows)::value;
            typename Kind::Sum sums[kCount][kVectors];
            load_sums(memory + row * kPanel, sums);
            const int64_t done = depth.covered();
            if (done < words) {
              Ahead nothing = {};
              multiply<Kind, kCount, kVectors>({block + row * words + done, words, 1},
                                               panel + done * kPanel, kPanel, words - done, sums,
                                               nothing);
            }
            finish(column, first + row, sums);
          });
        });
  }
}

#endif

// C[rows x columns] (+)= A B. C is read only if `accumulate`, and written, with its columns rounded
// up to a vector, to c[row * c_stride + column]. panel_stride: words from one panel of B to the
// next; depth_stride: from one step of depth to the next in a panel. bias: where C is not read,
// each row starts from it, if it is not null; as many sums as columns are written.
template <class Kind = FloatProduct>
inline void gemm(int64_t rows, int64_t columns, int64_t depth, Strided a, const float* b,
                 int64_t panel_stride, int64_t depth_stride, float* c, int64_t c_stride,
                 bool accumulate, const float* bias = nullptr) {
#if defined(__AMX_TILE__)
  if constexpr (kOnTiles<Kind>) {
    const int64_t pieces = divide_up(depth, kDepthOnTiles);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first = depth * piece / pieces;
      const TileDepth steps(depth * (piece + 1) / pieces - first);
      const Matrix<float> sums = {c, c_stride};
      const bool reads_c = accumulate || piece > 0;
      const Matrix<const float> start = {reads_c ? c : bias, reads_c ? c_stride : 0};
      gemm_on_tiles<Kind>(rows, columns, steps, from_depth(a, first), b + first * depth_stride,
                          panel_stride, depth_stride, start, sums);
      const int64_t end = first + steps.covered();
      const int64_t left = depth * (piece + 1) / pieces - end;
      if (left > 0) {
        gemm_on_vectors<Kind>(rows, columns, left, from_depth(a, end), b + end * depth_stride,
                              panel_stride, depth_stride, c, c_stride, true, nullptr);
      }
    }
    if (pieces > 0) return;
  }
#endif
  gemm_on_vectors<Kind>(rows, columns, depth, a, b, panel_stride, depth_stride, c, c_stride,
                        accumulate, bias);
}

// destination[words of the depth][kPanel] = source[column][depth]^T, columns beyond `columns` zero,
// element (column, k) times column_scale[column] * depth_scale[k]; either scale may be null.
// Without both words of a float are moved as they are, whatever they hold.
template <class Kind = FloatProduct>
inline void pack_panel(const float* source, int64_t source_stride, int64_t columns, int64_t depth,
                       const float* column_scale, const float* depth_scale, float* destination) {
  constexpr int kPerWord = Kind::kPerWord;
  for (int64_t first = 0; first < kPanel; first += kWidth) {
    const int64_t valid = columns - first;
    int64_t k = 0;
    if (valid >= kWidth) {
      for (; k + kWidth <= depth; k += kWidth) {
        Vec tile[kWidth];
        unroll<kWidth>([&](auto i) __attribute__((always_inline)) {
          tile[i] = load(source + (first + i) * source_stride + k);
        });
        transpose(tile);
        if (column_scale || depth_scale) {
          const Vec scale = column_scale ? load(column_scale + first) : broadcast(1.0f);
          unroll<kWidth>([&](auto i) __attribute__((always_inline)) {
            tile[i] *= depth_scale ? scale * depth_scale[k + i] : scale;
          });
        }
        unroll<kWidth / kPerWord>([&](auto word) __attribute__((always_inline)) {
          Vec rows[kPerWord];
          unroll<kPerWord>(
              [&](auto i) __attribute__((always_inline)) { rows[i] = tile[word * kPerWord + i]; });
          store(destination + (k / kPerWord + word) * kPanel + first, Kind::word_of(rows));
        });
      }
    }
    for (; k < depth; k += kPerWord) {
      float values[kPerWord][kWidth] = {};
      for (int64_t i = 0; i < smaller(valid, kWidth); ++i) {
        for (int64_t j = 0; j < smaller(kPerWord, depth - k); ++j) {
          float value = source[(first + i) * source_stride + k + j];
          if (column_scale) value *= column_scale[first + i];
          if (depth_scale) value *= depth_scale[k + j];
          values[j][i] = value;
        }
      }
      Vec rows[kPerWord];
      unroll<kPerWord>([&](auto i) __attribute__((always_inline)) { rows[i] = load(values[i]); });
      store(destination + k / kPerWord * kPanel + first, Kind::word_of(rows));
    }
  }
}

// Panels of source[columns][depth]^T one after the other:
// [columns/kPanel][words of the depth][kPanel].
template <class Kind = FloatProduct>
inline void pack(const float* source, int64_t source_stride, int64_t columns, int64_t depth,
                 const float* column_scale, const float* depth_scale, float* destination) {
  for (int64_t first = 0; first < columns; first += kPanel) {
    // Short pieces of far rows are what the hardware does not prefetch.
    constexpr int64_t kLine = 16;
    const int64_t next = smaller(columns, first + 2 * kPanel);
    for (int64_t column = first + kPanel; column < next && depth <= 8 * kLine; ++column) {
      for (int64_t k = 0; k < depth; k += kLine) {
        __builtin_prefetch(source + column * source_stride + k);
      }
    }
    pack_panel<Kind>(source + first * source_stride, source_stride, columns - first, depth,
                     column_scale ? column_scale + first : nullptr, depth_scale, destination);
    destination += words_of<Kind>(depth) * kPanel;
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
