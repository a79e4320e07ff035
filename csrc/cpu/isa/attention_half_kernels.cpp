// The attention half of a MOAT block without gradients, for the tokens of whole windows:
//   output = y + W_p softmax(scale Q K^T + bias) V + b_p,  (Q, K, V) = W_qkv norm(y) + b_qkv
// Memory moves y, the output and the weights once. A head's queries, keys and values go from the
// product that makes them to its attention in cache; only the normalised rows and the attended ones
// exist for all heads, and these stay in cache where the windows are of the usual size.

#include "cpu/common/attention_half_kernels.h"

#include "cpu/isa/layer_norm.h"
#include "cpu/isa/window_attention_head.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

enum Part { kQueries, kKeys, kValues, kParts };

// Floats of a token in a matrix of one head.
int64_t row_length(const AttentionHalf& problem) { return round_up(problem.head_dim, kWidth); }

// The packed weights of a head hold for each part its panels, [channels][kPanel] each, and the
// biases; those of a panel of proj [attended columns][kPanel] and the biases.
int64_t part_columns(const AttentionHalf& problem) { return round_up(problem.head_dim, kPanel); }
int64_t part_size(const AttentionHalf& problem) {
  return part_columns(problem) * (problem.channels + 1);
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

// Calls function(row, offset) for rows first to last of a unit: offset is that of the token's first
// channel in y.
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
      function(start + token, ((image + row) * problem.width + column) * problem.channels);
    });
    start += window.tokens();
  }
}

// One thread's working memory.
struct Buffers {
  float* weights;           // of a head or a panel of proj, if the caller has not packed them
  float* matrices[kParts];  // [rows][row_length]; packing the keys pads them to a whole panel
  float* keys;              // K^T of a window in panels
  float* scores;
  float* maxima;
  float* strips;
  int32_t* runs;
  float* result;  // [rows][kPanel]
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
    matrix = scratch.take((rows + kPanel) * row_length(problem));
  buffers.keys = scratch.take(tokens * row_length(problem));
  buffers.scores = scratch.take(kBlockTiles * kRows * tokens);
  buffers.maxima = scratch.take(kBlockTiles * kRows * kWidth);
  buffers.strips = scratch.take(problem.bias_table ? largest_strips(problem).size() : 0);
  buffers.runs = reinterpret_cast<int32_t*>(scratch.take(tokens));
  buffers.result = scratch.take(rows * kPanel);
  buffers.size = scratch.used;
  return buffers;
}

// Rows first to last of a unit's queries, keys or values of one head.
void make_part(const AttentionHalf& problem, Part part, const float* packed,
               const float* normalized, int64_t first, int64_t last, const Buffers& buffers) {
  const float* weights = packed + part * part_size(problem);
  gemm(last - first, problem.head_dim, problem.channels,
       {normalized + first * problem.channels, problem.channels, 1}, weights,
       problem.channels * kPanel, kPanel, buffers.matrices[part] + first * row_length(problem),
       row_length(problem), false, weights + part_columns(problem) * problem.channels);
}

// out = y + result [rows][kPanel] for rows first to last and `columns` channels from `column` on.
template <class Element>
void add_rows(const AttentionHalf& problem, const AttentionUnit& unit, int64_t first, int64_t last,
              int64_t column, int64_t columns, float* result, const Element* y) {
  Element* out = static_cast<Element*>(problem.result);
  for_rows(problem, unit, first, last, [&](int64_t, int64_t offset) {
    add(y + offset + column, columns, result);
    narrow(result, columns, out + offset + column);
    result += kPanel;
  });
}

}  // namespace

int64_t attention_half_head_size(const AttentionHalf& problem) {
  return kParts * part_size(problem);
}

int64_t attention_half_panel_size(const AttentionHalf& problem) {
  return (attention_half_attended_columns(problem) + 1) * kPanel;
}

int64_t attention_half_panels(const AttentionHalf& problem) {
  return divide_up(problem.channels, kPanel);
}

