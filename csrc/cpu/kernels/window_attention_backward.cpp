// Backward window attention, for each window and head, with G the gradient of the output and
// P = exp(scale Q K^T + bias - log_sum_exp) recomputed:
//
//   dV = P^T G,  dS = P (G V^T - rowsum(G output)),  dQ = scale dS K,  dK = scale dS^T Q,
//   d(table[key - query]) = sum of dS over the windows and the pairs of that offset
//
// Reads qkv, the output, its gradient and log_sum_exp once, writes the gradient of qkv once. The
// operands of one window and head stay in L2; P and dS exist for one block of queries at a time.

#include "cpu/kernels/window_attention.h"
#include "cpu/kernels/window_attention_tiles.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

// Floats of P, and as many of dS, held at a time: together they take half of a 256 KB L2 cache.
constexpr int64_t kBlockFloats = 16384;
constexpr int64_t kMostBlockRows = 64;

int64_t block_rows(int64_t tokens) {
  const int64_t fitting = kBlockFloats / round_up(tokens, kPanel) / kRows * kRows;
  return smaller(kMostBlockRows, larger(kRows, fitting));
}

// One thread's working memory.
struct Buffers {
  float* strips;
  float* strip_gradients;
  float* queries;
  float* keys;
  float* output_gradients;
  float* packed_keys;  // K^T and V^T in panels.
  float* packed_values;
  float* key_gradients;
  float* value_gradients;
  float* weights;  // P and dS of a block of queries, and its dQ.
  float* score_gradients;
  float* query_gradients;
  float* log_sum_exp;
  float* dots;  // -rowsum(G output).
  int64_t size;
};

Buffers buffers_in(float* memory, const WindowAttention& problem) {
  const int64_t tokens = round_up(most_tokens(problem), kPanel);
  const int64_t length = round_up(problem.head_dim, kWidth);
  const int64_t strips = largest_strips(problem).size();
  const int64_t rows = block_rows(tokens);
  Scratch scratch{memory};
  Buffers buffers;
  buffers.strips = scratch.take(strips);
  buffers.strip_gradients = scratch.take(strips);
  for (float** matrix :
       {&buffers.queries, &buffers.keys, &buffers.output_gradients, &buffers.packed_keys,
        &buffers.packed_values, &buffers.key_gradients, &buffers.value_gradients}) {
    *matrix = scratch.take(tokens * length);
  }
  buffers.weights = scratch.take(rows * tokens);
  buffers.score_gradients = scratch.take(rows * tokens);
  buffers.query_gradients = scratch.take(rows * length);
  buffers.log_sum_exp = scratch.take(tokens);
  buffers.dots = scratch.take(tokens);
  buffers.size = scratch.used;
  return buffers;
}

struct HeadBackward {
  const WindowAttentionBackward& problem;
  const Buffers& buffers;
  const Window& window;
  const BiasStrips& strips;
  int64_t head;

  int64_t tokens() const { return window.tokens(); }
  int64_t scores_stride() const { return round_up(tokens(), kPanel); }
  HeadRows rows() const { return {problem, window}; }
  int64_t row_length() const { return rows().row_length(); }
  int64_t qkv_channel(int64_t part) const {
    return head * problem.head_stride + part * problem.part_stride;
  }

