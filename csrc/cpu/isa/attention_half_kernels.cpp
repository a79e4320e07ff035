// The attention half of a MOAT block without gradients, for the tokens of whole windows:
//   output = y + W_p softmax(scale Q K^T + bias) V + b_p,  (Q, K, V) = W_qkv norm(y) + b_qkv
// Memory moves y, the output and the weights once. A head's queries, keys and values go from the
// product that makes them to its attention in cache; only the normalised rows and the attended ones
// exist for all heads, and these stay in cache where the windows are of the usual size. With a pool
// the shortcut's product is a part of proj's: its operand lies behind the heads in each row.

#include "cpu/common/attention_half_kernels.h"

#include "cpu/isa/layer_norm.h"
#include "cpu/isa/pack_bytes.h"
#include "cpu/isa/pooling.h"
#include "cpu/isa/window_attention_head.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

enum Part { kQueries, kKeys, kValues, kParts };

// Columns of a head's queries, keys, values and results, of which the last may not exist.
int64_t head_columns(const AttentionHalf& problem) { return round_up(problem.head_dim, kWidth); }

// The packed weights of a head hold for each part its panels, [words of the channels][kPanel] each,
// and the biases; those of a panel of proj [attended words][kPanel] and the biases. Behind biases
// lie the factors of bytes.
int64_t part_columns(const AttentionHalf& problem) { return round_up(problem.head_dim, kPanel); }
int64_t part_size(const AttentionHalf& problem) {
  return part_columns(problem) * (attention_half_normalized_words(problem) + 2);
}

int64_t most_rows_of_unit(const AttentionHalf& problem) {
  return problem.windows_per_unit * most_tokens(problem);
}

int64_t rows_of(const AttentionHalf& problem, const AttentionUnit& unit) {
  int64_t rows = 0;
  for (int64_t index = unit.first_window; index < unit.last_window; ++index) {
    rows += window_at(problem, index).tokens();
  }
  return rows;
}

bool pools(const AttentionHalf& problem) { return problem.pool.kind != PoolKind::none; }

// Words of a row of attended before those of the pooled y.
int64_t heads_words(const AttentionHalf& problem) {
  return problem.heads * words_of(problem.product, head_columns(problem));
}

// Calls function(row, pixel) for rows first to last of a unit: the token's pixel of the result.
template <class Function>
void for_rows(const AttentionHalf& problem, const AttentionUnit& unit, int64_t first, int64_t last,
              Function&& function) {
  int64_t start = 0;
  for (int64_t index = unit.first_window; index < unit.last_window; ++index) {
    const Window window = window_at(problem, index);
    const int64_t image = window.image * problem.height;
    const int64_t begin = larger(first - start, 0);
    const int64_t end = smaller(last - start, window.tokens());
    for_tokens(window, begin, end, [&](int64_t token, int64_t row, int64_t column) {
      function(start + token, (image + row) * problem.width + column);
    });
    start += window.tokens();
  }
}

// One thread's working memory.
struct Buffers {
  float* weights;           // of a head or a panel of proj, if the caller has not packed them
  float* matrices[kParts];  // [rows][head_columns]; packing the keys pads them to a whole panel
  float* keys;              // K^T of a window in panels
  float* values;            // V of a window in words, where these are of several tokens
  float* scores;
  float* maxima;
  float* strips;
  int32_t* runs;
  float* result;  // [rows][kPanel]
  float* pixel;   // of y, normalised, and the pooled one
  float* pooled;
  int64_t size;
};

