#pragma once

// Forward attention of one head in one window, whose operands lie in cache.

#include "cpu/isa/window_attention_tiles.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// A block of queries, in tiles of registers: a panel of keys or values serves all of them from L1.
constexpr int64_t kBlockTiles = 4;
// At most, also on the tiles of tiles.h.
constexpr int64_t kBlockQueries = 32;
static_assert(kBlockTiles * kRows <= kBlockQueries && kTileBlock <= kBlockQueries);

// Floats from the scores of a query to those of the next, for `tokens` keys.
template <class Kind>
[[gnu::always_inline]] inline int64_t stride_of_scores(int64_t tokens) {
  // Tiles of rows a power of two apart would map to few sets of a cache.
  return round_up(tokens, kPanel) + (kOnTiles<Kind> ? kTile : 0);
}

// Floats of the scores of a block, of any kind.
inline int64_t scores_size(int64_t tokens) {
  return kBlockQueries * (round_up(tokens, kPanel) + kTile);
}

// kRows floats, rounded up to vectors.
constexpr int kRowLanes = (kRows + kWidth - 1) / kWidth * kWidth;

// Halves lanes of rows that are apart by half a vector, and rows with them, until there is one.
template <int half, class Function>
[[gnu::always_inline]] inline void reduce_halves(Vec (&rows)[kWidth], Function&& function) {
  constexpr auto lanes = std::make_integer_sequence<int, kWidth>{};
  unroll<half>([&](auto i) __attribute__((always_inline)) {
    rows[i] = function(interleave_low(rows[i], rows[i + half], lanes),
                       interleave_high(rows[i], rows[i + half], lanes));
  });
  if constexpr (half > 1) reduce_halves<half / 2>(rows, function);
}

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
    reduce_halves<kWidth / 2>(tile, function);
    store(results + group * kWidth, tile[0]);
  });
}

