// The op cpu_attention_half_eval: checks, memory and how the work is divided among threads.

#include "cpu/kernels/attention_half_eval.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace moat_kernels::cpu {
namespace {

// Places in `tensors`; the order of the Python side.
enum AttentionHalfTensor {
  kNormWeight,
  kNormBias,
  kQkvWeight,
  kQkvBias,
  kProjWeight,
  kProjBias,
  kPositionTable,
  kAttentionHalfTensors
};

// Rows that make the best of the weights once they are in cache.
constexpr int64_t kUnitRows = 256;
// Rows that are normalised together where threads share a unit.
constexpr int64_t kNormalizedRows = 32;
// Where threads share a head or a panel, each takes at least this many rows of it.
constexpr int64_t kFewestRows = 48;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t window_count(const AttentionHalf& problem) {
  return problem.batch * problem.window_rows * problem.window_columns;
}

int64_t most_tokens(const AttentionHalf& problem) {
  return std::min(problem.window_height, problem.height) *
         std::min(problem.window_width, problem.width);
}

// Into how many blocks of rows to divide each of `pieces` equal pieces of work that cost `shared`
// divided by the blocks, and `repeated` in each.
int64_t choose_blocks(int64_t pieces, int64_t most, int64_t shared, int64_t repeated,
                      int64_t threads) {
  int64_t best = 1;
  int64_t least = 0;
  for (int64_t blocks = 1; blocks <= std::max<int64_t>(most, 1); ++blocks) {
    const int64_t cost = divide_up(pieces * blocks, threads) * (shared / blocks + repeated);
    if (blocks == 1 || cost < least) {
      best = blocks;
      least = cost;
    }
  }
  return best;
}

// A call in progress. Each thread takes whole units; where these would leave threads without work,
// all threads share every step.
struct Run {
  AttentionHalf problem;
  int64_t workers;
  bool shares = false;
  int64_t units = 0;
  int64_t query_blocks = 1;
  int64_t row_blocks = 1;
  bool packs = false;  // weights where they are used, as nothing else uses them

  int64_t head_size, panel_size, panels, attended_columns, scratch_size;
  // Offsets in the call's scratch memory, in floats.
  int64_t packed_heads = 0, packed_panels = 0, table = 0, buffers = 0, rows = 0;
  int64_t size = 0;
  float* memory = nullptr;

  Run(const AttentionHalf& call, int64_t threads) : problem(call), workers(threads) {
    divide_work();
    head_size = MOAT_KERNELS_DISPATCH(attention_half_head_size)(problem);
    panel_size = MOAT_KERNELS_DISPATCH(attention_half_panel_size)(problem);
    panels = MOAT_KERNELS_DISPATCH(attention_half_panels)(problem);
    attended_columns = MOAT_KERNELS_DISPATCH(attention_half_attended_columns)(problem);
    scratch_size = MOAT_KERNELS_DISPATCH(attention_half_scratch_size)(problem);
    if (shares) divide_units();
    packed_heads = take(packs ? 0 : problem.heads * head_size);
    packed_panels = take(packs ? 0 : panels * panel_size);
    table = take(resizes() ? problem.heads * table_size() : 0);
    buffers = take(workers * scratch_size);
    rows = take((shares ? units : workers) * unit_floats());
  }

  int64_t take(int64_t floats) {
    const int64_t begin = size;
    size += divide_up(floats, 16) * 16;  // whole cache lines
    return begin;
  }

  void divide_work() {
    const int64_t windows = window_count(problem);
    const int64_t share = std::max<int64_t>(windows / workers, 1);
    const int64_t fitting = std::clamp<int64_t>(kUnitRows / most_tokens(problem), 1, share);
    problem.windows_per_unit = divide_up(share, divide_up(share, fitting));
    units = divide_up(windows, problem.windows_per_unit);
    shares = units % workers != 0 && units < 8 * workers;
    if (!shares) return;
    problem.windows_per_unit = 1;
    units = windows;
  }

