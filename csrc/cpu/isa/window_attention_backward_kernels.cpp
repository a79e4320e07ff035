// Backward window attention, for each window and head, with G the gradient of the output and
// P = exp(scale Q K^T + bias - log_sum_exp) recomputed:
//
//   dV = P^T G,  dS = P (G V^T - rowsum(G output)),  dQ = scale dS K,  dK = scale dS^T Q,
//   d(table[key - query]) = sum of dS over the windows and the pairs of that offset
//
// Reads qkv, the output, its gradient and log_sum_exp once, writes the gradient of qkv once. The
// operands of one window and head stay in L2; P and dS exist for one block of queries at a time. A
// few heads are read together, as their channels lie side by side and alone are too short to
// stream. Maps in bfloat16 are multiplied in it where the CPU does, P and dS as well; the rest is
// in floats.

#include "cpu/common/window_attention_kernels.h"
#include "cpu/isa/window_attention_head_backward.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

// One thread's working memory.
struct Buffers {
  float* strips;  // Per head, as are the next ones up to `dots`.
  float* strip_gradients;
  float* queries;  // Rows of floats, then their gradients, as are the next two.
  float* keys;
  float* output_gradients;  // Then the values' gradients.
  float* packed_keys;       // K^T and V^T in panels.
  float* packed_values;
  // In words, where these are no floats; else the above. First of the rows, then of the tokens.
  float* query_words;
  float* output_gradient_words;
  float* query_token_words;
  float* key_token_words;
  float* output_gradient_token_words;
  float* dots;  // -rowsum(G output).
  float* log_sum_exp;
  float* key_gradients;
  float* value_gradients;
  float* weights;  // P and dS of a block of queries; the second half for words of the queries.
  float* score_gradients;
  int32_t* runs;  // Where a query's bias starts in the strips.
  int64_t scores_size;
  int64_t strips_size;
  int64_t matrix_size;
  int64_t tokens_size;
  int64_t size;
};

template <class Kind>
Buffers buffers_in(float* memory, const WindowAttentionBackward& problem) {
  const int64_t tokens = round_up(most_tokens(problem), kPanel);
  const int64_t length = round_up(problem.head_dim, kWidth);
  const int64_t heads = problem.heads_per_unit;
  Scratch scratch{memory};
  Buffers buffers;
  buffers.strips_size = round_up(largest_strips(problem).size(), kPanel);
  buffers.matrix_size = tokens * length;
  buffers.tokens_size = tokens;
  buffers.strips = scratch.take(heads * buffers.strips_size);
  buffers.strip_gradients = scratch.take(heads * buffers.strips_size);
  float** const matrices[] = {&buffers.queries, &buffers.keys, &buffers.output_gradients,
                              &buffers.packed_keys, &buffers.packed_values};
  for (float** matrix : matrices) {
    *matrix = scratch.take(heads * buffers.matrix_size);
  }
  buffers.query_words = buffers.query_token_words = buffers.queries;
  buffers.output_gradient_words = buffers.output_gradient_token_words = buffers.output_gradients;
  buffers.key_token_words = buffers.keys;
  if (Kind::kPerWord > 1) {
    float** const words[] = {&buffers.query_words, &buffers.output_gradient_words,
                             &buffers.query_token_words, &buffers.key_token_words,
                             &buffers.output_gradient_token_words};
    for (float** matrix : words) *matrix = scratch.take(heads * buffers.matrix_size);
  }
  buffers.dots = scratch.take(heads * tokens);
  buffers.log_sum_exp = scratch.take(tokens);
  buffers.key_gradients = scratch.take(buffers.matrix_size);
  buffers.value_gradients = scratch.take(buffers.matrix_size);
  buffers.scores_size = largest_block<Kind>(tokens);
  buffers.weights = scratch.take(buffers.scores_size);
  buffers.score_gradients = scratch.take(buffers.scores_size);
  buffers.runs = reinterpret_cast<int32_t*>(scratch.take(tokens));
  buffers.size = scratch.used;
  return buffers;
}

// Some heads of a window.
template <class HeadDim, class Kind>
struct WindowBackward {
  const WindowAttentionBackward& problem;
  const Buffers& buffers;
  const Window& window;
  HeadDim head_dim;
  int64_t first_head;
  int64_t heads;

  HeadRows<HeadDim> rows() const { return {problem, window, head_dim, heads, buffers.matrix_size}; }
  int64_t qkv_channel(int64_t part) const {
    return first_head * problem.head_stride + part * problem.part_stride;
  }

