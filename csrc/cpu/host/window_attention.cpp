// The native ops of window attention: checks, memory and threads around the kernels.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/common/window_attention_kernels.h"
#include "cpu/host/dispatch.h"
#include "cpu/host/parallel.h"
#include "cpu/host/recycled_memory.h"
#include "cpu/host/tensors.h"

namespace moat_kernels::cpu {
namespace {

// Heads are outside of a chunk's windows, so that the bias is prepared once for all of these. The
// chunks must not depend on the threads, as they decide the order of the table gradient's sums.
// Enough for 64 threads, and few enough tokens that their pages stay in the TLB.
constexpr int64_t kPairsOfChunkAndHead = 256;
constexpr int64_t kTokensPerChunk = 400;

// With fewer units than this per thread, heads are taken one by one. If these are too few, too, the
// forward pass divides the queries into blocks of at least kFewestQueries; each block packs the
// keys again.
constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kFewestQueries = 48;

// Channels of the heads that are read together: enough to stream from memory, and few enough for
// the operands of 196 tokens to stay in L2, or near it.
constexpr int64_t kChannelsPerUnit = 128;

// What the threads take at a time, as a fraction of a thread's share.
constexpr int64_t kTasksPerThread = 8;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t most_tokens(const WindowAttention& problem) {
  return std::min(problem.window_height, problem.height) *
         std::min(problem.window_width, problem.width);
}

int64_t count_chunks(const WindowAttention& problem) {
  const int64_t windows = problem.batch * problem.window_rows * problem.window_columns;
  const int64_t by_tokens = divide_up(windows * most_tokens(problem), kTokensPerChunk);
  const int64_t by_units = divide_up(kPairsOfChunkAndHead, problem.heads);
  return std::min(windows, std::max(by_tokens, by_units));
}

// Results do not depend on it.
int64_t count_heads_per_unit(const WindowAttention& problem) {
  const int64_t by_channels = std::min(problem.heads, kChannelsPerUnit / problem.head_dim);
  const int64_t by_threads = problem.chunks * problem.heads / (kUnitsPerThread * thread_count());
  return std::max<int64_t>(1, std::min(by_channels, by_threads));
}

AttentionMap map_of(const char* name, const Tensor& tensor, const WindowAttention& problem,
                    int64_t channels, ScalarType type) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == type && tensor.dim() == 4 &&
                      tensor.size(0) == problem.batch && tensor.size(1) == problem.height &&
                      tensor.size(2) == problem.width && tensor.size(3) == channels &&
                      (tensor.stride(3) == 1 || channels == 1 || problem.batch == 0),
                  name, " must be [", problem.batch, ", ", problem.height, ", ", problem.width,
                  ", ", channels, "] in ", name_of(type), " with dense channels on the CPU, got ",
                  shape_of(tensor), " in ", name_of(tensor.scalar_type()));
  return {static_cast<char*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

// Describes what both directions share. The caller keeps the tensors alive.
void describe(WindowAttention& problem, const Tensor& qkv, const std::optional<Tensor>& bias_table,
              int64_t heads, int64_t head_dim, int64_t window_height, int64_t window_width,
              double scale, bool heads_first, bool grid) {
  STD_TORCH_CHECK(heads > 0 && head_dim > 0 && window_height > 0 && window_width > 0,
                  "heads, head_dim and the window's sides must be positive, got ", heads, ", ",
                  head_dim, ", ", window_height, " and ", window_width);
  STD_TORCH_CHECK(heads < kLongestSide && head_dim < kLongestSide && window_height < kLongestSide &&
                      window_width < kLongestSide,
                  "heads, head_dim and the window's sides must be below 2^20");
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) > 0 && qkv.size(2) > 0,
                  "qkv must be [B, H, W, 3*heads*head_dim] with H, W >= 1, got ", shape_of(qkv));
  problem.element = element_type("qkv", qkv.scalar_type());
  problem.batch = qkv.size(0);
  problem.height = qkv.size(1);
  problem.width = qkv.size(2);
  problem.heads = heads;
  problem.head_dim = head_dim;
  problem.window_height = window_height;
  problem.window_width = window_width;
  problem.window_rows = divide_up(problem.height, window_height);
  problem.window_columns = divide_up(problem.width, window_width);
  problem.grid = grid;
  problem.scale = static_cast<float>(scale);
  problem.chunks = count_chunks(problem);
  problem.heads_per_unit = count_heads_per_unit(problem);
  problem.part_stride = heads_first ? head_dim : heads * head_dim;
  problem.head_stride = heads_first ? 3 * head_dim : head_dim;
  problem.qkv = map_of("qkv", qkv, problem, 3 * heads * head_dim, qkv.scalar_type());
  problem.bias_table =
      float_data("bias_table", bias_table, {heads, 2 * window_height - 1, 2 * window_width - 1});
}