Buffers buffers_in(float* memory, const AttentionHalf& problem) {
  const int64_t tokens = round_up(most_tokens(problem), kPanel);
  const int64_t rows = most_rows_of_unit(problem);
  Scratch scratch{memory};
  Buffers buffers;
  buffers.weights =
      scratch.take(larger(attention_half_head_size(problem), attention_half_panel_size(problem)));
  for (float*& matrix : buffers.matrices)
    matrix = scratch.take((rows + kPanel) * head_columns(problem));
  buffers.keys = scratch.take(tokens * head_columns(problem));
  buffers.values = scratch.take(tokens * head_columns(problem));
  buffers.scores = scratch.take(scores_size(tokens));
  buffers.maxima = scratch.take(kBlockQueries * kWidth);
  buffers.strips = scratch.take(problem.bias_table ? largest_strips(problem).size() : 0);
  buffers.runs = reinterpret_cast<int32_t*>(scratch.take(tokens));
  buffers.result = scratch.take(rows * kPanel);
  buffers.pixel = scratch.take(pools(problem) ? problem.in_channels : 0);
  buffers.pooled = scratch.take(pools(problem) ? problem.in_channels : 0);
  buffers.size = scratch.used;
  return buffers;
}

// Rows first to last of a unit's queries, keys or values of one head, as floats.
template <class Kind>
void make_part(const AttentionHalf& problem, Part part, const float* packed,
               const float* normalized, int64_t first, int64_t last, const Buffers& buffers) {
  const float* weights = packed + part * part_size(problem);
  const int64_t words = attention_half_normalized_words(problem);
  const int64_t columns = head_columns(problem);
  const float* bias = weights + part_columns(problem) * words;
  float* to = buffers.matrices[part] + first * columns;
  gemm<Kind>(last - first, problem.head_dim, words, {normalized + first * words, words, 1}, weights,
             words * kPanel, kPanel, to, columns, false, Kind::kScaled ? nullptr : bias);
  to_numbers<Kind>(last - first, problem.head_dim, columns, bias + part_columns(problem), bias, to);
}

// Rows first to last of queries or keys [rows][head_columns] -> [rows][row_words], in place.
template <class Kind>
void round_rows(const AttentionHalf& problem, int64_t first, int64_t last, float* matrix) {
  if constexpr (Kind::kPerWord > 1) {
    const int64_t columns = head_columns(problem);
    const int64_t words = row_words<Kind>(problem.head_dim);
    for (int64_t row = first; row < last; ++row) {
      to_words<Kind>(matrix + row * columns, columns, matrix + row * words);
      for (int64_t i = words_of<Kind>(columns); i < words; ++i) matrix[row * words + i] = 0.0f;
    }
  }
}

// out = y + result [rows][kPanel] for rows first to last and `columns` channels from `column` on;
// with a pool, whose result is whole, without y.
template <class Element>
void add_rows(const AttentionHalf& problem, const AttentionUnit& unit, int64_t first, int64_t last,
              int64_t column, int64_t columns, float* result, const Element* y) {
  Element* out = static_cast<Element*>(problem.result);
  for_rows(problem, unit, first, last, [&](int64_t, int64_t pixel) {
    const int64_t place = pixel * problem.channels + column;
    if (!pools(problem)) add(y + place, columns, result);
    narrow(result, columns, out + place);
    result += kPanel;
  });
}

}  // namespace

int64_t attention_half_head_size(const AttentionHalf& problem) {
  return kParts * part_size(problem);
}

int64_t attention_half_panel_size(const AttentionHalf& problem) {
  return (attention_half_attended_words(problem) + 2) * kPanel;
}

int64_t attention_half_panels(const AttentionHalf& problem) {
  return divide_up(problem.channels, kPanel);
}

int64_t attention_half_normalized_words(const AttentionHalf& problem) {
  return words_of(problem.product, problem.in_channels);
}

int64_t attention_half_attended_words(const AttentionHalf& problem) {
  return heads_words(problem) + (pools(problem) ? attention_half_normalized_words(problem) : 0);
}

int64_t attention_half_scratch_size(const AttentionHalf& problem) {
  return buffers_in(nullptr, problem).size;
}

