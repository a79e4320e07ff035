#pragma once

// What the two directions of window attention share: where the tokens of a window lie, their rows
// in and out of the map, the bias of a query over all keys, and base-2 exponentials.

#include "cpu/gemm.h"
#include "cpu/kernels/window_attention.h"
#include "cpu/simd.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// 2^x for x <= 128, relative error 1.5e-7; 0 from -127 down, NaN for NaN.
[[gnu::always_inline]] inline Vec exponential2(Vec x) {
  // The minimax fit of degree 5 to 2^r on [-1/2, 1/2] that is 1 at 0.
  constexpr float kSeries[5] = {0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f,
                                0.00132647273f};
  // Adding it rounds to an integer and leaves that, with the exponent's bias, in the low bits.
  constexpr float kRounder = 12582912.0f + 127.0f;
  const Vec clamped = maximum(broadcast(-127.0f), x);
  const Vec shifted = clamped + kRounder;
  const Vec r = clamped - (shifted - kRounder);
  Vec p = fma(broadcast(kSeries[4]), r, broadcast(kSeries[3]));
  p = fma(p, r, broadcast(kSeries[2]));
  p = fma(p, r, broadcast(kSeries[1]));
  p = fma(p, r, broadcast(kSeries[0]));
  p = fma(p, r, broadcast(1.0f));
  return p * vec_of(bits_of(shifted) << 23);
}

// log2(x) of normal x > 0, absolute error 1e-7 near 1; NaN for NaN.
[[gnu::always_inline]] inline Vec logarithm2(Vec x) {
  constexpr uint32_t kRootHalf = 0x3f3504f3u;
  // x = m 2^n with m in [sqrt(1/2), sqrt(2)).
  const BitsVec above = bits_of(x) - kRootHalf;
  const Vec n = __builtin_convertvector((IntVec)above >> 23, Vec);
  const Vec m = vec_of((above & 0x7fffffu) + kRootHalf);
  // log2(m) = 2 / ln 2 * atanh((m - 1) / (m + 1)).
  const Vec f = (m - 1.0f) / (m + 1.0f);
  const Vec f2 = f * f;
  Vec series = fma(f2, broadcast(1.0f / 9.0f), broadcast(1.0f / 7.0f));
  series = fma(series, f2, broadcast(1.0f / 5.0f));
  series = fma(series, f2, broadcast(1.0f / 3.0f));
  series = fma(series, f2, broadcast(1.0f));
  return fma(series * f, broadcast(2.0f * kLog2E), n) + (x - x);
}

// sums += A B for a block of rows and one panel of B, like `multiply`. Depths here are short (32 at
// MOAT's heads) and the callers large: GCC keeps all sums in registers only in a loop this small.
template <int rows, int vectors>
[[gnu::always_inline]] inline void multiply_short(const float* a, int64_t row_stride,
                                                  const float* b, int64_t b_stride, int64_t depth,
                                                  Vec (&sums)[rows][vectors]) {
  const float* a3 = a + 3 * row_stride;
  for (; depth > 0; --depth) {
    multiply_step<rows, vectors>(a, a3, row_stride, b, sums);
    ++a;
    ++a3;
    b += b_stride;
    asm volatile("" : "+r"(a), "+r"(a3), "+r"(b));
  }
}

template <int... i>
[[gnu::always_inline]] inline IntVec lane_numbers(std::integer_sequence<int, i...>) {
  return IntVec{i...};
}

// values[i] in the first `count` lanes, `other` in the rest.
[[gnu::always_inline]] inline Vec keep_lanes(Vec values, int64_t count, float other) {
  const IntVec lanes = lane_numbers(std::make_integer_sequence<int, kWidth>{});
  return lanes < static_cast<int32_t>(count) ? values : broadcast(other);
}

// The real tokens of a window form a rectangle: token (i, j) is the map's pixel
// (first_row + i * row_step, first_column + j * column_step).
struct Window {
  int64_t image;
  int64_t rows;
  int64_t columns;
  int64_t first_row;
  int64_t first_column;
  int64_t row_step;
  int64_t column_step;

