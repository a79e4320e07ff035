#pragma once

// Products on the CPU's matrix unit (AMX): one instruction adds to a tile of C, 16 x 16 sums, the
// product of a tile of A and one of B, 16 words deep (product.h): 16 cycles, in which vectors make
// a sixteenth of these products. Tiles are loaded from matrices as they lie in memory, A
// [rows][words] and B [words][columns], which is what the panels of gemm.h hold.
//
// A block of C has 32 x 32 sums, hence four tiles, to which each step of depth adds the products of
// two tiles of A and two of B: 4 loads of 1 KiB for 4 products. A tile takes the same time however
// little of it is used, and configuring tiles takes as long as eight products. So all tiles of a
// product have one shape: their depth divides that of the matrices, and where rows do not fill the
// two tiles of a block these overlap, with the same sums in both.

#include "cpu/isa/product.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// Whether products of a kind run on tiles.
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
template <class Kind>
constexpr bool kOnTiles = !__is_same(Kind, FloatProduct);
#else
template <class Kind>
constexpr bool kOnTiles = false;
#endif

#if defined(__AMX_TILE__)

constexpr int64_t kTile = 16;  // rows and columns of C, and words of depth, that tiles have at most
constexpr int64_t kTileBlock = 2 * kTile;

// The tile registers of a block: C's by row and column of tiles, A's by row, B's by column.
constexpr int tile_of_c(int row, int column) { return row * 2 + column; }
constexpr int tile_of_a(int row) { return 4 + row; }
constexpr int tile_of_b(int column) { return 6 + column; }

// The depth of a product as steps of as many words each, of which there are as few as can be. A few
// words may be left over, but none of the channels of MOATs.
struct TileDepth {
  int64_t steps, words;

  explicit TileDepth(int64_t depth)
      : steps(divide_up(depth, kTile)), words(steps > 0 ? depth / steps : 0) {}
  int64_t covered() const { return steps * words; }
};

// Rows and words of a tile of A. Tiles of C have as many rows, those of B as many as words.
struct TileShape {
  int64_t rows, words;

  bool operator==(const TileShape& other) const {
    return rows == other.rows && words == other.words;
  }
};

// As the instruction that configures tiles reads it.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileConfiguration(TileShape shape) {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = kTile * sizeof(float);
      rows[i] = static_cast<uint8_t>(shape.rows);
    }
    for (int i = 0; i < 2; ++i) {
      row_bytes[tile_of_a(i)] = static_cast<uint16_t>(shape.words * sizeof(float));
      rows[tile_of_b(i)] = static_cast<uint8_t>(shape.words);
    }
  }
};

// Has the tile registers of this thread as long as the first of several lives. They are released
// after it, so that the kernel need not save them when threads change.
class TileRegisters {
 public:
  TileRegisters() { ++state.holders; }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() {
    if (--state.holders > 0) return;
    state.shape = {};
    release_tiles();
  }

  // For products of `rows` rows.
  void configure(int64_t rows, TileDepth depth) {
    const TileShape shape = {smaller(rows, kTile), depth.words};
    if (state.shape == shape) return;
    state.shape = shape;
    const TileConfiguration configuration(shape);
    configure_tiles(&configuration);
  }

 private:
  struct State {
    int holders;
    TileShape shape;
  };
  inline static thread_local State state = {};
};

// Calls function(Constant<tiles>, first_row, rows) over blocks of a tile of rows or two; those of
// two have more than kTile rows, of which some may be in both.
template <class Function>
[[gnu::always_inline]] inline void for_tile_rows(int64_t rows, Function&& function) {
  int64_t row = 0;
  if (divide_up(rows, kTile) % 2 == 1) {
    row = smaller(rows, kTile);
    function(Constant<1>{}, 0, row);
  }
  while (row < rows) {
    const int64_t count = smaller(rows - row, kTileBlock);
    function(Constant<2>{}, row, count);
    row += count;
  }
}

// A matrix by its rows, `stride` words apart. The same row again and again if that is zero.
template <class Float>
struct Matrix {
  Float* data;
  int64_t stride;

  Matrix at(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

// C = start + A B for a block of `rows` rows in `tiles` tiles and `columns` columns of tiles; start
// may be null for zeros. step(): called at every step of depth.
template <class Kind, int tiles, int columns, class Step>
[[gnu::always_inline]] inline void multiply_tiles(int64_t rows, Matrix<const float> a,
                                                  Matrix<const float> b, TileDepth depth,
                                                  Matrix<const float> start, Matrix<float> c,
                                                  Step&& step) {
  const int64_t second = tiles > 1 ? rows - kTile : 0;  // row of the second tile
  unroll<tiles * columns>([&](auto i) __attribute__((always_inline)) {
    constexpr int r = i / columns;
    constexpr int v = i % columns;
    if (start.data) {
      load_tile<tile_of_c(r, v)>(start.at(r * second, v * kTile).data, start.stride);
    } else {
      clear_tile<tile_of_c(r, v)>();
    }
  });
  for (int64_t k = 0; k < depth.covered(); k += depth.words) {
    unroll<columns>([&](auto v) __attribute__((always_inline)) {
      load_tile<tile_of_b(v)>(b.at(k, v * kTile).data, b.stride);
    });
    unroll<tiles>([&](auto r) __attribute__((always_inline)) {
      load_tile<tile_of_a(r)>(a.at(r * second, k).data, a.stride);
      unroll<columns>([&](auto v) __attribute__((always_inline)) {
        Kind::template multiply_add_tiles<tile_of_c(r, v), tile_of_a(r), tile_of_b(v)>();
      });
    });
    step();
  }
  unroll<tiles * columns>([&](auto i) __attribute__((always_inline)) {
    constexpr int r = i / columns;
    constexpr int v = i % columns;
    store_tile<tile_of_c(r, v)>(c.at(r * second, v * kTile).data, c.stride);
  });
}

// The same for at most two columns of tiles.
template <class Kind, int tiles, class Step>
[[gnu::always_inline]] inline void multiply_tiles(int64_t rows, int64_t columns,
                                                  Matrix<const float> a, Matrix<const float> b,
                                                  TileDepth depth, Matrix<const float> start,
                                                  Matrix<float> c, Step&& step) {
  if (columns > kTile) {
    multiply_tiles<Kind, tiles, 2>(rows, a, b, depth, start, c, step);
  } else {
    multiply_tiles<Kind, tiles, 1>(rows, a, b, depth, start, c, step);
  }
}

#endif

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