  void load_operands() const {
    const int64_t tokens = window.tokens();
    const int64_t output_channel = first_head * head_dim;
    const auto read_qkv = [&](int64_t part, float factor, float* destination) {
      rows().read(problem.qkv, qkv_channel(part), problem.head_stride, 0, tokens, factor,
                  destination);
    };
    const int64_t length = rows().row_length();
    const auto to_words = [&](const float* from, float* to) {
      rows_to_words<Kind>(from, tokens, length, head_dim, to);
    };
    const auto to_token_words = [&](const float* from, float* to) {
      rows_to_token_words<Kind>(from, tokens, length, to);
    };
    // On tiles the transpose follows, whose words are the same.
    const auto to_both_words = [&](const float* from, float* to) {
      to_token_words(from, to);
#if defined(__AMX_TILE__)
      if constexpr (kOnTiles<Kind>) {
        const int64_t words = depth_words<Kind>(tokens);
        transpose_words({to, 1, length}, length, words, {to + words * length, words});
      }
#endif
    };
    // The values' rows and the output's pass through the memory of others.
    float* values = buffers.output_gradients;
    float* outputs = buffers.keys;
    read_qkv(2, 1.0f, values);
    for_heads([&](int64_t, int64_t at) {
      to_words(values + at, values + at);
      pack_rows<Kind>(values + at, tokens, head_dim, buffers.packed_values + at);
    });
    rows().read(problem.output, output_channel, head_dim, 0, tokens, 1.0f, outputs);
    rows().read(problem.output_gradient, output_channel, head_dim, 0, tokens, 1.0f,
                buffers.output_gradients);
    for_heads([&](int64_t head, int64_t at) {
      dot_rows(outputs + at, buffers.output_gradients + at,
               buffers.dots + head * buffers.tokens_size);
      to_words(buffers.output_gradients + at, buffers.output_gradient_words + at);
      to_both_words(buffers.output_gradients + at, buffers.output_gradient_token_words + at);
    });
    read_qkv(1, 1.0f, buffers.keys);
    for_heads([&](int64_t, int64_t at) {
      to_token_words(buffers.keys + at, buffers.key_token_words + at);
      to_words(buffers.keys + at, buffers.keys + at);
      pack_rows<Kind>(buffers.keys + at, tokens, head_dim, buffers.packed_keys + at);
    });
    read_qkv(0, problem.scale * kLog2E, buffers.queries);
    for_heads([&](int64_t, int64_t at) {
      to_words(buffers.queries + at, buffers.query_words + at);
      to_both_words(buffers.queries + at, buffers.query_token_words + at);
    });
  }

  // Calls function(head, offset of its matrices) for each head.
  template <class Function>
  void for_heads(Function&& function) const {
    for (int64_t head = 0; head < heads; ++head) function(head, head * buffers.matrix_size);
  }

  // -rowsum(outputs gradients)
  void dot_rows(const float* outputs, const float* gradients, float* dots) const {
    const int64_t length = rows().row_length();
    for (int64_t token = 0; token < window.tokens(); ++token) {
      Vec dot = {};
      for (int64_t i = token * length; i < (token + 1) * length; i += kWidth) {
        dot = fma(load(gradients + i), load(outputs + i), dot);
      }
      dots[token] = -sum_of_lanes(dot);
    }
  }

  void differentiate_head(int64_t head) const {
    const int64_t tokens = window.tokens();
    const float* log_sum_exp =
        problem.log_sum_exp +
        (window.image * problem.heads + first_head + head) * problem.height * problem.width;
    for_tokens(window, 0, tokens, [&](int64_t token, int64_t row, int64_t column) {
      buffers.log_sum_exp[token] = log_sum_exp[row * problem.width + column];
    });
    const auto of_head = [&](float* matrices) { return matrices + head * buffers.matrix_size; };
    HeadBackward<HeadDim, Kind>{
        head_dim,
        tokens,
        problem.bias_table ? buffers.strips + head * buffers.strips_size : nullptr,
        problem.table_gradients ? buffers.strip_gradients + head * buffers.strips_size : nullptr,
        buffers.runs,
        of_head(buffers.query_words),
        of_head(buffers.query_token_words),
        of_head(buffers.key_token_words),
        of_head(buffers.output_gradient_words),
        of_head(buffers.output_gradient_token_words),
        of_head(buffers.packed_keys),
        of_head(buffers.packed_values),
        buffers.dots + head * buffers.tokens_size,
        buffers.log_sum_exp,
        of_head(buffers.queries),
        buffers.key_gradients,
        buffers.value_gradients,
        buffers.weights,
        buffers.score_gradients,
        buffers.scores_size}
        .differentiate();
    copy(buffers.key_gradients, of_head(buffers.keys));
    copy(buffers.value_gradients, of_head(buffers.output_gradients));
  }