  void load_operands() const {
    const HeadRows all = rows();
    const int64_t output_channel = head * problem.head_dim;
    // The values' rows, then the output's, pass through memory that the gradients take later.
    float* values = buffers.value_gradients;
    float* outputs = buffers.key_gradients;
    all.read(problem.qkv, qkv_channel(0), 0, tokens(), problem.scale * kLog2E, buffers.queries);
    all.read(problem.qkv, qkv_channel(1), 0, tokens(), 1.0f, buffers.keys);
    all.read(problem.qkv, qkv_channel(2), 0, tokens(), 1.0f, values);
    all.read(problem.output_gradient, output_channel, 0, tokens(), 1.0f, buffers.output_gradients);
    all.read(problem.output, output_channel, 0, tokens(), 1.0f, outputs);
    pack_rows(buffers.keys, buffers.packed_keys);
    pack_rows(values, buffers.packed_values);
    const float* log_sum_exp = problem.log_sum_exp + (window.image * problem.heads + head) *
                                                         problem.height * problem.width;
    for_tokens(window, 0, tokens(), [&](int64_t token, int64_t row, int64_t column) {
      buffers.log_sum_exp[token] = log_sum_exp[row * problem.width + column];
      Vec dot = {};
      for (int64_t i = token * row_length(); i < (token + 1) * row_length(); i += kWidth) {
        dot = fma(load(buffers.output_gradients + i), load(outputs + i), dot);
      }
      buffers.dots[token] = -sum_of_lanes(dot);
    });
  }

  void pack_rows(float* matrix, float* packed) const {
    const int64_t padded = round_up(tokens(), kPanel);
    for (int64_t i = tokens() * row_length(); i < padded * row_length(); i += kWidth) {
      store(matrix + i, Vec{});
    }
    pack(matrix, row_length(), padded, problem.head_dim, nullptr, nullptr, packed);
  }

  // P and dS of some rows of a block and one panel of keys; dS is added to the strips' gradient.
  template <int rows, int vectors>
  [[gnu::always_inline]] void differentiate(int64_t first, int64_t row, int64_t key) const {
    const int64_t query = first + row;
    float* weights = buffers.weights + row * scores_stride() + key;
    float* gradients = buffers.score_gradients + row * scores_stride() + key;
    const bool whole = key + vectors * kWidth <= tokens();
    int64_t runs[rows] = {};
    if (problem.bias_table) {
      unroll<rows>([&](auto r)
                       __attribute__((always_inline)) { runs[r] = strips.run(query + r) + key; });
    }
    Vec sums[rows][vectors];
    unroll<rows * vectors>([&](auto i) __attribute__((always_inline)) {
      constexpr int r = i / vectors;
      constexpr int v = i % vectors;
      sums[r][v] = problem.bias_table ? load(buffers.strips + runs[r] + v * kWidth) : Vec{};
    });
    multiply_short<rows, vectors>(buffers.queries + query * row_length(), row_length(),
                                  buffers.packed_keys + key * problem.head_dim, kPanel,
                                  problem.head_dim, sums);
    unroll<rows * vectors>([&](auto i) __attribute__((always_inline)) {
      constexpr int r = i / vectors;
      constexpr int v = i % vectors;
      Vec weight = exponential2(sums[r][v] - buffers.log_sum_exp[query + r]);
      store(weights + r * scores_stride() + v * kWidth, weight);
      sums[r][v] = broadcast(buffers.dots[query + r]);
    });
    multiply_short<rows, vectors>(buffers.output_gradients + query * row_length(), row_length(),
                                  buffers.packed_values + key * problem.head_dim, kPanel,
                                  problem.head_dim, sums);
    unroll<rows * vectors>([&](auto i) __attribute__((always_inline)) {
      constexpr int r = i / vectors;
      constexpr int v = i % vectors;
      Vec gradient = load(weights + r * scores_stride() + v * kWidth) * sums[r][v];
      store(gradients + r * scores_stride() + v * kWidth, gradient);
      if (problem.table_gradients) {
        if (!whole) gradient = keep_lanes(gradient, tokens() - key - v * kWidth, 0.0f);
        float* run = buffers.strip_gradients + runs[r] + v * kWidth;
        store(run, load(run) + gradient);
      }
    });
  }

