#pragma once

// What the two directions of window attention share: where the tokens of a window lie, their rows
// in and out of the map, the bias of a query over all keys, and base-2 exponentials.

#include "cpu/common/window_attention_kernels.h"
#include "cpu/isa/gemm.h"
#include "cpu/isa/simd.h"

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

#if defined(__AVX512F__)
// 2^x for x < 128, relative error 9e-5, which is a twentieth of bfloat16's own rounding; 0 below
// -126, NaN for NaN.
[[gnu::always_inline]] inline Vec rounded_exponential2(Vec x) {
  // The minimax fit of degree 3 to 2^r on [0, 1) that is 1 at 0.
  constexpr float kSeries[3] = {0.69511676f, 0.22764501f, 0.07706702f};
  const Vec r = fraction(x);
  Vec p = fma(broadcast(kSeries[2]), r, broadcast(kSeries[1]));
  p = fma(p, r, broadcast(kSeries[0]));
  p = fma(p, r, broadcast(1.0f));
  return times_power_of_2(p, x, -126.0f);
}
#endif

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

// Heads of this size, MOAT's, have loops of constant lengths and strides: `with_head_dim`.
constexpr int64_t kUsualHeadDim = 32;

// Calls function(head_dim), a Constant if it is the usual one.
template <class Function>
inline void with_head_dim(int64_t head_dim, Function&& function) {
  if (head_dim == kUsualHeadDim) {
    function(Constant<kUsualHeadDim>{});
  } else {
    function(head_dim);
  }
}

// Steps of depth per iteration of a product's loop: code for unusual sizes is kept short.
template <class HeadDim>
constexpr int kSteps = 4;
template <>
inline constexpr int kSteps<int64_t> = 1;

// Calls function(Constant<vectors>, first_column) over panels of a head's columns.
template <class HeadDim, class Function>
[[gnu::always_inline]] inline void for_columns(HeadDim head_dim, Function&& function) {
  if constexpr (kSteps<HeadDim> > 1 && kUsualHeadDim % kPanel == 0) {
    for (int64_t first = 0; first < head_dim; first += kPanel) {
      function(Constant<kVectors>{}, first);
    }
  } else {
    for_panels(head_dim, function);
  }
}

// The same over panels of keys, whose memory is padded to whole ones.
template <class HeadDim, class Function>
[[gnu::always_inline]] inline void for_keys(HeadDim, int64_t keys, Function&& function) {
  if constexpr (kSteps<HeadDim> > 1) {
    for_panels(keys, function);
  } else {
    for (int64_t first = 0; first < keys; first += kPanel) {
      function(Constant<kVectors>{}, first);
    }
  }
}

// sums += A B for a tile of rows and vectors of columns, some steps of depth per iteration:
// A[i, k] is a[i * row_stride + k], row k of B starts at b + k * b_stride; in words.
template <class Kind, int steps, int rows, int vectors>
[[gnu::always_inline]] inline void multiply_rows(const float* a, int64_t row_stride, const float* b,
                                                 int64_t b_stride, int64_t depth,
                                                 Vec (&sums)[rows][vectors]) {
  const float* a3 = a + 3 * row_stride;
  const auto advance = [&](int64_t count) __attribute__((always_inline)) {
    a += count;
    a3 += count;
    b += count * b_stride;
    // Two pointers and multiples of one stride address all rows; GCC would keep one for each.
    asm volatile("" : "+r"(a), "+r"(a3), "+r"(b));
  };
  for (int64_t k = depth / steps; k > 0; --k) {
    unroll<steps>([&](auto step) __attribute__((always_inline)) {
      multiply_step<Kind, rows, vectors>(a + step, a3 + step, row_stride, b + step * b_stride,
                                         sums);
    });
    advance(steps);
  }
  for (int64_t k = depth % steps; k > 0; --k) {
    multiply_step<Kind, rows, vectors>(a, a3, row_stride, b, sums);
    advance(1);
  }
}