// (Chunk of windows, group of heads).
int64_t count_groups(const WindowAttention& problem) {
  return problem.chunks * divide_up(problem.heads, problem.heads_per_unit);
}

// Calls kernel(problem, first unit, last unit, scratch) from all threads until all units are done.
template <class Problem>
void run(const Problem& problem, int64_t units, int64_t scratch_size, const Tensor& like,
         void (*kernel)(const Problem&, int64_t, int64_t, float*)) {
  const int64_t workers = std::min(thread_count(), units);
  const int64_t tasks = std::min(kTasksPerThread * workers, units);
  const Tensor scratch = recycled_floats(like, {workers * scratch_size});
  for_each_task(tasks, workers, [&](int64_t task, int64_t worker) {
    kernel(problem, units * task / tasks, units * (task + 1) / tasks,
           data_of(scratch) + worker * scratch_size);
  });
}

std::tuple<Tensor, Tensor> window_attention_forward(Tensor qkv, std::optional<Tensor> bias_table,
                                                    int64_t heads, int64_t head_dim,
                                                    int64_t window_height, int64_t window_width,
                                                    double scale, bool heads_first, bool grid) {
  WindowAttentionForward problem;
  describe(problem, qkv, bias_table, heads, head_dim, window_height, window_width, scale,
           heads_first, grid);
  const Tensor output = recycled_tensor(
      qkv, {problem.batch, problem.height, problem.width, heads * head_dim}, qkv.scalar_type());
  const Tensor log_sum_exp = torch::stable::new_empty(
      qkv, {problem.batch, heads, problem.height, problem.width}, ScalarType::Float);
  problem.output = map_of("output", output, problem, heads * head_dim, qkv.scalar_type());
  problem.log_sum_exp = data_of(log_sum_exp);
  const int64_t groups = count_groups(problem);
  if (groups > 0) {
    const int64_t wanted = divide_up(kUnitsPerThread * thread_count(), groups);
    problem.query_blocks = std::clamp<int64_t>(most_tokens(problem) / kFewestQueries, 1, wanted);
    run(problem, groups * problem.query_blocks,
        MOAT_KERNELS_DISPATCH(window_attention_forward_scratch)(problem), qkv,
        MOAT_KERNELS_DISPATCH(window_attention_forward));
  }
  return {output, log_sum_exp};
}

// The sum of [chunks, count] over the chunks, in their order.
void sum_chunks(const float* parts, int64_t chunks, int64_t count, float* sum) {
  constexpr int64_t kGrain = 4096;
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    std::fill(sum + begin, sum + end, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* part = parts + chunk * count;
      for (int64_t i = begin; i < end; ++i) sum[i] += part[i];
    }
  });
}

std::tuple<Tensor, Tensor> window_attention_backward(
    Tensor grad, Tensor qkv, std::optional<Tensor> bias_table, Tensor output, Tensor log_sum_exp,
    int64_t heads, int64_t head_dim, int64_t window_height, int64_t window_width, double scale,
    bool heads_first, bool grid, bool needs_table) {
  STD_TORCH_CHECK(bias_table.has_value() || !needs_table, "needs_table without a bias_table");
  WindowAttentionBackward problem;
  describe(problem, qkv, bias_table, heads, head_dim, window_height, window_width, scale,
           heads_first, grid);
  const ScalarType type = qkv.scalar_type();
  problem.output = map_of("output", output, problem, heads * head_dim, type);
  problem.output_gradient = map_of("grad", grad, problem, heads * head_dim, type);
  problem.log_sum_exp = const_cast<float*>(float_data(
      "log_sum_exp", log_sum_exp, {problem.batch, heads, problem.height, problem.width}));
  const Tensor grad_qkv = recycled_tensor(
      qkv, {problem.batch, problem.height, problem.width, 3 * heads * head_dim}, type);
  const int64_t table_size =
      needs_table ? heads * (2 * window_height - 1) * (2 * window_width - 1) : 0;
  const Tensor grad_table = float_buffer(qkv, table_size);
  const Tensor chunk_grads = recycled_floats(qkv, {problem.chunks * table_size});
  problem.qkv_gradient = map_of("grad_qkv", grad_qkv, problem, 3 * heads * head_dim, type);
  problem.table_gradients = needs_table ? data_of(chunk_grads) : nullptr;
  if (problem.chunks > 0) {
    run(problem, count_groups(problem),
        MOAT_KERNELS_DISPATCH(window_attention_backward_scratch)(problem), qkv,
        MOAT_KERNELS_DISPATCH(window_attention_backward));
  }
  sum_chunks(data_of(chunk_grads), problem.chunks, table_size, data_of(grad_table));
  return {grad_qkv, grad_table};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_window_attention_forward", TORCH_BOX(&window_attention_forward));
  library.impl("cpu_window_attention_backward", TORCH_BOX(&window_attention_backward));
}

}  // namespace moat_kernels::cpu
