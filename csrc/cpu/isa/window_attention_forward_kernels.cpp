// Forward window attention, for each window and head:
//
//   output = softmax(scale Q K^T + bias) V,  log_sum_exp = log2(sum(exp(scale Q K^T + bias)))
//
// Reads qkv and writes the output once. K^T and V of one window and head stay in L2 while its
// queries pass by in blocks: their scores [24, tokens] are the only scores that exist. A few heads
// are read together, as their channels lie side by side and alone are too short to stream.
// Maps in bfloat16 are multiplied in it where the CPU does; scores, softmax and sums are floats.

#include "cpu/common/window_attention_kernels.h"
#include "cpu/isa/window_attention_head.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

// One thread's working memory.
struct Buffers {
  float* strips;   // Per head, as are the next three.
  float* queries;  // Then the outputs.
  float* keys;     // K^T in panels.
  float* values;
  float* scores;       // One block of queries.
  float* maxima;       // A vector per query of a block.
  float* log_sum_exp;  // Per query of a head.
  int32_t* runs;       // Where a query's bias starts in the strips.
  int64_t strips_size;
  int64_t matrix_size;
  int64_t size;
};

Buffers buffers_in(float* memory, const WindowAttentionForward& problem) {
  const int64_t tokens = round_up(most_tokens(problem), kPanel);
  const int64_t length = round_up(problem.head_dim, kWidth);
  const int64_t heads = problem.heads_per_unit;
  Scratch scratch{memory};
  Buffers buffers;
  buffers.strips_size = round_up(largest_strips(problem).size(), kPanel);
  buffers.matrix_size = tokens * length;
  buffers.strips = scratch.take(heads * buffers.strips_size);
  buffers.queries = scratch.take(heads * buffers.matrix_size);
  buffers.keys = scratch.take(heads * buffers.matrix_size);
  buffers.values = scratch.take(heads * buffers.matrix_size);
  buffers.scores = scratch.take(scores_size(tokens));
  buffers.maxima = scratch.take(kBlockQueries * kWidth);
  buffers.log_sum_exp = scratch.take(tokens);
  buffers.runs = reinterpret_cast<int32_t*>(scratch.take(tokens));
  buffers.size = scratch.used;
  return buffers;
}

// Queries first to last of some heads of a window.
template <class Kind, class HeadDim>
void attend_window(const WindowAttentionForward& problem, const Buffers& buffers,
                   const Window& window, HeadDim head_dim, int64_t first_head, int64_t heads,
                   int64_t first, int64_t last) {
  const HeadRows<HeadDim> rows = {problem, window, head_dim, heads, buffers.matrix_size};
  const int64_t tokens = window.tokens();
  const int64_t channel = first_head * problem.head_stride;
  // The keys' rows pass through the values' memory.
  rows.read(problem.qkv, channel + problem.part_stride, problem.head_stride, 0, tokens, 1.0f,
            buffers.values);
  const int64_t length = rows.row_length();
  for (int64_t head = 0; head < heads; ++head) {
    float* keys = buffers.values + head * buffers.matrix_size;
    rows_to_words<Kind>(keys, tokens, length, head_dim, keys);
    pack_rows<Kind>(keys, tokens, head_dim, buffers.keys + head * buffers.matrix_size);
  }
  rows.read(problem.qkv, channel + 2 * problem.part_stride, problem.head_stride, 0, tokens, 1.0f,
            buffers.values);
  rows.read(problem.qkv, channel, problem.head_stride, first, last, problem.scale * kLog2E,
            buffers.queries);
  for (int64_t head = 0; head < heads; ++head) {
    float* const queries = buffers.queries + head * buffers.matrix_size;
    float* const values = buffers.values + head * buffers.matrix_size;
    rows_to_words<Kind>(queries + first * length, last - first, length, head_dim,
                        queries + first * row_words<Kind>(head_dim));
    rows_to_token_words<Kind>(values, tokens, length, values);
    using Writer = Rounded<typename Kind::Element>;
    const HeadForward<HeadDim, Kind, Writer> attention = {
        head_dim,
        tokens,
        problem.bias_table ? buffers.strips + head * buffers.strips_size : nullptr,
        buffers.runs,
        queries,
        buffers.keys + head * buffers.matrix_size,
        values,
        buffers.scores,
        buffers.maxima,
        buffers.log_sum_exp,
        Writer(elements_of<Kind>(queries)),
        row_words<Kind>(head_dim) * Kind::kPerWord};
    attention.attend(first, last);
    float* log_sum_exp = problem.log_sum_exp + (window.image * problem.heads + first_head + head) *
                                                   problem.height * problem.width;
    for_tokens(window, first, last, [&](int64_t token, int64_t row, int64_t column) {
      log_sum_exp[row * problem.width + column] = buffers.log_sum_exp[token];
    });
  }
  rows.template write<Kind>(problem.output, first_head * problem.head_dim, problem.head_dim, first,
                            last, 1.0f, buffers.queries);
}

}  // namespace

int64_t window_attention_forward_scratch(const WindowAttentionForward& problem) {
  return buffers_in(nullptr, problem).size;
}

void window_attention_forward(const WindowAttentionForward& problem, int64_t begin, int64_t end,
                              float* scratch) {
  const Buffers buffers = buffers_in(scratch, problem);
  const int64_t groups = divide_up(problem.heads, problem.heads_per_unit);
  BiasStrips strips;
  int64_t group_of_strips = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % problem.query_blocks;
    const int64_t group = unit / problem.query_blocks % groups;
    const int64_t chunk = unit / problem.query_blocks / groups;
    const int64_t first_head = problem.heads * group / groups;
    const int64_t heads = problem.heads * (group + 1) / groups - first_head;
    for (int64_t index = first_window(problem, chunk); index < first_window(problem, chunk + 1);
         ++index) {
      const Window window = window_at(problem, index);
      if (problem.bias_table && !(group == group_of_strips && strips.fit(window))) {
        strips = BiasStrips(window);
        strips.list_runs(buffers.runs);
        for (int64_t head = 0; head < heads; ++head) {
          strips.expand(problem, problem.bias_table + (first_head + head) * table_size(problem),
                        buffers.strips + head * buffers.strips_size);
        }
        group_of_strips = group;
      }
      const int64_t first = window.tokens() * block / problem.query_blocks;
      const int64_t last = window.tokens() * (block + 1) / problem.query_blocks;
      with_unscaled_product(product_of(problem), [&](auto kind) {
        with_head_dim(problem.head_dim, [&](auto head_dim) {
          attend_window<decltype(kind)>(problem, buffers, window, head_dim, first_head, heads,
                                        first, last);
        });
      });
    }
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