  // Gradients of keys or values: rows of them or, on tiles, their transpose.
  void copy(const float* source, float* destination) const {
#if defined(__AMX_TILE__)
    if constexpr (kOnTiles<Kind>) {
      const int64_t length = rows().row_length();
      const Strided transposed = {source, 1, round_up(window.tokens(), kPanel)};
      return transpose_words(transposed, window.tokens(), length, {destination, length});
    }
#endif
    const int64_t size = window.tokens() * rows().row_length();
    for (int64_t i = 0; i < size; i += kWidth) store(destination + i, load(source + i));
  }

  void write_gradients() const {
    const auto write = [&](int64_t part, float factor, float* source) {
      rows().template write<FloatProduct>(problem.qkv_gradient, qkv_channel(part),
                                          problem.head_stride, 0, window.tokens(), factor, source);
    };
    write(0, problem.scale, buffers.queries);
    // The queries carried scale * log2(e).
    write(1, kLn2, buffers.keys);
    write(2, 1.0f, buffers.output_gradients);
  }
};

void clear(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = 0.0f;
}

// The tables of some heads in strips, and the gradients of these.
struct HeadStrips {
  const WindowAttentionBackward& problem;
  const Buffers& buffers;
  int64_t first_head;
  int64_t heads;
  float* table_gradients;  // Of these heads, or null.
  BiasStrips strips;

  void prepare(const Window& window) {
    if (strips.fit(window)) return;
    finish();
    strips = BiasStrips(window);
    strips.list_runs(buffers.runs);
    for (int64_t head = 0; head < heads; ++head) {
      strips.expand(problem, problem.bias_table + (first_head + head) * table_size(problem),
                    buffers.strips + head * buffers.strips_size);
      if (table_gradients) {
        clear(buffers.strip_gradients + head * buffers.strips_size, strips.size());
      }
    }
  }

  // Adds what the strips gathered to the tables' gradients.
  void finish() const {
    if (!table_gradients) return;
    for (int64_t head = 0; head < heads; ++head) {
      strips.fold(problem, buffers.strip_gradients + head * buffers.strips_size,
                  table_gradients + head * table_size(problem));
    }
  }
};

template <class Kind>
void compute_units(const WindowAttentionBackward& problem, int64_t begin, int64_t end,
                   float* scratch) {
  const Buffers buffers = buffers_in<Kind>(scratch, problem);
  const int64_t groups = divide_up(problem.heads, problem.heads_per_unit);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit / groups;
    const int64_t group = unit % groups;
    const int64_t first_head = problem.heads * group / groups;
    const int64_t heads = problem.heads * (group + 1) / groups - first_head;
    float* table_gradients = nullptr;
    if (problem.table_gradients) {
      table_gradients =
          problem.table_gradients + (chunk * problem.heads + first_head) * table_size(problem);
      clear(table_gradients, heads * table_size(problem));
    }
    HeadStrips strips = {problem, buffers, first_head, heads, table_gradients, {}};
    for (int64_t index = first_window(problem, chunk); index < first_window(problem, chunk + 1);
         ++index) {
      const Window window = window_at(problem, index);
      if (problem.bias_table) strips.prepare(window);
      with_head_dim(problem.head_dim, [&](auto head_dim) {
        const WindowBackward<decltype(head_dim), Kind> backward = {problem,  buffers,    window,
                                                                   head_dim, first_head, heads};
        backward.load_operands();
        for (int64_t head = 0; head < heads; ++head) {
          backward.differentiate_head(head);
        }
        backward.write_gradients();
      });
    }
    strips.finish();
  }
}

}  // namespace

int64_t window_attention_backward_scratch(const WindowAttentionBackward& problem) {
  int64_t size = 0;
  with_unscaled_product(product_of(problem), [&](auto kind) {
    size = buffers_in<decltype(kind)>(nullptr, problem).size;
  });
  return size;
}

void window_attention_backward(const WindowAttentionBackward& problem, int64_t begin, int64_t end,
                               float* scratch) {
  with_unscaled_product(product_of(problem), [&](auto kind) {
    compute_units<decltype(kind)>(problem, begin, end, scratch);
  });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
