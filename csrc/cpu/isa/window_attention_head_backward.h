#pragma once

// Backward attention of one head in one window, whose operands lie in cache.

#include "cpu/common/pack_kernels.h"
#include "cpu/isa/window_attention_tiles.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// Floats of P, and as many of dS, held at a time: together they take half of a 256 KB L2 cache.
constexpr int64_t kBlockFloats = 16384;
constexpr int64_t kMostBlockTiles = 11;

inline int64_t block_tiles(int64_t tokens) {
  const int64_t fitting = kBlockFloats / round_up(tokens, kPanel) / kRows;
  return smaller(kMostBlockTiles, larger(1, fitting));
}

// Queries of a block on the tiles of tiles.h: whole ones along the depth of products, too.
inline int64_t block_queries(int64_t tokens) {
  const bool two = 2 * kTileBlock * round_up(tokens, kPanel) <= kBlockFloats;
  return two ? 2 * kTileBlock : kTileBlock;
}

// Floats of P of a block in any window of at most `tokens` tokens, which are whole panels.
template <class Kind>
inline int64_t largest_block(int64_t tokens) {
  return larger(kBlockFloats, (kOnTiles<Kind> ? kTileBlock : kRows) * tokens);
}

// One head of one window, its operands in scratch memory: `words` along the rows, `token_words`
// along the tokens (cpu/isa/product.h).
template <class HeadDim, class Kind>
struct HeadBackward {
  HeadDim head_dim;
  int64_t tokens;
  const float* bias;      // In strips, or null.
  float* bias_gradients;  // The same.
  const int32_t* runs;    // Per query, where its bias starts in these.
  const float* query_words;
  const float* query_token_words;
  const float* key_token_words;
  const float* output_gradient_words;
  const float* output_gradient_token_words;
  const float* packed_keys;
  const float* packed_values;
  const float* dots;
  const float* log_sum_exp;
  float* query_gradients;  // May be the queries.
  float* key_gradients;
  float* value_gradients;
  float* weights;
  float* score_gradients;
  int64_t scores_size;

  int64_t scores_stride() const { return round_up(tokens, kPanel); }
  [[gnu::always_inline]] int64_t row_length() const { return round_up(head_dim, kWidth); }

  // P and dS of some rows of a block and one panel of keys, in elements of what products read; dS
  // is added to the strips' gradient. The others add products with keys and values to sums.
  template <int rows, int vectors, class AddScores, class AddGradients>
  [[gnu::always_inline]] void differentiate(int64_t query, int64_t row, int64_t key,
                                            AddScores&& add_scores,
                                            AddGradients&& add_gradients) const {
    auto* weight = elements_of<Kind>(weights) + row * scores_stride() + key;
    auto* gradient = elements_of<Kind>(score_gradients) + row * scores_stride() + key;
    Vec sums[rows][vectors];
    unroll<rows>([&](auto r) __attribute__((always_inline)) {
      unroll<vectors>([&](auto v) __attribute__((always_inline)) {
        sums[r][v] = bias ? load(bias + runs[query + r] + key + v * kWidth) : Vec{};
      });
    });
    add_scores(sums);
    unroll<rows>([&](auto r) __attribute__((always_inline)) {
      const float shift = log_sum_exp[query + r];
      unroll<vectors>([&](auto v) __attribute__((always_inline)) {
        store(weight + r * scores_stride() + v * kWidth, weight_of(sums[r][v] - shift));
        sums[r][v] = broadcast(dots[query + r]);
      });
    });
    add_gradients(sums);
    const bool whole = key + vectors * kWidth <= tokens;
    unroll<rows>([&](auto r) __attribute__((always_inline)) {
      float* run = bias_gradients ? bias_gradients + runs[query + r] + key : nullptr;
      unroll<vectors>([&](auto v) __attribute__((always_inline)) {
        const int64_t place = r * scores_stride() + v * kWidth;
        Vec change = load(weight + place) * sums[r][v];
        // What lies beyond the tokens would be added to the strips, and be part of the last word.
        if (!whole) change = keep_lanes(change, tokens - key - v * kWidth, 0.0f);
        store(gradient + place, change);
        if (bias_gradients) store(run + v * kWidth, load(run + v * kWidth) + change);
      });
    });
  }

  [[gnu::always_inline]] static Vec weight_of(Vec score) {
#if defined(__AMX_TILE__)
    if constexpr (kOnTiles<Kind>) return rounded_exponential2(score);
#endif
    return exponential2(score);
  }

