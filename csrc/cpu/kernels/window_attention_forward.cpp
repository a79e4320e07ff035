// Forward window attention, for each window and head:
//
//   output = softmax(scale Q K^T + bias) V,  log_sum_exp = log2(sum(exp(scale Q K^T + bias)))
//
// Reads qkv and writes the output once. K^T and V of one window and head stay in L1 or L2 while its
// queries pass by in blocks of 6: their scores [6, tokens] are the only scores that exist.

#include "cpu/kernels/window_attention.h"
#include "cpu/kernels/window_attention_tiles.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

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

// One thread's working memory.
struct Buffers {
  float* strips;
  float* values;
  float* keys;     // K^T in panels.
  float* queries;  // One block of rows, as are the scores and the outputs.
  float* scores;
  float* outputs;
  int64_t size;
};

Buffers buffers_in(float* memory, const WindowAttention& problem) {
  const int64_t tokens = round_up(most_tokens(problem), kPanel);
  const int64_t length = round_up(problem.head_dim, kWidth);
  Scratch scratch{memory};
  Buffers buffers;
  buffers.strips = scratch.take(largest_strips(problem).size());
  buffers.values = scratch.take(tokens * length);
  buffers.keys = scratch.take(tokens * length);
  buffers.queries = scratch.take(kRows * length);
  buffers.scores = scratch.take(kRows * tokens);
  buffers.outputs = scratch.take(kRows * length);
  buffers.size = scratch.used;
  return buffers;
}

struct HeadForward {
  const WindowAttentionForward& problem;
  const Buffers& buffers;
  const Window& window;
  const BiasStrips& strips;
  int64_t head;

  int64_t tokens() const { return window.tokens(); }
  int64_t scores_stride() const { return round_up(tokens(), kPanel); }
  HeadRows rows() const { return {problem, window}; }
  int64_t row_length() const { return rows().row_length(); }

  void load_keys_and_values() const {
    const int64_t channel = head * problem.head_stride + problem.part_stride;
    // The keys' rows pass through the values' memory.
    float* rows_of_keys = buffers.values;
    rows().read(problem.qkv, channel, 0, tokens(), 1.0f, rows_of_keys);
    const int64_t padded = round_up(tokens(), kPanel);
    for (int64_t i = tokens() * row_length(); i < padded * row_length(); i += kWidth) {
      store(rows_of_keys + i, Vec{});
    }
    pack(rows_of_keys, row_length(), padded, problem.head_dim, nullptr, nullptr, buffers.keys);
    rows().read(problem.qkv, channel + problem.part_stride, 0, tokens(), 1.0f, buffers.values);
  }

  // scores = queries K^T + bias (in units of ln 2), and the largest of every row.
  template <int rows>
  [[gnu::always_inline]] void score(const float* const (&bias)[rows],
                                    float (&largest)[kRowLanes]) const {
    Vec maxima[rows];
    unroll<rows>([&](auto i)
                     __attribute__((always_inline)) { maxima[i] = broadcast(-__builtin_inff()); });
    for_panels(tokens(), [&](auto vectors, int64_t key) __attribute__((always_inline)) {
      constexpr int kVectorsHere = decltype(vectors)::value;
      Vec sums[rows][kVectorsHere];
      unroll<rows * kVectorsHere>([&](auto i) __attribute__((always_inline)) {
        constexpr int r = i / kVectorsHere;
        constexpr int v = i % kVectorsHere;
        sums[r][v] = problem.bias_table ? load(bias[r] + key + v * kWidth) : Vec{};
      });
      multiply_short<rows, kVectorsHere>(buffers.queries, row_length(),
                                         buffers.keys + key * problem.head_dim, kPanel,
                                         problem.head_dim, sums);
      const bool whole = key + kVectorsHere * kWidth <= tokens();
      unroll<rows * kVectorsHere>([&](auto i) __attribute__((always_inline)) {
        constexpr int r = i / kVectorsHere;
        constexpr int v = i % kVectorsHere;
        if (!whole) {
          sums[r][v] = keep_lanes(sums[r][v], tokens() - key - v * kWidth, -__builtin_inff());
        }
        maxima[r] = maximum(sums[r][v], maxima[r]);
        store(buffers.scores + r * scores_stride() + key + v * kWidth, sums[r][v]);
      });
    });
    reduce_rows<rows>(maxima, largest, [](Vec a, Vec b) { return maximum(a, b); });
  }