  // Asks for the gradients, and for the rows of the next head, which lie beside this one's.
  void prefetch(int64_t begin, int64_t end) const {
    const HeadRows all = rows();
    for (int64_t part = 0; part < 3; ++part) {
      all.prefetch<true>(problem.qkv_gradient, qkv_channel(part), begin, end);
    }
    if (head + 1 == problem.heads) return;
    for (int64_t part = 0; part < 3; ++part) {
      all.prefetch<false>(problem.qkv, qkv_channel(part) + problem.head_stride, begin, end);
    }
    const int64_t output_channel = (head + 1) * problem.head_dim;
    all.prefetch<false>(problem.output, output_channel, begin, end);
    all.prefetch<false>(problem.output_gradient, output_channel, begin, end);
  }

  // Everything that queries first to last contribute.
  void add_block(int64_t first, int64_t last) const {
    const int64_t count = last - first;
    for_panels(tokens(), [&](auto vectors, int64_t key) __attribute__((always_inline)) {
      // Spread over the panels: the block's share of the tokens.
      const int64_t next_key = smaller(key + kPanel, tokens());
      prefetch(first + count * key / tokens(), first + count * next_key / tokens());
      for_row_blocks(count, [&](auto block, int64_t row) __attribute__((always_inline)) {
        differentiate<decltype(block)::value, decltype(vectors)::value>(first, row, key);
      });
    });
    const int64_t length = row_length();
    const bool accumulate = first > 0;
    gemm(tokens(), problem.head_dim, count, {buffers.weights, 1, scores_stride()},
         buffers.output_gradients + first * length, kPanel, length, buffers.value_gradients, length,
         accumulate);
    gemm(tokens(), problem.head_dim, count, {buffers.score_gradients, 1, scores_stride()},
         buffers.queries + first * length, kPanel, length, buffers.key_gradients, length,
         accumulate);
    gemm(count, problem.head_dim, tokens(), {buffers.score_gradients, scores_stride(), 1},
         buffers.keys, kPanel, length, buffers.query_gradients, length, false);
    rows().write(problem.qkv_gradient, qkv_channel(0), first, last, problem.scale,
                 buffers.query_gradients);
  }

  void differentiate() const {
    load_operands();
    const int64_t blocks = divide_up(tokens(), block_rows(tokens()));
    for (int64_t block = 0; block < blocks; ++block) {
      add_block(tokens() * block / blocks, tokens() * (block + 1) / blocks);
    }
    // The queries carry scale * log2(e).
    rows().write(problem.qkv_gradient, qkv_channel(1), 0, tokens(), kLn2, buffers.key_gradients);
    rows().write(problem.qkv_gradient, qkv_channel(2), 0, tokens(), 1.0f, buffers.value_gradients);
  }
};

void clear(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = 0.0f;
}

}  // namespace

int64_t window_attention_backward_scratch(const WindowAttentionBackward& problem) {
  return buffers_in(nullptr, problem).size;
}

void window_attention_backward(const WindowAttentionBackward& problem, int64_t begin, int64_t end,
                               float* scratch) {
  const Buffers buffers = buffers_in(scratch, problem);
  BiasStrips strips;
  int64_t head_of_strips = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit / problem.heads;
    const int64_t head = unit % problem.heads;
    float* table_gradient = nullptr;
    if (problem.table_gradients) {
      table_gradient = problem.table_gradients + unit * table_size(problem);
      clear(table_gradient, table_size(problem));
      clear(buffers.strip_gradients, strips.size());
    }
    for (int64_t index = first_window(problem, chunk); index < first_window(problem, chunk + 1);
         ++index) {
      const Window window = window_at(problem, index);
      if (problem.bias_table && !(head == head_of_strips && strips.fit(window))) {
        const BiasStrips next(window);
        if (table_gradient) {
          if (head == head_of_strips) {
            strips.fold(problem, buffers.strip_gradients, table_gradient);
          }
          clear(buffers.strip_gradients, next.size());
        }
        strips = next;
        strips.expand(problem, problem.bias_table + head * table_size(problem), buffers.strips);
        head_of_strips = head;
      }
      HeadBackward{problem, buffers, window, strips, head}.differentiate();
    }
    if (table_gradient) strips.fold(problem, buffers.strip_gradients, table_gradient);
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