  void divide_units() {
    const int64_t tokens = most_tokens(problem);
    const int64_t most = tokens / kFewestRows;
    query_blocks = choose_blocks(units * problem.heads, most, problem.channels + 2 * tokens,
                                 2 * problem.channels, workers);
    row_blocks = choose_blocks(units * panels, most, tokens, kFewestRows / 4, workers);
    packs = units == 1 && query_blocks == 1 && row_blocks == 1;
  }

  // Whether the position table is made for other windows.
  bool resizes() const {
    return problem.position_table && !(problem.position_height == 2 * problem.window_height - 1 &&
                                       problem.position_width == 2 * problem.window_width - 1);
  }
  int64_t table_size() const {
    return (2 * problem.window_height - 1) * (2 * problem.window_width - 1);
  }
  int64_t most_rows() const { return problem.windows_per_unit * most_tokens(problem); }
  int64_t unit_floats() const { return most_rows() * (problem.channels + attended_columns); }

  AttentionUnit unit_at(int64_t index) const {
    const int64_t first = index * problem.windows_per_unit;
    return {first, std::min(first + problem.windows_per_unit, window_count(problem))};
  }

  // The rows of the unit or worker `index`.
  float* normalized(int64_t index) const { return memory + rows + index * unit_floats(); }
  float* attended(int64_t index) const {
    return normalized(index) + most_rows() * problem.channels;
  }
  float* scratch(int64_t worker) const { return memory + buffers + worker * scratch_size; }
  float* packed_head(int64_t head) const {
    return packs ? nullptr : memory + packed_heads + head * head_size;
  }
  float* packed_panel(int64_t panel) const {
    return packs ? nullptr : memory + packed_panels + panel * panel_size;
  }

  void normalize(int64_t unit, int64_t first, int64_t last, int64_t place) const {
    MOAT_KERNELS_DISPATCH(attention_half_normalize)
    (problem, unit_at(unit), first, last, normalized(place));
  }

  void attend(int64_t unit, int64_t head, int64_t block, int64_t place, int64_t worker) const {
    MOAT_KERNELS_DISPATCH(attention_half_attend)
    (problem, unit_at(unit), head, block, query_blocks, packed_head(head), normalized(place),
     scratch(worker), attended(place));
  }

  void project(int64_t unit, int64_t panel, int64_t block, int64_t place, int64_t worker) const {
    MOAT_KERNELS_DISPATCH(attention_half_project)
    (problem, unit_at(unit), panel, block, row_blocks, packed_panel(panel), attended(place),
     scratch(worker));
  }

  // What all units need, and the first step if it is shared.
  void prepare() const {
    const int64_t resized = resizes() ? problem.heads : 0;
    const int64_t packed = packs ? 0 : problem.heads + panels;
    const int64_t blocks = shares ? divide_up(most_rows(), kNormalizedRows) : 0;
    for_each_task(resized + packed + units * blocks, workers, [&](int64_t task, int64_t) {
      if (task < resized) {
        MOAT_KERNELS_DISPATCH(attention_half_resize)(problem, task, memory + table);
        return;
      }
      task -= resized;
      if (task < packed) {
        if (task < problem.heads) {
          MOAT_KERNELS_DISPATCH(attention_half_pack_head)(problem, task, packed_head(task));
        } else {
          const int64_t panel = task - problem.heads;
          MOAT_KERNELS_DISPATCH(attention_half_pack_panel)(problem, panel, packed_panel(panel));
        }
        return;
      }
      task -= packed;
      const int64_t first = task % blocks * kNormalizedRows;
      normalize(task / blocks, first, first + kNormalizedRows, task / blocks);
    });
  }

  void by_units() const {
    for_each_task(units, workers, [&](int64_t unit, int64_t worker) {
      normalize(unit, 0, most_rows(), worker);
      for (int64_t head = 0; head < problem.heads; ++head) attend(unit, head, 0, worker, worker);
      for (int64_t panel = 0; panel < panels; ++panel) project(unit, panel, 0, worker, worker);
    });
  }

