// Forward window attention, for each window and head:
//
//   output = softmax(scale Q K^T + bias) V,  log_sum_exp = log2(sum(exp(scale Q K^T + bias)))
//
// Reads qkv and writes the output once. K^T and V of one window and head stay in L2 while its
// queries pass by in blocks: their scores [24, tokens] are the only scores that exist. A few heads
// are read together, as their channels lie side by side and alone are too short to stream.

#include "cpu/kernels/window_attention.h"
#include "cpu/kernels/window_attention_tiles.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

// A block of queries, in tiles: a panel of keys or values serves all of them from L1.
constexpr int64_t kBlockTiles = 4;

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
  buffers.scores = scratch.take(kBlockTiles * kRows * tokens);
  buffers.maxima = scratch.take(kBlockTiles * kRows * kWidth);
  buffers.log_sum_exp = scratch.take(tokens);
  buffers.runs = reinterpret_cast<int32_t*>(scratch.take(tokens));
  buffers.size = scratch.used;
  return buffers;
}

// One head of one window, its operands in scratch memory.
template <class HeadDim>
struct HeadForward {
  HeadDim head_dim;
  int64_t tokens;
  const float* bias;    // In strips, or null.
  const int32_t* runs;  // Per query, where its bias starts in these.
  float* queries;
  const float* keys;
  const float* values;
  float* scores;
  float* maxima;
  float* log_sum_exp;  // Per query.

  int64_t scores_stride() const { return round_up(tokens, kPanel); }
  [[gnu::always_inline]] int64_t row_length() const { return round_up(head_dim, kWidth); }

  // scores = queries K^T + bias (in units of ln 2) for a panel of keys, and maxima per lane.
  template <int rows, int vectors>
  [[gnu::always_inline]] void score(int64_t query, int64_t row, int64_t key) const {
    Vec sums[rows][vectors];
    unroll<rows>([&](auto r) __attribute__((always_inline)) {
      unroll<vectors>([&](auto v) __attribute__((always_inline)) {
        sums[r][v] = bias ? load(bias + runs[query + r] + key + v * kWidth) : Vec{};
      });
    });
    multiply_rows<kSteps<HeadDim>, rows, vectors>(queries + query * row_length(), row_length(),
                                                  keys + key * head_dim, kPanel, head_dim, sums);
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

  // scores = 2^(scores - their largest); the sum of every row, and its log_sum_exp.
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
        float* score = first + r * scores_stride() + key;
        const Vec weights = exponential2(load(score) - largest[r]);
        store(score, weights);
        values_of_rows[r] += weights;
      });
    }
    reduce_rows<rows>(values_of_rows, total, [](Vec a, Vec b) { return a + b; });
    float logarithms[kRowLanes];
    for (int i = 0; i < rows; i += kWidth) {
      store(logarithms + i, load(largest + i) + logarithm2(load(total + i)));
    }
    for (int r = 0; r < rows; ++r) log_sum_exp[query + r] = logarithms[r];
  }

  // output = scores V / total, in the place of the queries.
  template <int rows>
  [[gnu::always_inline]] void average(int64_t query, int64_t row,
                                      const float (&total)[kRowLanes]) const {
    for_columns(head_dim, [&](auto vectors, int64_t column) __attribute__((always_inline)) {
      constexpr int kVectorsHere = decltype(vectors)::value;
      Vec sums[rows][kVectorsHere] = {};
      multiply_rows<kSteps<HeadDim>, rows, kVectorsHere>(scores + row * scores_stride(),
                                                         scores_stride(), values + column,
                                                         row_length(), tokens, sums);
      unroll<rows>([&](auto r) __attribute__((always_inline)) {
        const float factor = 1.0f / total[r];
        unroll<kVectorsHere>([&](auto v) __attribute__((always_inline)) {
          store(queries + (query + r) * row_length() + column + v * kWidth, sums[r][v] * factor);
        });
      });
    });
  }

  // Tiles begin to end of the queries from `first` on.
  void attend(int64_t first, RowTiles tiles, int64_t begin, int64_t end) const {
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
};

// Queries first to last of some heads of a window.
template <class HeadDim>
void attend_window(const WindowAttentionForward& problem, const Buffers& buffers,
                   const Window& window, HeadDim head_dim, int64_t first_head, int64_t heads,
                   int64_t first, int64_t last) {
  const HeadRows<HeadDim> rows = {problem, window, head_dim, heads, buffers.matrix_size};
  const int64_t tokens = window.tokens();
  const int64_t channel = first_head * problem.head_stride;
  // The keys' rows pass through the values' memory.
  rows.read(problem.qkv, channel + problem.part_stride, problem.head_stride, 0, tokens, 1.0f,
            buffers.values);
  for (int64_t head = 0; head < heads; ++head) {
    pack_rows(buffers.values + head * buffers.matrix_size, tokens, head_dim,
              buffers.keys + head * buffers.matrix_size);
  }
  rows.read(problem.qkv, channel + 2 * problem.part_stride, problem.head_stride, 0, tokens, 1.0f,
            buffers.values);
  rows.read(problem.qkv, channel, problem.head_stride, first, last, problem.scale * kLog2E,
            buffers.queries);
  for (int64_t head = 0; head < heads; ++head) {
    const HeadForward<HeadDim> attention = {
        head_dim,
        tokens,
        problem.bias_table ? buffers.strips + head * buffers.strips_size : nullptr,
        buffers.runs,
        buffers.queries + head * buffers.matrix_size,
        buffers.keys + head * buffers.matrix_size,
        buffers.values + head * buffers.matrix_size,
        buffers.scores,
        buffers.maxima,
        buffers.log_sum_exp};
    const RowTiles tiles = {last - first};
    for (int64_t tile = 0; tile < tiles.count(); tile += kBlockTiles) {
      attention.attend(first, tiles, tile, smaller(tile + kBlockTiles, tiles.count()));
    }
    float* log_sum_exp = problem.log_sum_exp + (window.image * problem.heads + first_head + head) *
                                                   problem.height * problem.width;
    for_tokens(window, first, last, [&](int64_t token, int64_t row, int64_t column) {
      log_sum_exp[row * problem.width + column] = buffers.log_sum_exp[token];
    });
  }
  rows.write(problem.output, first_head * problem.head_dim, problem.head_dim, first, last, 1.0f,
             buffers.queries);
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
      with_head_dim(problem.head_dim, [&](auto head_dim) {
        attend_window(problem, buffers, window, head_dim, first_head, heads, first, last);
      });
    }
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
