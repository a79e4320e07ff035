// The MLP of a transformer block without gradients:
//   result = y + W2 act(W1 norm(y) + b1) + b2
// For each strip of rows and each block of the hidden channels: multiply and activate into a tile,
// as words that the second product reads, and add that product to a sum over the blocks. Memory
// moves y, the result and the weights once per strip; the hidden channels never leave the cache.
// Where rows are so few that threads share them, their hidden channels exist all at once, so that
// each thread reads a part of the weights. Each sum has the same order either way.

#include "cpu/common/mlp_kernels.h"

#include "cpu/isa/activation.h"
#include "cpu/isa/layer_norm.h"
#include "cpu/isa/pack_bytes.h"

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
  int64_t channels = kBlockWords;
  with_product(problem.product, [&](auto kind) { channels *= decltype(kind)::kPerWord; });
  return channels;
}
int64_t block_valid(const MlpProblem& problem, int64_t block) {
  const int64_t channels = block_channels(problem);
  return smaller(channels, problem.hidden - block * channels);
}
int64_t block_words(const MlpProblem& problem, int64_t block) {
  return words_of(problem.product, block_valid(problem, block));
}

// What all blocks need, each in whole panels: the norm's weight and bias, and b2. Of bytes also
// what sums of the second product are multiplied with, and the scales of W2's.
struct Shared {
  float *norm_weight, *norm_bias, *bias, *factor, *weight_scale;
};

int64_t shared_size(const MlpProblem& problem) {
  return (problem.product == Product::int8 ? 5 : 3) * panelled(problem.channels);
}

Shared shared_in(const MlpProblem& problem, const float* packed) {
  const int64_t columns = panelled(problem.channels);
  float* const first = const_cast<float*>(packed);
  return {first, first + columns, first + 2 * columns, first + 3 * columns, first + 4 * columns};
}

// A block's weights and biases: W1 [channels/kPanel][words of C][kPanel], b1, of bytes also what
// sums are multiplied with, W2 [C/kPanel][words of the channels][kPanel].
struct Block {
  float *fc1, *bias, *factor, *fc2;
};

int64_t block_size(const MlpProblem& problem) {
  const int64_t numbers = problem.product == Product::int8 ? 2 : 1;
  return block_channels(problem) * (input_words(problem) + numbers) +
         panelled(problem.channels) * kBlockWords;
}

Block block_at(const MlpProblem& problem, const float* packed, int64_t block) {
  Block result;
  result.fc1 = const_cast<float*>(packed) + shared_size(problem) + block * block_size(problem);
  result.bias = result.fc1 + block_channels(problem) * input_words(problem);
  result.factor = result.bias + block_channels(problem);
  result.fc2 =
      problem.product == Product::int8 ? result.factor + block_channels(problem) : result.factor;
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
  const Shared shared = shared_in(problem, packed);
  with_elements(problem.element, problem.y, [&](auto* y) {
    for (int64_t row = first; row < last; ++row) {
      auto* to = elements_of<Kind>(normalized + (row - first) * words);
      normalize_row(channels, problem.eps, shared.norm_weight, shared.norm_bias, y + row * channels,
                    typename Kind::Writer(to, problem.norm_quantization));
      for (int64_t i = channels; i < words * Kind::kPerWord; ++i) to[i] = {};
    }
  });
}

// The bias of a panel of hidden channels, and where they go. Sums of bytes become numbers by it and
// `factor`.
template <class Kind>
struct HiddenPanel {
  const float *bias, *factor;
  typename Kind::Writer to;

  HiddenPanel at_row(int64_t row) const { return {bias, factor, to.at(row * kStride<Kind>)}; }
  // What the sums of vector v start from.
  [[gnu::always_inline]] typename Kind::Sum start(int v) const {
    if constexpr (Kind::kScaled) {
      return typename Kind::Sum{};
    } else {
      return load(bias + v * kWidth);
    }
  }
  [[gnu::always_inline]] Vec number(typename Kind::Sum sum, int v) const {
    if constexpr (Kind::kScaled) {
      return fma(__builtin_convertvector(sum, Vec), load(factor + v * kWidth),
                 load(bias + v * kWidth));
    } else {
      return sum;
    }
  }
};

// to[row][0 .. kPanel) = act(sums[row]), as elements of the next product.
template <class Kind, Activation kind, int rows>
[[gnu::always_inline]] inline void activate_rows(const typename Kind::Sum (&sums)[rows][kVectors],
                                                 const HiddenPanel<Kind>& hidden) {
  unroll<(rows + 1) / 2>([&](auto pair) __attribute__((always_inline)) {
    constexpr int kFirst = 2 * pair;
    constexpr int kVecs = (rows - kFirst < 2 ? 1 : 2) * kVectors;
    Vec values[kVecs];
    unroll<kVecs>([&](auto i) __attribute__((always_inline)) {
      values[i] = hidden.number(sums[kFirst + i / kVectors][i % kVectors], i % kVectors);
    });
    activate<kind, kVecs, typename Kind::Element>(values);
    unroll<kVecs>([&](auto i) __attribute__((always_inline)) {
      hidden.to.store((kFirst + i / kVectors) * kStride<Kind> + (i % kVectors) * kWidth, values[i]);
    });
  });
}