int64_t attention_half_attended_columns(const AttentionHalf& problem) {
  return problem.heads * row_length(problem);
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
  for (int64_t part = 0; part < kParts; ++part) {
    const int64_t first = (part * problem.heads + head) * problem.head_dim;
    // Queries come out in units of ln 2, as the exponentials are powers of 2.
    const float factor = part == kQueries ? problem.scale * kLog2E : 1.0f;
    float scale[kPanel];
    for (float& value : scale) value = factor;
    float* weights = packed + part * part_size(problem);
    for (int64_t column = 0; column < columns; column += kPanel) {
      pack_panel(problem.qkv_weight + (first + column) * problem.channels, problem.channels,
                 problem.head_dim - column, problem.channels, scale, nullptr,
                 weights + column * problem.channels);
    }
    float* bias = weights + columns * problem.channels;
    for (int64_t i = 0; i < columns; ++i) {
      bias[i] = problem.qkv_bias && i < problem.head_dim ? problem.qkv_bias[first + i] * factor : 0;
    }
  }
}

void attention_half_pack_panel(const AttentionHalf& problem, int64_t panel, float* packed) {
  const int64_t first = panel * kPanel;
  const int64_t depth = problem.heads * problem.head_dim;
  const int64_t padding = row_length(problem) - problem.head_dim;
  for (int64_t head = 0; head < problem.heads; ++head) {
    pack_panel(problem.proj_weight + first * depth + head * problem.head_dim, depth,
               problem.channels - first, problem.head_dim, nullptr, nullptr, packed);
    packed += problem.head_dim * kPanel;
    for (int64_t i = 0; i < padding * kPanel; ++i) *packed++ = 0.0f;
  }
  for (int64_t i = first; i < first + kPanel; ++i) {
    *packed++ = problem.proj_bias && i < problem.channels ? problem.proj_bias[i] : 0.0f;
  }
}

void attention_half_normalize(const AttentionHalf& problem, const AttentionUnit& unit,
                              int64_t first, int64_t last, float* normalized) {
  with_elements(problem.element, problem.y, [&](auto* y) {
    for_rows(problem, unit, first, last, [&](int64_t row, int64_t offset) {
      float* to = normalized + row * problem.channels;
      widen(y + offset, problem.channels, to);
      normalize_row(problem.channels, problem.eps, problem.norm_weight, problem.norm_bias, to);
    });
  });
}

void attention_half_attend(const AttentionHalf& problem, const AttentionUnit& unit, int64_t head,
                           int64_t block, int64_t blocks, const float* packed,
                           const float* normalized, float* scratch, float* attended) {
  const Buffers buffers = buffers_in(scratch, problem);
  if (!packed) {
    attention_half_pack_head(problem, head, buffers.weights);
    packed = buffers.weights;
  }
  const int64_t rows = rows_of(problem, unit);
  const int64_t first = rows * block / blocks;
  const int64_t last = rows * (block + 1) / blocks;
  make_part(problem, kQueries, packed, normalized, first, last, buffers);
  make_part(problem, kKeys, packed, normalized, 0, rows, buffers);
  make_part(problem, kValues, packed, normalized, 0, rows, buffers);
  const int64_t length = row_length(problem);
  const int64_t stride = attention_half_attended_columns(problem);
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
    with_head_dim(problem.head_dim, [&](auto head_dim) {
      pack_rows(buffers.matrices[kKeys] + start * length, tokens, head_dim, buffers.keys);
      const HeadForward<decltype(head_dim)> attention = {
          head_dim,
          tokens,
          problem.bias_table ? buffers.strips : nullptr,
          buffers.runs,
          buffers.matrices[kQueries] + start * length,
          buffers.keys,
          buffers.matrices[kValues] + start * length,
          buffers.scores,
          buffers.maxima,
          nullptr,
          attended + start * stride + head * length,
          stride};
      attention.attend(larger(first - start, 0), smaller(last - start, tokens));
    });
  }
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
  const int64_t depth = attention_half_attended_columns(problem);
  const int64_t column = panel * kPanel;
  const int64_t columns = smaller(problem.channels - column, kPanel);
  gemm(last - first, columns, depth, {attended + first * depth, depth, 1}, packed, depth * kPanel,
       kPanel, buffers.result, kPanel, false, packed + depth * kPanel);
  with_elements(problem.element, problem.y, [&](auto* y) {
    add_rows(problem, unit, first, last, column, columns, buffers.result, y);
  });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