  int64_t tokens() const { return rows * columns; }
};

// Windows are counted through a batch in row-major order, images in turn.
inline Window window_at(const WindowAttention& problem, int64_t index) {
  Window window;
  const int64_t column = index % problem.window_columns;
  const int64_t row = index / problem.window_columns % problem.window_rows;
  window.image = index / (problem.window_columns * problem.window_rows);
  window.row_step = problem.grid ? problem.window_rows : 1;
  window.column_step = problem.grid ? problem.window_columns : 1;
  window.first_row = problem.grid ? row : row * problem.window_height;
  window.first_column = problem.grid ? column : column * problem.window_width;
  window.rows =
      smaller(problem.window_height, divide_up(problem.height - window.first_row, window.row_step));
  window.columns = smaller(problem.window_width,
                           divide_up(problem.width - window.first_column, window.column_step));
  return window;
}

// Where a chunk starts.
inline int64_t first_window(const WindowAttention& problem, int64_t chunk) {
  const int64_t windows = problem.batch * problem.window_rows * problem.window_columns;
  return windows * chunk / problem.chunks;
}

// At most this many tokens lie in a window, and this many in its row.
inline int64_t most_rows(const WindowAttention& problem) {
  return smaller(problem.window_height, problem.height);
}
inline int64_t most_columns(const WindowAttention& problem) {
  return smaller(problem.window_width, problem.width);
}
inline int64_t most_tokens(const WindowAttention& problem) {
  return most_rows(problem) * most_columns(problem);
}

// Calls function(token, row, column) for tokens begin to end of a window: (row, column) is the
// token's pixel.
template <class Function>
[[gnu::always_inline]] inline void for_tokens(const Window& window, int64_t begin, int64_t end,
                                              Function&& function) {
  int64_t i = begin / window.columns;
  int64_t j = begin % window.columns;
  for (int64_t token = begin; token < end; ++token) {
    function(token, window.first_row + i * window.row_step,
             window.first_column + j * window.column_step);
    if (++j == window.columns) {
      j = 0;
      ++i;
    }
  }
}

// Elements from the start of a map to a pixel.
inline int64_t pixel_offset(const AttentionMap& map, int64_t image, int64_t row, int64_t column) {
  return image * map.batch_stride + row * map.row_stride + column * map.column_stride;
}

// Which channels of a map belong to a head, as tokens x head_dim matrices in scratch memory, of
// row_length() floats a row: head_dim rounded up to vectors, the rest zeros.
struct HeadRows {
  const WindowAttention& problem;
  const Window& window;

  int64_t row_length() const { return round_up(problem.head_dim, kWidth); }

  // destination[token - begin] = factor * channels `channel` ... of the map.
  void read(const AttentionMap& map, int64_t channel, int64_t begin, int64_t end, float factor,
            float* destination) const {
    // Stores wait for their cache lines one after the other unless these were asked for: rows
    // ahead.
    constexpr int64_t kAhead = 8;
    with_elements(problem.element, static_cast<const void*>(map.data), [&](auto* elements) {
      const int64_t length = row_length();
      for_tokens(window, begin, end, [&](int64_t, int64_t row, int64_t column) {
        auto* source = elements + pixel_offset(map, window.image, row, column) + channel;
        prefetch_row<true>(destination + kAhead * length, length * sizeof(float));
        if (length == problem.head_dim) {
          for (int64_t i = 0; i < length; i += kWidth) {
            store(destination + i, load(source + i) * factor);
          }
        } else {
          store(destination + length - kWidth, Vec{});
          widen(source, problem.head_dim, destination);
          for (int64_t i = 0; i < length; i += kWidth) {
            store(destination + i, load(destination + i) * factor);
          }
        }
        destination += length;
      });
    });
  }