void attention_half_resize(const AttentionHalf& problem, int64_t head, float* bias_table) {
  const int64_t height = 2 * problem.window_height - 1;
  const int64_t width = 2 * problem.window_width - 1;
  const float* source =
      problem.position_table + head * problem.position_height * problem.position_width;
  float* to = bias_table + head * height * width;
  // Half-pixel centres: where a place of the result lies among those of the source.
  struct Place {
    int64_t first, second;
    float fraction;
  };
  const auto place_of = [](int64_t i, int64_t count, int64_t source_count) {
    const float ratio = static_cast<float>(source_count) / static_cast<float>(count);
    const float centre = ratio * (static_cast<float>(i) + 0.5f) - 0.5f;
    const float at = centre > 0.0f ? centre : 0.0f;
    const int64_t first = smaller(static_cast<int64_t>(at), source_count - 1);
    return Place{first, smaller(first + 1, source_count - 1), at - static_cast<float>(first)};
  };
  for (int64_t row = 0; row < height; ++row) {
    const Place y = place_of(row, height, problem.position_height);
    const float* upper = source + y.first * problem.position_width;
    const float* lower = source + y.second * problem.position_width;
    for (int64_t column = 0; column < width; ++column) {
      const Place x = place_of(column, width, problem.position_width);
      const float above = (1.0f - x.fraction) * upper[x.first] + x.fraction * upper[x.second];
      const float below = (1.0f - x.fraction) * lower[x.first] + x.fraction * lower[x.second];
      *to++ = (1.0f - y.fraction) * above + y.fraction * below;
    }
  }
}

void attention_half_pack_head(const AttentionHalf& problem, int64_t head, float* packed) {
  const int64_t columns = part_columns(problem);
  const int64_t words = attention_half_normalized_words(problem);
  for (int64_t part = 0; part < kParts; ++part) {
    const int64_t first = (part * problem.heads + head) * problem.head_dim;
    // Queries come out in units of ln 2, as the exponentials are powers of 2.
    const float factor = part == kQueries ? problem.scale * kLog2E : 1.0f;
    float scale[kPanel];
    for (float& value : scale) value = factor;
    float* weights = packed + part * part_size(problem);
    float* bias = weights + columns * words;
    for (int64_t i = 0; i < columns; ++i) {
      bias[i] = problem.qkv_bias && i < problem.head_dim ? problem.qkv_bias[first + i] * factor : 0;
    }
    with_product(problem.product, [&](auto kind) {
      using Kind = decltype(kind);
      for (int64_t column = 0; column < columns; column += kPanel) {
        const int64_t count = smaller(problem.head_dim - column, kPanel);
        const float* source = problem.qkv_weight + (first + column) * problem.in_channels;
        float* panel = weights + column * words;
        if constexpr (Kind::kScaled) {
          pack_scaled(problem.norm_quantization, source, count, problem.in_channels, scale, nullptr,
                      panel, bias + column, bias + columns + column);
        } else {
          pack<Kind>(source, problem.in_channels, count, problem.in_channels, scale, nullptr,
                     panel);
        }
      }
    });
  }
}

void attention_half_pack_panel(const AttentionHalf& problem, int64_t panel, float* packed) {
  const int64_t first = panel * kPanel;
  const int64_t depth = problem.heads * problem.head_dim;
  const int64_t words = attention_half_attended_words(problem);
  const int64_t columns = smaller(problem.channels - first, kPanel);
  const float* source = problem.proj_weight + first * depth;
  float* bias = packed + words * kPanel;
  for (int64_t i = 0; i < kPanel; ++i) {
    bias[i] = problem.proj_bias && i < columns ? problem.proj_bias[first + i] : 0.0f;
    if (problem.shortcut_bias && i < columns) bias[i] += problem.shortcut_bias[first + i];
  }
  for (int64_t i = 0; i < words * kPanel; ++i) packed[i] = 0.0f;
  with_product(problem.product, [&](auto kind) {
    using Kind = decltype(kind);
    const int64_t head_words = words_of<Kind>(head_columns(problem)) * kPanel;
    if constexpr (Kind::kScaled) {
      for (int64_t i = 0; i < kPanel; ++i) {
        bias[kPanel + i] = 0.0f;
        if (i >= columns) continue;
        const WeightColumn column = {source + i * depth, depth, 1.0f, nullptr};
        const float scale = column.scale();
        for (int64_t head = 0; head < problem.heads; ++head) {
          const WeightColumn part = {column.source + head * problem.head_dim, problem.head_dim,
                                     1.0f, nullptr};
          part.pack(scale, i, packed + head * head_words);
        }
        const FactorAndShift number =
            to_number(problem.attended_quantization, scale, column.sum(scale), bias[i]);
        bias[i] = number.shift;
        bias[kPanel + i] = number.factor;
      }
    } else {
      for (int64_t head = 0; head < problem.heads; ++head) {
        pack<Kind>(source + head * problem.head_dim, depth, columns, problem.head_dim, nullptr,
                   nullptr, packed + head * head_words);
      }
      if (pools(problem)) {
        pack<Kind>(problem.shortcut_weight + first * problem.in_channels, problem.in_channels,
                   columns, problem.in_channels, nullptr, nullptr,
                   packed + heads_words(problem) * kPanel);
      }
    }
  });
}