  // The same with products by vectors.
  template <int rows, int vectors>
  [[gnu::always_inline]] void differentiate(int64_t query, int64_t row, int64_t key) const {
    const int64_t depth = words_of<Kind>(head_dim);
    const int64_t row_stride = row_words<Kind>(head_dim);
    const auto multiply = [&](const float* a, const float* b,
                              Vec(&sums)[rows][vectors]) __attribute__((always_inline)) {
      multiply_rows<Kind, kSteps<HeadDim>, rows, vectors>(a + query * row_stride, row_stride,
                                                          b + key * depth, kPanel, depth, sums);
    };
    differentiate<rows, vectors>(
        query, row, key,
        [&](Vec(&sums)[rows][vectors])
            __attribute__((always_inline)) { multiply(query_words, packed_keys, sums); },
        [&](Vec(&sums)[rows][vectors]) __attribute__((always_inline)) {
          multiply(output_gradient_words, packed_values, sums);
        });
  }

  // P or dS of `count` queries of a block as words along these.
  const float* along_queries(float* scores, int64_t count) const {
    if constexpr (Kind::kPerWord == 1) return scores;
    float* words = scores + scores_size / Kind::kPerWord;
    pair_rows(scores, count, scores_stride(), words);
    clear_rows(words, words_of<Kind>(count), depth_words<Kind>(count), scores_stride());
    return words;
  }

  // sums (+)= A^T B for all keys: A [count, tokens] is P or dS, B [count, head_dim] of the block,
  // both in words along the queries.
  void add_transposed(const float* a, const float* b, int64_t count, bool accumulate,
                      float* sum) const {
    for_columns(head_dim, [&](auto vectors, int64_t column) __attribute__((always_inline)) {
      constexpr int kVectorsHere = decltype(vectors)::value;
      const RowTiles tiles = {tokens};
      tiles.for_each(0, tiles.count(), [&](auto rows, int64_t key) __attribute__((always_inline)) {
        constexpr int kRowsHere = decltype(rows)::value;
        float* tile = sum + key * row_length() + column;
        Vec sums[kRowsHere][kVectorsHere];
        unroll<kRowsHere>([&](auto r) __attribute__((always_inline)) {
          unroll<kVectorsHere>([&](auto v) __attribute__((always_inline)) {
            sums[r][v] = accumulate ? load(tile + r * row_length() + v * kWidth) : Vec{};
          });
        });
        multiply_columns<Kind, kSteps<HeadDim>, kRowsHere, kVectorsHere>(
            a + key, scores_stride(), b + column, row_length(), words_of<Kind>(count), sums);
        store_tile<kRowsHere, kVectorsHere>(tile, sums);
      });
    });
  }

  template <int rows, int vectors>
  [[gnu::always_inline]] void store_tile(float* tile, const Vec (&sums)[rows][vectors]) const {
    unroll<rows>([&](auto r) __attribute__((always_inline)) {
      unroll<vectors>([&](auto v) __attribute__((always_inline)) {
        store(tile + r * row_length() + v * kWidth, sums[r][v]);
      });
    });
  }

#if defined(__AMX_TILE__)
  void differentiate_on_tiles() const;
  void add_block_on_tiles(int64_t first, int64_t count) const;
  void add_transposed_on_tiles(const float* a, const float* b, int64_t first, int64_t count,
                               float* sums) const;
#endif

  // Everything that tiles begin to end of the queries contribute.
  void add_block(RowTiles tiles, int64_t begin, int64_t end) const {
    const int64_t first = tiles.start(begin);
    const int64_t count = tiles.start(end) - first;
    for_keys(head_dim, tokens, [&](auto vectors, int64_t key) __attribute__((always_inline)) {
      tiles.for_each(begin, end, [&](auto rows, int64_t query) __attribute__((always_inline)) {
        differentiate<decltype(rows)::value, decltype(vectors)::value>(query, query - first, key);
      });
    });
    const int64_t first_word = first / Kind::kPerWord * row_length();
    add_transposed(along_queries(weights, count), output_gradient_token_words + first_word, count,
                   begin > 0, value_gradients);
    add_transposed(along_queries(score_gradients, count), query_token_words + first_word, count,
                   begin > 0, key_gradients);
    const int64_t stride = scores_stride() / Kind::kPerWord;
    for_columns(head_dim, [&](auto vectors, int64_t column) __attribute__((always_inline)) {
      constexpr int kVectorsHere = decltype(vectors)::value;
      tiles.for_each(begin, end, [&](auto rows, int64_t query) __attribute__((always_inline)) {
        constexpr int kRowsHere = decltype(rows)::value;
        Vec sums[kRowsHere][kVectorsHere] = {};
        multiply_rows<Kind, kSteps<HeadDim>, kRowsHere, kVectorsHere>(
            score_gradients + (query - first) * stride, stride, key_token_words + column,
            row_length(), words_of<Kind>(tokens), sums);
        store_tile<kRowsHere, kVectorsHere>(query_gradients + query * row_length() + column, sums);
      });
    });
  }