// The same for any number of vectors of lanes in memory; there is room for a whole vector of
// results.
template <class Function>
[[gnu::always_inline]] inline void reduce_lanes(const float* lanes, int64_t rows, float* results,
                                                Function&& function) {
  for (int64_t first = 0; first < rows; first += kWidth) {
    Vec values[kWidth];
    unroll<kWidth>([&](auto i) __attribute__((always_inline)) {
      values[i] = load(lanes + smaller(first + i, rows - 1) * kWidth);
    });
    reduce_rows<kWidth>(values, results + first, function);
  }
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

  [[gnu::always_inline]] int64_t scores_stride() const { return stride_of_scores<Kind>(tokens); }
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
#if defined(__AMX_TILE__)
    if constexpr (kOnTiles<Kind>) return attend_on_tiles(first, last);
#endif
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

#if defined(__AMX_TILE__)
  // The same with products on tiles (tiles.h). All of these have the same shape; what is not filled
  // holds zeros, or the results of other queries.
  void attend_on_tiles(int64_t first, int64_t last) const {
    TileRegisters registers;
    registers.configure(kTile, TileDepth(kTile));
    for_tile_rows(last - first, [&](auto tiles, int64_t row, int64_t count) {
      constexpr int kTiles = decltype(tiles)::value;
      multiply_keys<kTiles>(first + row, count);
      alignas(64) float factors[kTileBlock];
      exponentiate_rows(first + row, count, factors);
      multiply_values<kTiles>(first + row, count, factors);
    });
  }

  // scores = queries K^T of `rows` queries; there are whole panels of keys.
  template <int tiles>
  void multiply_keys(int64_t query, int64_t rows) const {
    const Matrix<const float> block = {queries + query * row_length(), row_length()};
    const Matrix<float> products = {scores, scores_stride()};
    for (int64_t key = 0; key < tokens; key += kPanel) {
      multiply_tiles<Kind, tiles>(rows, tokens - key, block, {keys + key * row_length(), kPanel},
                                  TileDepth(row_length()), {}, products.at(0, key), [] {});
    }
  }

  // scores = 2^(scores + bias - their largest) as the product with the values reads them, and
  // factors = 1 / their sums.
  void exponentiate_rows(int64_t query, int64_t rows, float (&factors)[kTileBlock]) const {
    alignas(64) float largest[kTileBlock];
    for_few_rows(rows, [&](auto count, int64_t row) __attribute__((always_inline)) {
      add_bias<decltype(count)::value>(query, row);
    });
    reduce_lanes(maxima, rows, largest, [](Vec a, Vec b) { return maximum(a, b); });
    for_few_rows(rows, [&](auto count, int64_t row) __attribute__((always_inline)) {
      weigh<decltype(count)::value>(row, largest);
    });
    float* sums = maxima;
    reduce_lanes(sums, rows, factors, [](Vec a, Vec b) { return a + b; });
    for (int64_t row = 0; row < rows; row += kWidth) {
      const Vec sum = load(factors + row);
      store(largest + row, load(largest + row) + logarithm2(sum));
      store(factors + row, 1.0f / sum);
    }
    if (!log_sum_exp) return;
    for (int64_t row = 0; row < rows; ++row) log_sum_exp[query + row] = largest[row];
  }

  // Adds the bias to the scores of some rows, and finds the largest per lane. Here and below, what
  // loops read is in variables, as their stores might change members.
  template <int rows>
  [[gnu::always_inline]] void add_bias(int64_t query, int64_t row) const {
    const int64_t stride = scores_stride();
    const int64_t keys_end = tokens;
    float* const first = scores + row * stride;
    const bool biased = bias;
    const float* biases[rows];
    Vec largest[rows];
    unroll<rows>([&](auto r) __attribute__((always_inline)) {
      biases[r] = biased ? bias + runs[query + row + r] : first;
      largest[r] = broadcast(-__builtin_inff());
    });
    const auto add = [&](int64_t key, auto&& keep) __attribute__((always_inline)) {
      unroll<rows>([&](auto r) __attribute__((always_inline)) {
        float* const place = first + r * stride + key;
        const Vec score = load(place);
        const Vec kept = keep(biased ? score + load(biases[r] + key) : score);
        largest[r] = maximum(kept, largest[r]);
        store(place, kept);
      });
    };
    int64_t key = 0;
    for (; key + kWidth <= keys_end; key += kWidth) {
      add(key, [](Vec score) __attribute__((always_inline)) { return score; });
    }
    if (key < keys_end) {
      add(key, [&](Vec score) __attribute__((always_inline)) {
        return keep_lanes(score, keys_end - key, -__builtin_inff());
      });
    }
    float* const lanes = maxima + row * kWidth;
    unroll<rows>([&](auto r)
                     __attribute__((always_inline)) { store(lanes + r * kWidth, largest[r]); });
  }

  // The exponentials of some rows in place, and their sums per lane in place of the maxima.
  template <int rows>
  [[gnu::always_inline]] void weigh(int64_t row, const float (&largest)[kTileBlock]) const {
    const int64_t stride = scores_stride();
    const int64_t keys_end = tokens;
    float* const first = scores + row * stride;
    Vec shifts[rows];
    Vec sums[rows] = {};
    unroll<rows>([&](auto r)
                     __attribute__((always_inline)) { shifts[r] = broadcast(largest[row + r]); });
    const auto weights = [&](auto r, int64_t key) __attribute__((always_inline)) {
      const Vec weight = rounded_exponential2(load(first + r * stride + key) - shifts[r]);
      sums[r] += weight;
      return weight;
    };
    int64_t key = 0;
    for (; key + kWidth < keys_end; key += kPanel) {
      unroll<rows>([&](auto r) __attribute__((always_inline)) {
        const Vec left = weights(r, key);
        const Vec right = weights(r, key + kWidth);
        store(first + r * stride + key / Kind::kPerWord, join_rounded(left, right));
      });
    }
    if (key < keys_end) {
      unroll<rows>([&](auto r) __attribute__((always_inline)) {
        const Vec last = weights(r, key);
        store(first + r * stride + key / Kind::kPerWord, join_rounded(last, Vec{}));
      });
    }
    float* const lanes = maxima + row * kWidth;
    unroll<rows>([&](auto r)
                     __attribute__((always_inline)) { store(lanes + r * kWidth, sums[r]); });
  }

  // output = scores V * factors.
  template <int tiles>
  void multiply_values(int64_t query, int64_t rows, const float (&factors)[kTileBlock]) const {
    alignas(64) float result[kTileBlock * kPanel];
    for (int64_t column = 0; column < value_columns(); column += kPanel) {
      const int64_t columns = smaller(value_columns() - column, kPanel);
      multiply_tiles<Kind, tiles>(
          rows, columns, {scores, scores_stride()}, {values + column, value_columns()},
          TileDepth(depth_words<Kind>(tokens)), {}, {result, kPanel}, [] {});
      const Writer to = output.at(query * output_stride + column);
      const int64_t stride = output_stride;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < columns; i += kWidth) {
          to.store(row * stride + i, load(result + row * kPanel + i) * factors[row]);
        }
      }
    }
  }
#endif
};

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