void attention_half_normalize(const AttentionHalf& problem, const AttentionUnit& unit,
                              int64_t first, int64_t last, float* normalized) {
  const int64_t words = attention_half_normalized_words(problem);
  with_elements(problem.element, problem.y, [&](auto* y) {
    for_rows(problem, unit, first, last, [&](int64_t row, int64_t pixel) {
      with_product(problem.product, [&](auto kind) {
        using Kind = decltype(kind);
        auto* to = elements_of<Kind>(normalized + row * words);
        normalize_row(problem.channels, problem.eps, problem.norm_weight, problem.norm_bias,
                      y + pixel * problem.channels,
                      typename Kind::Writer(to, problem.norm_quantization));
        for (int64_t i = problem.channels; i < words * Kind::kPerWord; ++i) to[i] = {};
      });
    });
  });
}

void attention_half_pool(const AttentionHalf& problem, const AttentionUnit& unit, int64_t first,
                         int64_t last, float* scratch, float* normalized, float* attended) {
  const Buffers buffers = buffers_in(scratch, problem);
  const int64_t channels = problem.in_channels;
  const int64_t size = problem.in_height * problem.in_width * channels;
  const int64_t result_size = problem.height * problem.width;
  with_elements(problem.element, problem.y, [&](auto* y) {
    for_rows(problem, unit, first, last, [&](int64_t row, int64_t pixel) {
      const auto* maps = y + pixel / result_size * size;
      const int64_t place = pixel % result_size;
      const auto pool = [&](auto&& values_of, float* to) {
        pool_pixel(problem.pool, problem.in_height, problem.in_width, channels,
                   place / problem.width, place % problem.width, buffers.pooled, values_of);
        with_unscaled_product(problem.product, [&](auto kind) {
          to_words<decltype(kind)>(buffers.pooled, channels, to);
        });
      };
      const auto normalize = [&](int64_t at) -> const float* {
        normalize_row(channels, problem.eps, problem.norm_weight, problem.norm_bias,
                      maps + at * channels, Rounded<float>(buffers.pixel));
        return buffers.pixel;
      };
      pool(normalize, normalized + row * attention_half_normalized_words(problem));
      pool([&](int64_t at) { return maps + at * channels; },
           attended + row * attention_half_attended_words(problem) + heads_words(problem));
    });
  });
}

