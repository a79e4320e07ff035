// The MLP of a transformer block without gradients:
//   result = y + W2 act(W1 norm(y) + b1) + b2
// For each strip of rows and each block of the hidden channels: multiply and activate into a tile,
// as words that the second product reads, and add that product to a sum over the blocks. Memory
// moves y, the result and the weights once per strip; the hidden channels never leave the cache.
// Where rows are so few that threads share them, their hidden channels exist all at once, so that
// each thread reads a part of the weights. Each sum has the same order either way.

#include "cpu/common/mlp_kernels.h"

#include "cpu/isa/activation.h"
#include "cpu/isa/gemm.h"
#include "cpu/isa/layer_norm.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

// Deeper blocks would read and write the sums over blocks fewer times, but gain nothing.
constexpr int64_t kBlockWords = 64;
// Words from one row to the next in a tile: a power of two would map rows to few sets of a cache.
constexpr int64_t kTilePitch = kBlockWords + 16;
// The same in elements.
template <class Kind>
constexpr int64_t kStride = kTilePitch * Kind::kPerWord;

int64_t input_words(const MlpProblem& problem) {
  return words_of(problem.product, problem.channels);
}
int64_t block_channels(const MlpProblem& problem) {
  return kBlockWords * (problem.product == Product::bfloat16 ? 2 : 1);
}
int64_t block_valid(const MlpProblem& problem, int64_t block) {
  const int64_t channels = block_channels(problem);
  return smaller(channels, problem.hidden - block * channels);
}
int64_t block_words(const MlpProblem& problem, int64_t block) {
  return words_of(problem.product, block_valid(problem, block));
}

// What all blocks need: the norm's weight and bias, and b2 in whole panels.
int64_t shared_size(const MlpProblem& problem) { return 3 * panelled(problem.channels); }

// A block's weights and biases: W1 [channels/kPanel][words of C][kPanel], b1,
// W2 [C/kPanel][words of the channels][kPanel].
struct Block {
  float *fc1, *bias, *fc2;
};

int64_t block_size(const MlpProblem& problem) {
  return block_channels(problem) * (input_words(problem) + 1) +
         panelled(problem.channels) * kBlockWords;
}

Block block_at(const MlpProblem& problem, const float* packed, int64_t block) {
  Block result;
  result.fc1 = const_cast<float*>(packed) + shared_size(problem) + block * block_size(problem);
  result.bias = result.fc1 + block_channels(problem) * input_words(problem);
  result.fc2 = result.bias + block_channels(problem);
  return result;
}

// One thread's working memory for a strip.
struct Strip {
  float* normalized;  // [rows][words of C]
  float* tile;        // [rows][kTilePitch]
  float* sums;        // [rows][panelled C]
  float* partial;     // [rows][kPanel]
  int64_t size;
};

Strip strip_in(float* memory, const MlpProblem& problem, int64_t rows) {
  int64_t end = 0;
  const auto take = [&](int64_t floats) {
    float* begin = memory + end;
    end += round_up(floats, 16);
    return begin;
  };
  Strip strip;
  strip.normalized = take(rows * input_words(problem));
  strip.tile = take(rows * kTilePitch);
  strip.sums = take(rows * panelled(problem.channels));
  strip.partial = take(rows * kPanel);
  strip.size = end;
  return strip;
}

template <class Kind>
void normalize(const MlpProblem& problem, const float* packed, int64_t first, int64_t last,
               float* normalized) {
  const int64_t channels = problem.channels;
  const int64_t words = words_of<Kind>(channels);
  with_elements(problem.element, problem.y, [&](auto* y) {
    for (int64_t row = first; row < last; ++row) {
      auto* to = elements_of<Kind>(normalized + (row - first) * words);
      normalize_row(channels, problem.eps, packed, packed + panelled(channels), y + row * channels,
                    typename Kind::Writer(to));
      for (int64_t i = channels; i < words * Kind::kPerWord; ++i) to[i] = {};
    }
  });
}

// to[row][0 .. kPanel) = act(sums[row]), as elements of the next product.
template <class Kind, Activation kind, int rows>
[[gnu::always_inline]] inline void activate_rows(const Vec (&sums)[rows][kVectors],
                                                 typename Kind::Element* to) {
  unroll<(rows + 1) / 2>([&](auto pair) __attribute__((always_inline)) {
    constexpr int kFirst = 2 * pair;
    constexpr int kVecs = (rows - kFirst < 2 ? 1 : 2) * kVectors;
    Vec values[kVecs];
    unroll<kVecs>([&](auto i) __attribute__((always_inline)) {
      values[i] = sums[kFirst + i / kVectors][i % kVectors];
    });
    activate<kind, kVecs, typename Kind::Element>(values);
    unroll<kVecs>([&](auto i) __attribute__((always_inline)) {
      store(to + (kFirst + i / kVectors) * kStride<Kind> + (i % kVectors) * kWidth, values[i]);
    });
  });
}