// hidden.to[row][0 .. kPanel) = act(a[row] W + bias), as elements of the next product, for one
// panel of W. partial: [rows][kPanel], sums of a part of the depth.
template <class Kind, Activation kind>
void activated_panel(int64_t rows, int64_t words, const float* a, const float* panel,
                     float* partial, const HiddenPanel<Kind>& hidden) {
#if defined(__AMX_TILE__)
  if constexpr (kOnTiles<Kind>) {
    return finished_on_tiles<Kind>(
        rows, kPanel, words, a, panel, Kind::kScaled ? nullptr : hidden.bias,
        [&](int64_t, int64_t row, const auto& sums) __attribute__((always_inline)) {
          activate_rows<Kind, kind>(sums, hidden.at_row(row));
        });
  }
#endif
  using Sum = typename Kind::Sum;
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
      Sum sums[kCount][kVectors];
      unroll<kCount * kVectors>([&](auto i) __attribute__((always_inline)) {
        constexpr int r = i / kVectors;
        constexpr int v = i % kVectors;
        sums[r][v] = piece > 0 ? load_as<Sum>(part + r * kPanel + v * kWidth) : hidden.start(v);
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
      activate_rows<Kind, kind>(sums, hidden.at_row(row));
    });
  }
}

// A panel of a block's channels, from `column` of the block on, into its tile.
template <class Kind>
void expand_panel(const MlpProblem& problem, const Block& weights, int64_t column, int64_t rows,
                  const float* normalized, float* partial, float* tile) {
  const int64_t words = words_of<Kind>(problem.channels);
  const HiddenPanel<Kind> hidden = {
      weights.bias + column, weights.factor + column,
      typename Kind::Writer(elements_of<Kind>(tile) + column, problem.hidden_quantization)};
  with_activation(problem.activation, [&](auto kind) {
    activated_panel<Kind, decltype(kind)::value>(rows, words, normalized,
                                                 weights.fc1 + column * words, partial, hidden);
  });
}

// sums [rows][stride] (+)= tile times a block's W2, for `columns` channels whose panels begin at
// `panels`.
template <class Kind>
void project_block(int64_t rows, int64_t columns, int64_t words, const float* tile,
                   const float* panels, const float* bias, bool accumulate, float* sums,
                   int64_t stride) {
  gemm<Kind>(rows, columns, words, {tile, kTilePitch, 1}, panels, words * kPanel, kPanel, sums,
             stride, accumulate, Kind::kScaled ? nullptr : bias);
}

// result = y + sums [rows][stride] for rows first to last and `columns` channels from `column` on.
template <class Kind>
void finish(const MlpProblem& problem, const Shared& shared, int64_t first, int64_t last,
            int64_t column, int64_t columns, float* sums, int64_t stride) {
  to_numbers<Kind>(last - first, columns, stride, shared.factor + column, shared.bias + column,
                   sums);
  with_elements(problem.element, problem.result, [&](auto* result) {
    const auto* y = static_cast<decltype(result)>(const_cast<void*>(problem.y));
    for (int64_t row = first; row < last; ++row, sums += stride) {
      const int64_t place = row * problem.channels + column;
      add(y + place, columns, sums);
      narrow(sums, columns, result + place);
    }
  });
}

// W2 of a block.
template <class Kind>
void pack_fc2(const MlpProblem& problem, const Shared& shared, int64_t first, int64_t valid,
              float* to) {
  const float* source = problem.fc2_weight + first;
  if constexpr (Kind::kScaled) {
    for (int64_t i = 0; i < panelled(problem.channels); ++i) {
      float* panel = to + i / kPanel * words_of<Kind>(valid) * kPanel;
      if (i >= problem.channels) {
        clear_column(valid, i % kPanel, panel);
        continue;
      }
      const WeightColumn column = {source + i * problem.hidden, valid, 1.0f, nullptr};
      column.pack(shared.weight_scale[i], i % kPanel, panel);
    }
  } else {
    pack<Kind>(source, problem.hidden, problem.channels, valid, nullptr, nullptr, to);
  }
}

}  // namespace

int64_t mlp_blocks(const MlpProblem& problem) {
  return divide_up(problem.hidden, block_channels(problem));
}

int64_t mlp_packed_size(const MlpProblem& problem) {
  return shared_size(problem) + mlp_blocks(problem) * block_size(problem);
}