  void differentiate() const {
#if defined(__AMX_TILE__)
    if constexpr (kOnTiles<Kind>) return differentiate_on_tiles();
#endif
    const RowTiles tiles = {tokens, Kind::kPerWord};
    const int64_t blocks = divide_up(tiles.count(), block_tiles(tokens));
    for (int64_t block = 0; block < blocks; ++block) {
      add_block(tiles, tiles.count() * block / blocks, tiles.count() * (block + 1) / blocks);
    }
  }
};

#if defined(__AMX_TILE__)

// The same with products on tiles (tiles.h), all of one shape. The gradients of keys and values are
// transposed until the end, as P and dS are operands B as they lie in words along the queries.
template <class HeadDim, class Kind>
void HeadBackward<HeadDim, Kind>::differentiate_on_tiles() const {
  TileRegisters registers;
  registers.configure(kTile, TileDepth(kTile));
  for (int64_t first = 0; first < tokens; first += block_queries(tokens)) {
    add_block_on_tiles(first, smaller(block_queries(tokens), tokens - first));
  }
}

template <class HeadDim, class Kind>
void HeadBackward<HeadDim, Kind>::add_block_on_tiles(int64_t first, int64_t count) const {
  alignas(64) float scores[kTileBlock * kPanel];
  alignas(64) float gradients[kTileBlock * kPanel];
  const int64_t length = row_words<Kind>(head_dim);
  for_tile_rows(count, [&](auto tiles, int64_t row, int64_t rows) {
    for (int64_t key = 0; key < tokens; key += kPanel) {
      const auto multiply = [&](const float* a, const float* b, float* products) {
        multiply_tiles<Kind, decltype(tiles)::value, 2>(
            rows, {a + (first + row) * length, length}, {b + key * length, kPanel},
            TileDepth(length), {}, {products, kPanel}, [] {});
      };
      multiply(query_words, packed_keys, scores);
      multiply(output_gradient_words, packed_values, gradients);
      for_few_rows(rows, [&](auto few, int64_t i) __attribute__((always_inline)) {
        constexpr int kFew = decltype(few)::value;
        const auto add = [&](const float* products,
                             Vec(&sums)[kFew][kVectors]) __attribute__((always_inline)) {
          unroll<kFew * kVectors>([&](auto j) __attribute__((always_inline)) {
            sums[j / kVectors][j % kVectors] += load(products + i * kPanel + j * kWidth);
          });
        };
        differentiate<kFew, kVectors>(
            first + row + i, row + i, key,
            [&](Vec(&sums)[kFew][kVectors]) __attribute__((always_inline)) { add(scores, sums); },
            [&](Vec(&sums)[kFew][kVectors])
                __attribute__((always_inline)) { add(gradients, sums); });
      });
    }
  });
  add_transposed_on_tiles(output_gradient_token_words, along_queries(weights, count), first, count,
                          value_gradients);
  add_transposed_on_tiles(query_token_words, along_queries(score_gradients, count), first, count,
                          key_gradients);
  const Matrix<const float> changes = {score_gradients, scores_stride() / Kind::kPerWord};
  for (int64_t column = 0; column < row_length(); column += kPanel) {
    for_tile_rows(count, [&](auto tiles, int64_t row, int64_t rows) {
      multiply_tiles<Kind, decltype(tiles)::value>(
          rows, row_length() - column, changes.at(row, 0), {key_token_words + column, row_length()},
          TileDepth(depth_words<Kind>(tokens)), {},
          {query_gradients + (first + row) * row_length() + column, row_length()}, [] {});
    });
  }
}

// sums [head_dim, tokens] (+)= A^T B: A [count, head_dim] in words along the tokens, whose
// transpose lies behind them, B [count, tokens] in words along the queries of a block.
template <class HeadDim, class Kind>
void HeadBackward<HeadDim, Kind>::add_transposed_on_tiles(const float* a, const float* b,
                                                          int64_t first, int64_t count,
                                                          float* sums) const {
  const int64_t stride = scores_stride();
  const int64_t words = depth_words<Kind>(tokens);
  const float* transposed = a + words * row_length() + first / Kind::kPerWord;
  for (int64_t key = 0; key < tokens; key += kPanel) {
    for_tile_rows(row_length(), [&](auto tiles, int64_t row, int64_t rows) {
      const Matrix<float> c = {sums + row * stride + key, stride};
      multiply_tiles<Kind, decltype(tiles)::value, 2>(
          rows, {transposed + row * words, words}, {b + key, stride},
          TileDepth(depth_words<Kind>(count)), {first > 0 ? c.data : nullptr, stride}, c, [] {});
    });
  }
}

#endif

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
