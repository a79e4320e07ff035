#pragma once

// Forward attention of one head in one window, whose operands lie in cache.

#include "cpu/isa/window_attention_tiles.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// A block of queries, in tiles: a panel of keys or values serves all of them from L1.
constexpr int64_t kBlockTiles = 4;

// kRows floats, rounded up to vectors.
constexpr int kRowLanes = (kRows + kWidth - 1) / kWidth * kWidth;

// Per vector of lanes, reduces every row's lanes: the result of row i is lane i.
template <int rows, class Function>
[[gnu::always_inline]] inline void reduce_rows(const Vec (&values)[rows], float* results,
                                               Function&& function) {
  constexpr int kGroups = (rows + kWidth - 1) / kWidth;
  unroll<kGroups>([&](auto group) __attribute__((always_inline)) {
    Vec tile[kWidth];
    unroll<kWidth>([&](auto i) __attribute__((always_inline)) {
      constexpr int row = group * kWidth + i;
      tile[i] = values[row < rows ? row : rows - 1];
    });
    transpose(tile);
    for (int step = kWidth / 2; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) tile[i] = function(tile[i], tile[i + step]);
    }
    store(results + group * kWidth, tile[0]);
  });
}

// One head of one window. Rows of queries are row_length words, the rest zeros; keys are packed by
// pack_rows; rows of values are words of kPerWord tokens in value_columns columns.
template <class HeadDim, class Kind = FloatProduct, class Writer = Rounded<float>>
struct HeadForward {
  HeadDim head_dim;
  int64_t tokens;
  const float* bias;    // In strips, or null.
  const int32_t* runs;  // Per query, where its bias starts in these.
  const float* queries;
  const float* keys;
  const float* values;
  float* scores;       // One block of queries.
  float* maxima;       // A vector per query of a block.
  float* log_sum_exp;  // Per query, or null.
  Writer output;       // May be the queries.
  int64_t output_stride;

  int64_t scores_stride() const { return round_up(tokens, kPanel); }
  [[gnu::always_inline]] int64_t row_length() const { return row_words<Kind>(head_dim); }
  [[gnu::always_inline]] int64_t value_columns() const { return round_up(head_dim, kWidth); }

  // scores = queries K^T + bias (in units of ln 2) for a panel of keys, and maxima per lane.
  template <int rows, int vectors>
  [[gnu::always_inline]] void score(int64_t query, int64_t row, int64_t key) const {
    Vec sums[rows][vectors];
    unroll<rows>([&](auto r) __attribute__((always_inline)) {
      unroll<vectors>([&](auto v) __attribute__((always_inline)) {
        sums[r][v] = bias ? load(bias + runs[query + r] + key + v * kWidth) : Vec{};
      });
    });
    const int64_t depth = words_of<Kind>(head_dim);
    multiply_rows<Kind, kSteps<HeadDim>, rows, vectors>(
        queries + query * row_length(), row_length(), keys + key * depth, kPanel, depth, sums);
    const bool whole = key + vectors * kWidth <= tokens;
    unroll<rows>([&](auto r) __attribute__((always_inline)) {
      float* maximum_so_far = maxima + (row + r) * kWidth;
      Vec largest = key == 0 ? broadcast(-__builtin_inff()) : load(maximum_so_far);
      unroll<vectors>([&](auto v) __attribute__((always_inline)) {
        if (!whole) {
          sums[r][v] = keep_lanes(sums[r][v], tokens - key - v * kWidth, -__builtin_inff());
        }
        largest = maximum(sums[r][v], largest);
        store(scores + (row + r) * scores_stride() + key + v * kWidth, sums[r][v]);
      });
      store(maximum_so_far, largest);
    });
  }

  // scores = 2^(scores - their largest) as the product with the values reads them; the sum of every
  // row, and its log_sum_exp.
  template <int rows>
  [[gnu::always_inline]] void exponentiate(int64_t query, int64_t row,
                                           float (&total)[kRowLanes]) const {
    Vec values_of_rows[rows];
    unroll<rows>([&](auto r) __attribute__((always_inline)) {
      values_of_rows[r] = load(maxima + (row + r) * kWidth);
    });
    float largest[kRowLanes];
    reduce_rows<rows>(values_of_rows, largest, [](Vec a, Vec b) { return maximum(a, b); });
    unroll<rows>([&](auto r) __attribute__((always_inline)) { values_of_rows[r] = Vec{}; });
    float* first = scores + row * scores_stride();
    for (int64_t key = 0; key < tokens; key += kWidth) {
      unroll<rows>([&](auto r) __attribute__((always_inline)) {
        float* scores_of_row = first + r * scores_stride();
        const Vec weights = exponential2(load(scores_of_row + key) - largest[r]);
        store(elements_of<Kind>(scores_of_row) + key, weights);
        values_of_rows[r] += weights;
      });
    }
    reduce_rows<rows>(values_of_rows, total, [](Vec a, Vec b) { return a + b; });
    if (!log_sum_exp) return;
    float logarithms[kRowLanes];
    for (int i = 0; i < rows; i += kWidth) {
      store(logarithms + i, load(largest + i) + logarithm2(load(total + i)));
    }
    for (int r = 0; r < rows; ++r) log_sum_exp[query + r] = logarithms[r];
  }

  // output = scores V / total.
  template <int rows>
  [[gnu::always_inline]] void average(int64_t query, int64_t row,
                                      const float (&total)[kRowLanes]) const {
    for_columns(head_dim, [&](auto vectors, int64_t column) __attribute__((always_inline)) {
      constexpr int kVectorsHere = decltype(vectors)::value;
      Vec sums[rows][kVectorsHere] = {};
      multiply_rows<Kind, kSteps<HeadDim>, rows, kVectorsHere>(
          scores + row * scores_stride(), scores_stride(), values + column, value_columns(),
          words_of<Kind>(tokens), sums);
      unroll<rows>([&](auto r) __attribute__((always_inline)) {
        const float factor = 1.0f / total[r];
        unroll<kVectorsHere>([&](auto v) __attribute__((always_inline)) {
          output.store((query + r) * output_stride + column + v * kWidth, sums[r][v] * factor);
        });
      });
    });
  }

  // Queries first to last.
  void attend(int64_t first, int64_t last) const {
    const RowTiles tiles = {last - first};
    for (int64_t tile = 0; tile < tiles.count(); tile += kBlockTiles) {
      attend_tiles(first, tiles, tile, smaller(tile + kBlockTiles, tiles.count()));
    }
  }

  // Tiles begin to end of the queries from `first` on.
  void attend_tiles(int64_t first, RowTiles tiles, int64_t begin, int64_t end) const {
    const int64_t block = tiles.start(begin);
    for_keys(head_dim, tokens, [&](auto vectors, int64_t key) __attribute__((always_inline)) {
      tiles.for_each(begin, end, [&](auto rows, int64_t row) __attribute__((always_inline)) {
        score<decltype(rows)::value, decltype(vectors)::value>(first + row, row - block, key);
      });
    });
    tiles.for_each(begin, end, [&](auto rows, int64_t row) __attribute__((always_inline)) {
      float total[kRowLanes];
      exponentiate<decltype(rows)::value>(first + row, row - block, total);
      average<decltype(rows)::value>(first + row, row - block, total);
    });
  }
};

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