void mlp_pack_shared(const MlpProblem& problem, float* packed) {
  const Shared shared = shared_in(problem, packed);
  for (int64_t i = 0; i < panelled(problem.channels); ++i) {
    const bool exists = i < problem.channels;
    shared.norm_weight[i] = problem.norm_weight && exists ? problem.norm_weight[i] : 1.0f;
    shared.norm_bias[i] = problem.norm_bias && exists ? problem.norm_bias[i] : 0.0f;
    shared.bias[i] = problem.fc2_bias && exists ? problem.fc2_bias[i] : 0.0f;
    if (problem.product != Product::int8) continue;
    shared.weight_scale[i] = 1.0f;
    shared.factor[i] = 0.0f;
    if (!exists) continue;
    const WeightColumn column = {problem.fc2_weight + i * problem.hidden, problem.hidden, 1.0f,
                                 nullptr};
    shared.weight_scale[i] = column.scale();
    const FactorAndShift number = to_number(problem.hidden_quantization, shared.weight_scale[i],
                                            column.sum(shared.weight_scale[i]), shared.bias[i]);
    shared.factor[i] = number.factor;
    shared.bias[i] = number.shift;
  }
}

void mlp_pack_block(const MlpProblem& problem, int64_t block, float* packed) {
  const Block to = block_at(problem, packed, block);
  const int64_t first = block * block_channels(problem);
  const int64_t valid = block_valid(problem, block);
  const int64_t channels = problem.channels;
  const float* fc1 = problem.fc1_weight + first * channels;
  for (int64_t i = 0; i < block_channels(problem); ++i) {
    to.bias[i] = problem.fc1_bias && i < valid ? problem.fc1_bias[first + i] : 0.0f;
  }
  with_product(problem.product, [&](auto kind) {
    using Kind = decltype(kind);
    if constexpr (Kind::kScaled) {
      for (int64_t i = 0; i < round_up(valid, kPanel); i += kPanel) {
        pack_scaled(problem.norm_quantization, fc1 + i * channels, smaller(valid - i, kPanel),
                    channels, nullptr, nullptr, to.fc1 + i * input_words(problem), to.bias + i,
                    to.factor + i);
      }
    } else {
      pack<Kind>(fc1, channels, valid, channels, nullptr, nullptr, to.fc1);
    }
    pack_fc2<Kind>(problem, shared_in(problem, packed), first, valid, to.fc2);
  });
}

int64_t mlp_strip_size(const MlpProblem& problem, int64_t rows) {
  return strip_in(nullptr, problem, rows).size;
}

void mlp_strip(const MlpProblem& problem, const float* packed, int64_t first, int64_t last,
               float* scratch) {
  const int64_t rows = last - first;
  const Strip strip = strip_in(scratch, problem, rows);
  const int64_t channels = problem.channels;
  const Shared shared = shared_in(problem, packed);
  with_product(problem.product, [&](auto kind) {
    using Kind = decltype(kind);
    normalize<Kind>(problem, packed, first, last, strip.normalized);
    for (int64_t block = 0; block < mlp_blocks(problem); ++block) {
      const Block weights = block_at(problem, packed, block);
      for (int64_t column = 0; column < block_valid(problem, block); column += kPanel) {
        expand_panel<Kind>(problem, weights, column, rows, strip.normalized, strip.partial,
                           strip.tile);
      }
      project_block<Kind>(rows, channels, block_words(problem, block), strip.tile, weights.fc2,
                          shared.bias, block > 0, strip.sums, panelled(channels));
    }
    finish<Kind>(problem, shared, first, last, 0, channels, strip.sums, panelled(channels));
  });
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
  with_product(problem.product, [&](auto kind) {
    normalize<decltype(kind)>(problem, packed, first, last,
                              normalized + first * mlp_normalized_words(problem));
  });
}

void mlp_expand(const MlpProblem& problem, const float* packed, int64_t panel,
                const float* normalized, float* scratch, float* hidden) {
  const int64_t block = panel * kPanel / block_channels(problem);
  const int64_t column = panel * kPanel % block_channels(problem);
  with_product(problem.product, [&](auto kind) {
    expand_panel<decltype(kind)>(problem, block_at(problem, packed, block), column, problem.rows,
                                 normalized, scratch, hidden + block * problem.rows * kTilePitch);
  });
}

void mlp_project(const MlpProblem& problem, const float* packed, int64_t panel, const float* hidden,
                 float* scratch) {
  const int64_t column = panel * kPanel;
  const int64_t columns = smaller(problem.channels - column, kPanel);
  const Shared shared = shared_in(problem, packed);
  with_product(problem.product, [&](auto kind) {
    using Kind = decltype(kind);
    for (int64_t block = 0; block < mlp_blocks(problem); ++block) {
      const int64_t words = block_words(problem, block);
      project_block<Kind>(problem.rows, columns, words, hidden + block * problem.rows * kTilePitch,
                          block_at(problem, packed, block).fc2 + column * words,
                          shared.bias + column, block > 0, scratch, kPanel);
    }
    finish<Kind>(problem, shared, 0, problem.rows, column, columns, scratch, kPanel);
  });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