  // scores = 2^(scores - largest), and the sum of every row.
  template <int rows>
  [[gnu::always_inline]] void exponentiate(const float (&largest)[kRowLanes],
                                           float (&total)[kRowLanes]) const {
    Vec sums[rows] = {};
    const int64_t stride = scores_stride();
    for (int64_t key = 0; key < tokens(); key += kWidth) {
      unroll<rows>([&](auto i) __attribute__((always_inline)) {
        float* scores = buffers.scores + i * stride + key;
        const Vec weights = exponential2(load(scores) - largest[i]);
        store(scores, weights);
        sums[i] += weights;
      });
    }
    reduce_rows<rows>(sums, total, [](Vec a, Vec b) { return a + b; });
  }

  // outputs = scores V / total.
  template <int rows>
  [[gnu::always_inline]] void average(const float (&total)[kRowLanes]) const {
    for_panels(problem.head_dim, [&](auto vectors, int64_t column) __attribute__((always_inline)) {
      constexpr int kVectorsHere = decltype(vectors)::value;
      Vec sums[rows][kVectorsHere] = {};
      multiply_short<rows, kVectorsHere>(buffers.scores, scores_stride(), buffers.values + column,
                                         row_length(), tokens(), sums);
      unroll<rows>([&](auto r) __attribute__((always_inline)) {
        const float factor = 1.0f / total[r];
        unroll<kVectorsHere>([&](auto v) __attribute__((always_inline)) {
          store(buffers.outputs + r * row_length() + column + v * kWidth, sums[r][v] * factor);
        });
      });
    });
  }

  // Asks for the outputs, and for the rows of the next head, which lie beside this one's.
  void prefetch(int64_t begin, int64_t end) const {
    const HeadRows all = rows();
    all.prefetch<true>(problem.output, head * problem.head_dim, begin, end);
    if (head + 1 == problem.heads) return;
    for (int64_t part = 0; part < 3; ++part) {
      const int64_t channel = (head + 1) * problem.head_stride + part * problem.part_stride;
      all.prefetch<false>(problem.qkv, channel, begin, end);
    }
  }

  template <int rows>
  void attend(int64_t query) const {
    prefetch(query, query + rows);
    this->rows().read(problem.qkv, head * problem.head_stride, query, query + rows,
                      problem.scale * kLog2E, buffers.queries);
    const float* bias[rows] = {};
    if (problem.bias_table) {
      for (int i = 0; i < rows; ++i) bias[i] = buffers.strips + strips.run(query + i);
    }
    float largest[kRowLanes];
    float total[kRowLanes];
    score<rows>(bias, largest);
    exponentiate<rows>(largest, total);
    average<rows>(total);
    this->rows().write(problem.output, head * problem.head_dim, query, query + rows, 1.0f,
                       buffers.outputs);
    for (int i = 0; i < rows; i += kWidth) {
      store(total + i, load(largest + i) + logarithm2(load(total + i)));
    }
    float* log_sum_exp = problem.log_sum_exp +
                         (window.image * problem.heads + head) * problem.height * problem.width;
    for_tokens(window, query, query + rows, [&](int64_t token, int64_t row, int64_t column) {
      log_sum_exp[row * problem.width + column] = total[token - query];
    });
  }
};

}  // namespace

int64_t window_attention_forward_scratch(const WindowAttentionForward& problem) {
  return buffers_in(nullptr, problem).size;
}

void window_attention_forward(const WindowAttentionForward& problem, int64_t begin, int64_t end,
                              float* scratch) {
  const Buffers buffers = buffers_in(scratch, problem);
  BiasStrips strips;
  int64_t head_of_strips = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % problem.query_blocks;
    const int64_t head = unit / problem.query_blocks % problem.heads;
    const int64_t chunk = unit / problem.query_blocks / problem.heads;
    for (int64_t index = first_window(problem, chunk); index < first_window(problem, chunk + 1);
         ++index) {
      const Window window = window_at(problem, index);
      if (problem.bias_table && !(head == head_of_strips && strips.fit(window))) {
        strips = BiasStrips(window);
        strips.expand(problem, problem.bias_table + head * table_size(problem), buffers.strips);
        head_of_strips = head;
      }
      const HeadForward attention = {problem, buffers, window, strips, head};
      attention.load_keys_and_values();
      const int64_t first = window.tokens() * block / problem.query_blocks;
      const int64_t last = window.tokens() * (block + 1) / problem.query_blocks;
      for_row_blocks(last - first, [&](auto rows, int64_t query) __attribute__((always_inline)) {
        attention.attend<decltype(rows)::value>(first + query);
      });
    }
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