// The same with A transposed: A[i, k] is a[i + k * depth_stride].
template <class Kind, int steps, int rows, int vectors>
[[gnu::always_inline]] inline void multiply_columns(const float* a, int64_t depth_stride,
                                                    const float* b, int64_t b_stride, int64_t depth,
                                                    Vec (&sums)[rows][vectors]) {
  const auto advance = [&](int64_t count) __attribute__((always_inline)) {
    a += count * depth_stride;
    b += count * b_stride;
    asm volatile("" : "+r"(a), "+r"(b));
  };
  for (int64_t k = depth / steps; k > 0; --k) {
    unroll<steps>([&](auto step) __attribute__((always_inline)) {
      const float* column = a + step * depth_stride;
      multiply_step<Kind, rows, vectors>(column, column + 3, 1, b + step * b_stride, sums);
    });
    advance(steps);
  }
  for (int64_t k = depth % steps; k > 0; --k) {
    multiply_step<Kind, rows, vectors>(a, a + 3, 1, b, sums);
    advance(1);
  }
}

// Rows cut into tiles of at most kRows, as even as possible; each begins with a multiple of `unit`,
// a divisor of kRows.
struct RowTiles {
  int64_t rows;
  int64_t unit = 1;

  int64_t count() const { return divide_up(rows, kRows); }
  int64_t start(int64_t tile) const {
    return smaller(divide_up(rows, unit) * tile / count() * unit, rows);
  }

  // Calls function(Constant<rows>, first_row) for tiles begin to end.
  template <class Function>
  [[gnu::always_inline]] void for_each(int64_t begin, int64_t end, Function&& function) const {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = start(tile);
      // One block, hence one call.
      for_row_blocks(start(tile + 1) - first,
                     [&](auto tile_rows, int64_t)
                         __attribute__((always_inline)) { function(tile_rows, first); });
    }
  }
};