  void by_steps() const {
    const int64_t attend_tasks = units * problem.heads * query_blocks;
    for_each_task(attend_tasks, workers, [&](int64_t task, int64_t worker) {
      const int64_t unit = task / query_blocks / problem.heads;
      attend(unit, task / query_blocks % problem.heads, task % query_blocks, unit, worker);
    });
    const int64_t project_tasks = units * panels * row_blocks;
    for_each_task(project_tasks, workers, [&](int64_t task, int64_t worker) {
      const int64_t unit = task / row_blocks / panels;
      project(unit, task / row_blocks % panels, task % row_blocks, unit, worker);
    });
  }

  void compute(float* scratch_memory) {
    memory = scratch_memory;
    if (resizes()) problem.bias_table = memory + table;
    prepare();
    if (shares) {
      by_steps();
    } else {
      by_units();
    }
  }
};

Tensor attention_half_eval(Tensor y, OptionalTensors tensors, int64_t heads, int64_t head_dim,
                           const std::vector<int64_t>& window, double scale, double eps) {
  STD_TORCH_CHECK(y.dim() == 4 && y.size(2) > 0 && y.size(3) > 0,
                  "y must be [B, C, H, W] with H, W >= 1");
  STD_TORCH_CHECK(tensors.size() == kAttentionHalfTensors && window.size() == 2 && heads > 0 &&
                      head_dim > 0 && window[0] > 0 && window[1] > 0,
                  "attention half: wrong number of tensors, or sizes that are not positive");
  STD_TORCH_CHECK(tensors[kQkvWeight].has_value() && tensors[kProjWeight].has_value(),
                  "qkv.weight and proj.weight must be given");
  y = torch::stable::contiguous(y, torch::headeronly::MemoryFormat::ChannelsLast);
  for (std::optional<Tensor>& tensor : tensors) {
    if (tensor.has_value()) tensor = as_floats(*tensor);
  }
  AttentionHalf problem = {};
  problem.element = element_type("y", y.scalar_type());
  problem.batch = y.size(0);
  problem.channels = y.size(1);
  problem.height = y.size(2);
  problem.width = y.size(3);
  problem.heads = heads;
  problem.head_dim = head_dim;
  problem.window_height = window[0];
  problem.window_width = window[1];
  problem.window_rows = divide_up(problem.height, window[0]);
  problem.window_columns = divide_up(problem.width, window[1]);
  problem.scale = static_cast<float>(scale);
  problem.eps = static_cast<float>(eps);
  const int64_t channels = problem.channels;
  const int64_t inner = heads * head_dim;
  const auto data = [&](const char* name, AttentionHalfTensor place, int64_t count) {
    return float_data(name, tensors[place], count);
  };
  problem.norm_weight = data("norm.weight", kNormWeight, channels);
  problem.norm_bias = data("norm.bias", kNormBias, channels);
  problem.qkv_weight = data("qkv.weight", kQkvWeight, 3 * inner * channels);
  problem.qkv_bias = data("qkv.bias", kQkvBias, 3 * inner);
  problem.proj_weight = data("proj.weight", kProjWeight, inner * channels);
  problem.proj_bias = data("proj.bias", kProjBias, channels);
  if (const std::optional<Tensor>& table = tensors[kPositionTable]; table.has_value()) {
    STD_TORCH_CHECK(table->dim() == 3 && table->size(0) == heads && table->numel() > 0,
                    "the position table must be [", heads, ", height, width]");
    problem.position_height = table->size(1);
    problem.position_width = table->size(2);
    problem.position_table = data("the position table", kPositionTable, table->numel());
    problem.bias_table = problem.position_table;
  }
  const Tensor output = torch::stable::empty(
      {problem.batch, channels, problem.height, problem.width}, y.scalar_type(), std::nullopt,
      y.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  problem.y = y.const_data_ptr();
  problem.result = output.mutable_data_ptr();
  Run run(problem, thread_count());
  const Scratch memory(y, run.size);
  run.compute(memory.data());
  return output;
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_attention_half_eval", TORCH_BOX(&moat_kernels::cpu::attention_half_eval));
}