// to[row][0 .. kPanel) = act(a[row] W + bias), as elements of the next product, for one panel of W.
// partial: [rows][kPanel], sums of a part of the depth.
template <class Kind, Activation kind>
void activated_panel(int64_t rows, int64_t words, const float* a, const float* panel,
                     const float* bias, float* partial, typename Kind::Element* to) {
#if defined(__AMX_TILE__)
  if constexpr (kOnTiles<Kind>) {
    return finished_on_tiles<Kind>(rows, kPanel, words, a, panel, bias,
                                   [&](int64_t, int64_t row, const auto& sums)
                                       __attribute__((always_inline)) {
                                         activate_rows<Kind, kind>(sums, to + row * kStride<Kind>);
                                       });
  }
#endif
  const int64_t pieces = larger(divide_up(words, kDepth), 1);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = words * piece / pieces;
    const int64_t depth = words * (piece + 1) / pieces - first;
    const float* weights = panel + first * kPanel;
    // Panels follow one another in memory, as do their pieces.
    Ahead ahead = after_piece(weights, depth, words, true);
    for_row_blocks(rows, [&](auto count, int64_t row) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
      float* part = partial + row * kPanel;
      Vec sums[kCount][kVectors];
      unroll<kCount * kVectors>([&](auto i) __attribute__((always_inline)) {
        constexpr int r = i / kVectors;
        constexpr int v = i % kVectors;
        sums[r][v] = load(piece > 0 ? part + r * kPanel + v * kWidth : bias + v * kWidth);
      });
      multiply<Kind, kCount, kVectors>({a + row * words + first, words, 1}, weights, kPanel, depth,
                                       sums, ahead);
      if (piece < pieces - 1) {
        unroll<kCount * kVectors>([&](auto i) __attribute__((always_inline)) {
          constexpr int r = i / kVectors;
          constexpr int v = i % kVectors;
          store(part + r * kPanel + v * kWidth, sums[r][v]);
        });
        return;
      }
      activate_rows<Kind, kind>(sums, to + row * kStride<Kind>);
    });
  }
}

// A panel of a block's channels, from `column` of the block on, into its tile.
template <class Kind>
void expand_panel(const MlpProblem& problem, const Block& weights, int64_t column, int64_t rows,
                  const float* normalized, float* partial, float* tile) {
  const int64_t words = words_of<Kind>(problem.channels);
  with_activation(problem.activation, [&](auto kind) {
    activated_panel<Kind, decltype(kind)::value>(
        rows, words, normalized, weights.fc1 + column * words, weights.bias + column, partial,
        elements_of<Kind>(tile) + column);
  });
}

// sums [rows][stride] (+)= tile times a block's W2, for `columns` channels whose panels begin at
// `panels`.
template <class Kind>
void project_block(int64_t rows, int64_t columns, int64_t words, const float* tile,
                   const float* panels, const float* bias, bool accumulate, float* sums,
                   int64_t stride) {
  gemm<Kind>(rows, columns, words, {tile, kTilePitch, 1}, panels, words * kPanel, kPanel, sums,
             stride, accumulate, bias);
}

// result = y + sums [rows][stride] for rows first to last and `columns` channels from `column` on.
void finish(const MlpProblem& problem, int64_t first, int64_t last, int64_t column, int64_t columns,
            float* sums, int64_t stride) {
  with_elements(problem.element, problem.result, [&](auto* result) {
    const auto* y = static_cast<decltype(result)>(const_cast<void*>(problem.y));
    for (int64_t row = first; row < last; ++row, sums += stride) {
      const int64_t place = row * problem.channels + column;
      add(y + place, columns, sums);
      narrow(sums, columns, result + place);
    }
  });
}

const float* fc2_bias(const MlpProblem& problem, const float* packed) {
  return packed + 2 * panelled(problem.channels);
}

}  // namespace

int64_t mlp_blocks(const MlpProblem& problem) {
  return divide_up(problem.hidden, block_channels(problem));
}

int64_t mlp_packed_size(const MlpProblem& problem) {
  return shared_size(problem) + mlp_blocks(problem) * block_size(problem);
}