  // The inverse of `read`, rounding; the source is destroyed.
  void write(const AttentionMap& map, int64_t channel, int64_t begin, int64_t end, float factor,
             float* source) const {
    with_elements(problem.element, static_cast<void*>(map.data), [&](auto* elements) {
      const int64_t length = row_length();
      for_tokens(window, begin, end, [&](int64_t, int64_t row, int64_t column) {
        auto* destination = elements + pixel_offset(map, window.image, row, column) + channel;
        if (length == problem.head_dim) {
          for (int64_t i = 0; i < length; i += kWidth) {
            store(destination + i, load(source + i) * factor);
          }
        } else {
          for (int64_t i = 0; i < length; i += kWidth) {
            store(source + i, load(source + i) * factor);
          }
          narrow(source, problem.head_dim, destination);
        }
        source += length;
      });
    });
  }

  // Asks for what `read`, or `write`, will touch.
  template <bool for_write>
  void prefetch(const AttentionMap& map, int64_t channel, int64_t begin, int64_t end) const {
    const int64_t element_size = problem.element == ElementType::float32 ? 4 : 2;
    for_tokens(window, begin, end, [&](int64_t, int64_t row, int64_t column) {
      const int64_t offset = pixel_offset(map, window.image, row, column) + channel;
      prefetch_row<for_write>(map.data + offset * element_size, problem.head_dim * element_size);
    });
  }

 private:
  template <bool for_write>
  [[gnu::always_inline]] static void prefetch_row(const void* start, int64_t bytes) {
    constexpr int64_t kLine = 64;
    for (int64_t byte = 0; byte < bytes; byte += kLine) {
      __builtin_prefetch(static_cast<const char*>(start) + byte, for_write);
    }
  }
};

// Bias without a tokens x tokens tensor. For queries in column j of a window, strip j holds the
// bias by key row - query row (2 * rows - 1 of them) and key column: the bias of query (i, j) on
// all keys is then one run of rows * columns floats. A table row's slice for one j is contiguous,
// too.
struct BiasStrips {
  int64_t rows = 0;
  int64_t columns = 0;

  BiasStrips() = default;
  explicit BiasStrips(const Window& window) : rows(window.rows), columns(window.columns) {}

  bool fit(const Window& window) const { return rows == window.rows && columns == window.columns; }

  // Floats of all strips, with room to read or add whole vectors beyond the last run.
  int64_t size() const { return columns * (2 * rows - 1) * columns + kPanel; }

  // Where the run of a query starts.
  int64_t run(int64_t query) const {
    const int64_t i = query / columns;
    const int64_t j = query % columns;
    return (j * (2 * rows - 1) + rows - 1 - i) * columns;
  }

  // Calls function(strip_offset, table_offset) for every slice of `columns` floats.
  template <class Function>
  [[gnu::always_inline]] void for_slices(const WindowAttention& problem,
                                         Function&& function) const {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t row = 0; row < 2 * rows - 1; ++row) {
        const int64_t table_row = problem.window_height - rows + row;
        function((j * (2 * rows - 1) + row) * columns,
                 table_row * (2 * problem.window_width - 1) + problem.window_width - 1 - j);
      }
    }
  }

  // The strips of one head's table, times log2(e).
  void expand(const WindowAttention& problem, const float* table, float* strips) const {
    for_slices(problem, [&](int64_t strip, int64_t slice) {
      for (int64_t i = 0; i < columns; ++i) strips[strip + i] = table[slice + i] * kLog2E;
    });
  }

  // Adds the gradient of the strips to that of the table.
  void fold(const WindowAttention& problem, const float* strips, float* table) const {
    for_slices(problem, [&](int64_t strip, int64_t slice) {
      for (int64_t i = 0; i < columns; ++i) table[slice + i] += strips[strip + i];
    });
  }
};

inline int64_t table_size(const WindowAttention& problem) {
  return (2 * problem.window_height - 1) * (2 * problem.window_width - 1);
}

inline BiasStrips largest_strips(const WindowAttention& problem) {
  BiasStrips strips;
  strips.rows = most_rows(problem);
  strips.columns = most_columns(problem);
  return strips;
}

// Hands out consecutive parts of scratch memory, each aligned to 64 bytes as the whole is; from a
// null pointer it only counts.
struct Scratch {
  float* data;
  int64_t used = 0;

  float* take(int64_t count) {
    float* part = data ? data + used : nullptr;
    used += round_up(count, 16);
    return part;
  }
};

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