namespace {

template <class Kind>
void attend(const AttentionHalf& problem, const AttentionUnit& unit, int64_t head, int64_t block,
            int64_t blocks, const float* packed, const float* normalized, const Buffers& buffers,
            float* attended) {
  const int64_t rows = rows_of(problem, unit);
  const int64_t first = rows * block / blocks;
  const int64_t last = rows * (block + 1) / blocks;
#if defined(__AMX_TILE__)
  const TileRegisters registers;  // of all its products
#endif
  make_part<Kind>(problem, kQueries, packed, normalized, first, last, buffers);
  make_part<Kind>(problem, kKeys, packed, normalized, 0, rows, buffers);
  make_part<Kind>(problem, kValues, packed, normalized, 0, rows, buffers);
  using Side = typename Kind::Side;
  round_rows<Side>(problem, first, last, buffers.matrices[kQueries]);
  round_rows<Side>(problem, 0, rows, buffers.matrices[kKeys]);
  const int64_t length = row_words<Side>(problem.head_dim);
  const int64_t columns = head_columns(problem);
  const int64_t stride = attention_half_attended_words(problem) * Kind::kPerWord;
  BiasStrips strips;
  // From the last window to the first: padding the keys of one overwrites those of the next.
  int64_t start = rows;
  for (int64_t index = unit.last_window - 1; index >= unit.first_window; --index) {
    const Window window = window_at(problem, index);
    const int64_t tokens = window.tokens();
    start -= tokens;
    if (problem.bias_table && !strips.fit(window)) {
      strips = BiasStrips(window);
      strips.list_runs(buffers.runs);
      strips.expand(problem, problem.bias_table + head * table_size(problem), buffers.strips);
    }
    float* rows_of_values = buffers.matrices[kValues] + start * columns;
    float* values = Side::kPerWord > 1 ? buffers.values : rows_of_values;
    rows_to_token_words<Side>(rows_of_values, tokens, columns, values);
    with_head_dim(problem.head_dim, [&](auto head_dim) {
      pack_rows<Side>(buffers.matrices[kKeys] + start * length, tokens, head_dim, buffers.keys);
      using Writer = typename Kind::Writer;
      auto* out = elements_of<Kind>(attended) + start * stride + head * columns;
      const HeadForward<decltype(head_dim), Side, Writer> attention = {
          head_dim,
          tokens,
          problem.bias_table ? buffers.strips : nullptr,
          buffers.runs,
          buffers.matrices[kQueries] + start * length,
          buffers.keys,
          values,
          buffers.scores,
          buffers.maxima,
          nullptr,
          Writer(out, problem.attended_quantization),
          stride};
      attention.attend(larger(first - start, 0), smaller(last - start, tokens));
    });
  }
}

}  // namespace

void attention_half_attend(const AttentionHalf& problem, const AttentionUnit& unit, int64_t head,
                           int64_t block, int64_t blocks, const float* packed,
                           const float* normalized, float* scratch, float* attended) {
  const Buffers buffers = buffers_in(scratch, problem);
  if (!packed) {
    attention_half_pack_head(problem, head, buffers.weights);
    packed = buffers.weights;
  }
  with_product(problem.product, [&](auto kind) {
    attend<decltype(kind)>(problem, unit, head, block, blocks, packed, normalized, buffers,
                           attended);
  });
}

void attention_half_project(const AttentionHalf& problem, const AttentionUnit& unit, int64_t panel,
                            int64_t block, int64_t blocks, const float* packed,
                            const float* attended, float* scratch) {
  const Buffers buffers = buffers_in(scratch, problem);
  const int64_t rows = rows_of(problem, unit);
  const int64_t first = rows * block / blocks;
  const int64_t last = rows * (block + 1) / blocks;
  if (!packed) {
    attention_half_pack_panel(problem, panel, buffers.weights);
    packed = buffers.weights;
  }
  const int64_t depth = attention_half_attended_words(problem);
  const int64_t column = panel * kPanel;
  const int64_t columns = smaller(problem.channels - column, kPanel);
  const float* bias = packed + depth * kPanel;
  with_product(problem.product, [&](auto kind) {
    using Kind = decltype(kind);
    gemm<Kind>(last - first, columns, depth, {attended + first * depth, depth, 1}, packed,
               depth * kPanel, kPanel, buffers.result, kPanel, false,
               Kind::kScaled ? nullptr : bias);
    to_numbers<Kind>(last - first, columns, kPanel, bias + kPanel, bias, buffers.result);
  });
  with_elements(problem.element, problem.y, [&](auto* y) {
    add_rows(problem, unit, first, last, column, columns, buffers.result, y);
  });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