// Calls function(Constant<count>, first_row) over four rows at a time, then over the rest one by
// one.
template <class Function>
[[gnu::always_inline]] inline void for_few_rows(int64_t rows, Function&& function) {
  constexpr int kFew = 4;
  int64_t row = 0;
  for (; row + kFew <= rows; row += kFew) function(Constant<kFew>{}, row);
  for (; row < rows; ++row) function(Constant<1>{}, row);
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

// Words of a row of one head, rounded up to vectors.
template <class Kind>
[[gnu::always_inline]] inline int64_t row_words(int64_t head_dim) {
  return round_up(words_of<Kind>(head_dim), kWidth);
}

// Words of depth of a head's products: of a row of queries and of keys, and of all tokens.
template <class Kind>
[[gnu::always_inline]] inline int64_t depth_words(int64_t count) {
  return round_up(words_of<Kind>(count), kDepthUnit<Kind>);
}

// What a map's elements are multiplied in.
inline Product product_of(const WindowAttention& problem) {
  return problem.element == ElementType::bfloat16 ? Product::bfloat16 : Product::float32;
}

// Matrices tokens x head_dim of some consecutive heads in scratch memory, one after the other:
// row_length floats a row (head_dim rounded up to vectors, the rest zeros), matrix_size a head.
template <class HeadDim>
struct HeadRows {
  const WindowAttention& problem;
  const Window& window;
  HeadDim head_dim;
  int64_t heads;
  int64_t matrix_size;

  [[gnu::always_inline]] int64_t row_length() const { return round_up(head_dim, kWidth); }

  // destination[head][token] = factor * channels `channel + head * head_stride` ... of the map's
  // tokens begin to end.
  void read(const AttentionMap& map, int64_t channel, int64_t head_stride, int64_t begin,
            int64_t end, float factor, float* destination) const {
    with_elements(problem.element, static_cast<const void*>(map.data), [&](auto* elements) {
      const int64_t length = row_length();
      for_tokens(window, begin, end, [&](int64_t token, int64_t row, int64_t column) {
        auto* source = elements + pixel_offset(map, window.image, row, column) + channel;
        float* to = destination + token * length;
        for (int64_t head = 0; head < heads; ++head) {
          if (length == head_dim) {
            for (int64_t i = 0; i < length; i += kWidth) {
              store(to + i, load(source + i) * factor);
            }
          } else {
            store(to + length - kWidth, Vec{});
            widen(source, head_dim, to);
            for (int64_t i = 0; i < length; i += kWidth) store(to + i, load(to + i) * factor);
          }
          source += head_stride;
          to += matrix_size;
        }
      });
    });
  }

  // The inverse of `read`, rounding, from words of a kind: row_words<Kind> a row.
  template <class Kind>
  void write(const AttentionMap& map, int64_t channel, int64_t head_stride, int64_t begin,
             int64_t end, float factor, const float* source) const {
    with_elements(problem.element, static_cast<void*>(map.data), [&](auto* elements) {
      for_tokens(window, begin, end, [&](int64_t token, int64_t row, int64_t column) {
        auto* destination = elements + pixel_offset(map, window.image, row, column) + channel;
        const float* words = source + token * row_words<Kind>(head_dim);
        for (int64_t head = 0; head < heads; ++head) {
          const auto* from = elements_of<Kind>(const_cast<float*>(words));
          int64_t i = 0;
          for (; i + kWidth <= head_dim; i += kWidth) {
            store(destination + i, load(from + i) * factor);
          }
          if (i < head_dim) {
            float rest[kWidth];
            store(rest, load(from + i) * factor);
            narrow(rest, head_dim - i, destination + i);
          }
          destination += head_stride;
          words += matrix_size;
        }
      });
    });
  }
};

// Rows first to last of a matrix become zeros.
inline void clear_rows(float* matrix, int64_t first, int64_t last, int64_t length) {
  for (int64_t i = first * length; i < last * length; i += kWidth) store(matrix + i, Vec{});
}

// Rows of one head [tokens][length] in floats become words of their own, or along the tokens:
// [tokens][row_words] and [depth_words of the tokens][length]. `words` may be where they are.
template <class Kind>
inline void rows_to_words(const float* rows, int64_t tokens, int64_t length, int64_t head_dim,
                          float* words) {
  if (Kind::kPerWord == 1 && rows == words) return;
  const int64_t row_length = row_words<Kind>(head_dim);
  for (int64_t token = 0; token < tokens; ++token) {
    auto* to = elements_of<Kind>(words + token * row_length);
    int64_t i = 0;
    for (; i < length; i += kWidth) store(to + i, load(rows + token * length + i));
    for (; i < row_length * Kind::kPerWord; i += kWidth) store(to + i, Vec{});
  }
}

template <class Kind>
inline void rows_to_token_words(const float* rows, int64_t tokens, int64_t length, float* words) {
  if (Kind::kPerWord == 1 && rows == words) return;
  for_words<Kind>(0, tokens, [&](int64_t token, auto count) __attribute__((always_inline)) {
    for (int64_t i = 0; i < length; i += kWidth) {
      Vec values[Kind::kPerWord] = {};
      unroll<count>([&](auto j) __attribute__((always_inline)) {
        values[j] = load(rows + (token + j) * length + i);
      });
      store(words + token / Kind::kPerWord * length + i, Kind::word_of(values));
    }
  });
  clear_rows(words, words_of<Kind>(tokens), depth_words<Kind>(tokens), length);
}

// Packs the rows of one head, the matrix's padding included, into panels of its transpose.
template <class Kind = FloatProduct>
inline void pack_rows(float* matrix, int64_t tokens, int64_t head_dim, float* packed) {
  const int64_t length = row_words<Kind>(head_dim);
  const int64_t padded = round_up(tokens, kPanel);
  clear_rows(matrix, tokens, padded, length);
  pack(matrix, length, padded, depth_words<Kind>(head_dim), nullptr, nullptr, packed);
}

inline int64_t table_size(const WindowAttention& problem) {
  return (2 * problem.window_height - 1) * (2 * problem.window_width - 1);
}

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

  // Where the run of each query starts.
  void list_runs(int32_t* runs) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        *runs++ = static_cast<int32_t>((j * (2 * rows - 1) + rows - 1 - i) * columns);
      }
    }
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
    const int64_t size = table_size(problem);
    for_slices(problem, [&](int64_t strip, int64_t slice) {
      for (int64_t i = 0; i < columns; i += kWidth) {
        // What lies behind a slice is overwritten by the next, or is room behind the strips.
        const float* from = table + slice + i;
        store(strips + strip + i, load_part(from, size - slice - i) * kLog2E);
      }
    });
  }

  // Adds the gradient of the strips to that of the table.
  void fold(const WindowAttention& problem, const float* strips, float* table) const {
    for_slices(problem, [&](int64_t strip, int64_t slice) {
      for (int64_t i = 0; i < columns; ++i) table[slice + i] += strips[strip + i];
    });
  }
};

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