void mlp_pack_shared(const MlpProblem& problem, float* packed) {
  const int64_t columns = panelled(problem.channels);
  for (int64_t i = 0; i < columns; ++i) {
    const bool exists = i < problem.channels;
    packed[i] = problem.norm_weight && exists ? problem.norm_weight[i] : 1.0f;
    packed[columns + i] = problem.norm_bias && exists ? problem.norm_bias[i] : 0.0f;
    packed[2 * columns + i] = problem.fc2_bias && exists ? problem.fc2_bias[i] : 0.0f;
  }
}

void mlp_pack_block(const MlpProblem& problem, int64_t block, float* packed) {
  const Block to = block_at(problem, packed, block);
  const int64_t first = block * block_channels(problem);
  const int64_t valid = block_valid(problem, block);
  const int64_t channels = problem.channels;
  with_unscaled_product(problem.product, [&](auto kind) {
    using Kind = decltype(kind);
    pack<Kind>(problem.fc1_weight + first * channels, channels, valid, channels, nullptr, nullptr,
               to.fc1);
    pack<Kind>(problem.fc2_weight + first, problem.hidden, channels, valid, nullptr, nullptr,
               to.fc2);
  });
  for (int64_t i = 0; i < block_channels(problem); ++i) {
    to.bias[i] = problem.fc1_bias && i < valid ? problem.fc1_bias[first + i] : 0.0f;
  }
}

int64_t mlp_strip_size(const MlpProblem& problem, int64_t rows) {
  return strip_in(nullptr, problem, rows).size;
}

void mlp_strip(const MlpProblem& problem, const float* packed, int64_t first, int64_t last,
               float* scratch) {
  const int64_t rows = last - first;
  const Strip strip = strip_in(scratch, problem, rows);
  const int64_t channels = problem.channels;
  with_unscaled_product(problem.product, [&](auto kind) {
    using Kind = decltype(kind);
    normalize<Kind>(problem, packed, first, last, strip.normalized);
    for (int64_t block = 0; block < mlp_blocks(problem); ++block) {
      const Block weights = block_at(problem, packed, block);
      for (int64_t column = 0; column < block_valid(problem, block); column += kPanel) {
        expand_panel<Kind>(problem, weights, column, rows, strip.normalized, strip.partial,
                           strip.tile);
      }
      project_block<Kind>(rows, channels, block_words(problem, block), strip.tile, weights.fc2,
                          fc2_bias(problem, packed), block > 0, strip.sums, panelled(channels));
    }
  });
  finish(problem, first, last, 0, channels, strip.sums, panelled(channels));
}

int64_t mlp_normalized_words(const MlpProblem& problem) { return input_words(problem); }

int64_t mlp_hidden_size(const MlpProblem& problem) {
  return mlp_blocks(problem) * problem.rows * kTilePitch;
}

int64_t mlp_hidden_panels(const MlpProblem& problem) { return divide_up(problem.hidden, kPanel); }

int64_t mlp_panels(const MlpProblem& problem) { return divide_up(problem.channels, kPanel); }

int64_t mlp_panel_size(const MlpProblem& problem) { return problem.rows * kPanel; }

void mlp_normalize(const MlpProblem& problem, const float* packed, int64_t first, int64_t last,
                   float* normalized) {
  with_unscaled_product(problem.product, [&](auto kind) {
    normalize<decltype(kind)>(problem, packed, first, last,
                              normalized + first * mlp_normalized_words(problem));
  });
}

void mlp_expand(const MlpProblem& problem, const float* packed, int64_t panel,
                const float* normalized, float* scratch, float* hidden) {
  const int64_t block = panel * kPanel / block_channels(problem);
  const int64_t column = panel * kPanel % block_channels(problem);
  with_unscaled_product(problem.product, [&](auto kind) {
    expand_panel<decltype(kind)>(problem, block_at(problem, packed, block), column, problem.rows,
                                 normalized, scratch, hidden + block * problem.rows * kTilePitch);
  });
}

void mlp_project(const MlpProblem& problem, const float* packed, int64_t panel, const float* hidden,
                 float* scratch) {
  const int64_t column = panel * kPanel;
  const int64_t columns = smaller(problem.channels - column, kPanel);
  with_unscaled_product(problem.product, [&](auto kind) {
    for (int64_t block = 0; block < mlp_blocks(problem); ++block) {
      const int64_t words = block_words(problem, block);
      project_block<decltype(kind)>(problem.rows, columns, words,
                                    hidden + block * problem.rows * kTilePitch,
                                    block_at(problem, packed, block).fc2 + column * words,
                                    fc2_bias(problem, packed) + column, block > 0, scratch, kPanel);
    }
  });
  finish(problem, 0, problem.rows, column, columns, scratch, kPanel);
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
