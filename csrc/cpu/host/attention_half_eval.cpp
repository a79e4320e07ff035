// The op cpu_attention_half_eval: checks, memory and how the work is divided among threads.

#include "cpu/host/attention_half_eval.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/host/dispatch.h"
#include "cpu/host/parallel.h"
#include "cpu/host/recycled_memory.h"
#include "cpu/host/scratch.h"

namespace moat_kernels::cpu {
namespace {

// Rows that make the best of the weights once they are in cache.
constexpr int64_t kUnitRows = 256;
// Rows that are normalised together where threads share a unit.
constexpr int64_t kNormalizedRows = 32;
// Where threads share a head or a panel, each takes at least this many rows of it.
constexpr int64_t kFewestRows = 48;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t table_size(const AttentionHalf& problem) {
  return (2 * problem.window_height - 1) * (2 * problem.window_width - 1);
}

// Whether the position table is made for other windows.
bool resizes(const AttentionHalf& problem) {
  return problem.position_table && !(problem.position_height == 2 * problem.window_height - 1 &&
                                     problem.position_width == 2 * problem.window_width - 1);
}

// Weights as the kernels read them: of each head, of each panel of proj's outputs, and those of the
// norm.
struct PackedLayout {
  int64_t head_size, panel_size, heads = 0, panels = 0, norm_weight = 0, norm_bias = 0, end = 0;
};

PackedLayout packed_layout(const AttentionHalf& problem) {
  PackedLayout layout;
  layout.head_size = MOAT_KERNELS_DISPATCH(attention_half_head_size)(problem);
  layout.panel_size = MOAT_KERNELS_DISPATCH(attention_half_panel_size)(problem);
  const auto take = [&](int64_t floats) {
    const int64_t begin = layout.end;
    layout.end += whole_lines(floats);
    return begin;
  };
  layout.heads = take(problem.heads * layout.head_size);
  layout.panels = take(MOAT_KERNELS_DISPATCH(attention_half_panels)(problem) * layout.panel_size);
  layout.norm_weight = take(problem.in_channels);
  layout.norm_bias = take(problem.in_channels);
  return layout;
}

// A head's weights or, counting on, those of a panel of proj.
void pack_part(const AttentionHalf& problem, const PackedLayout& layout, int64_t part,
               float* packed) {
  if (part < problem.heads) {
    MOAT_KERNELS_DISPATCH(attention_half_pack_head)
    (problem, part, packed + layout.heads + part * layout.head_size);
  } else {
    const int64_t panel = part - problem.heads;
    MOAT_KERNELS_DISPATCH(attention_half_pack_panel)
    (problem, panel, packed + layout.panels + panel * layout.panel_size);
  }
}

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
  const float* given;  // packed weights or null
  int64_t workers;
  bool shares = false;
  int64_t units = 0;
  int64_t query_blocks = 1;
  int64_t row_blocks = 1;
  bool packs = false;  // weights where they are used, as nothing else uses them

  PackedLayout layout;
  int64_t panels, normalized_words, attended_words, scratch_size;
  // Offsets in the call's scratch memory, in floats.
  int64_t own_packed = 0, table = 0, buffers = 0, rows = 0;
  int64_t size = 0;
  float* memory = nullptr;
  const float* packed = nullptr;  // null: not packed

  Run(const AttentionHalf& call, const float* given)
      : problem(call), given(given), workers(thread_count()), layout(packed_layout(call)) {
    divide_work();
    panels = MOAT_KERNELS_DISPATCH(attention_half_panels)(problem);
    normalized_words = MOAT_KERNELS_DISPATCH(attention_half_normalized_words)(problem);
    attended_words = MOAT_KERNELS_DISPATCH(attention_half_attended_words)(problem);
    scratch_size = MOAT_KERNELS_DISPATCH(attention_half_scratch_size)(problem);
    if (shares) divide_units();
    own_packed = take(packs || given ? 0 : layout.norm_weight);
    table = take(resizes(problem) ? problem.heads * table_size(problem) : 0);
    buffers = take(workers * scratch_size);
    rows = take((shares ? units : workers) * unit_floats());
  }

  int64_t take(int64_t floats) {
    const int64_t begin = size;
    size += whole_lines(floats);
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
    packs = !given && units == 1 && query_blocks == 1 && row_blocks == 1;
  }

  int64_t most_rows() const { return problem.windows_per_unit * most_tokens(problem); }
  int64_t unit_floats() const { return most_rows() * (normalized_words + attended_words); }

  AttentionUnit unit_at(int64_t index) const {
    const int64_t first = index * problem.windows_per_unit;
    return {first, std::min(first + problem.windows_per_unit, window_count(problem))};
  }

  // The rows of the unit or worker `index`.
  float* normalized(int64_t index) const { return memory + rows + index * unit_floats(); }
  float* attended(int64_t index) const {
    return normalized(index) + most_rows() * normalized_words;
  }
  float* scratch(int64_t worker) const { return memory + buffers + worker * scratch_size; }
  const float* packed_head(int64_t head) const {
    return packed ? packed + layout.heads + head * layout.head_size : nullptr;
  }
  const float* packed_panel(int64_t panel) const {
    return packed ? packed + layout.panels + panel * layout.panel_size : nullptr;
  }

  void normalize(int64_t unit, int64_t first, int64_t last, int64_t place, int64_t worker) const {
    if (problem.pool.kind != PoolKind::none) {
      MOAT_KERNELS_DISPATCH(attention_half_pool)
      (problem, unit_at(unit), first, last, scratch(worker), normalized(place), attended(place));
      return;
    }
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
    const int64_t resized = resizes(problem) ? problem.heads : 0;
    const int64_t parts = packs || given ? 0 : problem.heads + panels;
    const int64_t blocks = shares ? divide_up(most_rows(), kNormalizedRows) : 0;
    for_each_task(resized + parts + units * blocks, workers, [&](int64_t task, int64_t worker) {
      if (task < resized) {
        MOAT_KERNELS_DISPATCH(attention_half_resize)(problem, task, memory + table);
        return;
      }
      task -= resized;
      if (task < parts) {
        pack_part(problem, layout, task, memory + own_packed);
        return;
      }
      task -= parts;
      const int64_t first = task % blocks * kNormalizedRows;
      normalize(task / blocks, first, first + kNormalizedRows, task / blocks, worker);
    });
  }

  void by_units() const {
    for_each_task(units, workers, [&](int64_t unit, int64_t worker) {
      normalize(unit, 0, most_rows(), worker, worker);
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
    packed = given || packs ? given : memory + own_packed;
    if (resizes(problem)) problem.bias_table = memory + table;
    prepare();
    if (shares) {
      by_steps();
    } else {
      by_units();
    }
  }
};

}  // namespace

int64_t AttentionHalfEval::packed_size(const AttentionHalf& problem) {
  return packed_layout(problem).end;
}

void AttentionHalfEval::pack(const AttentionHalf& problem, float* packed) {
  const PackedLayout layout = packed_layout(problem);
  const int64_t panels = MOAT_KERNELS_DISPATCH(attention_half_panels)(problem);
  for_each_task(problem.heads + panels, thread_count(),
                [&](int64_t part, int64_t) { pack_part(problem, layout, part, packed); });
  for (int64_t i = 0; i < problem.in_channels; ++i) {
    packed[layout.norm_weight + i] = problem.norm_weight ? problem.norm_weight[i] : 1.0f;
    packed[layout.norm_bias + i] = problem.norm_bias ? problem.norm_bias[i] : 0.0f;
  }
}

int64_t AttentionHalfEval::table_size(const AttentionHalf& problem) {
  return problem.position_table ? problem.heads * cpu::table_size(problem) : 0;
}

void AttentionHalfEval::make_table(const AttentionHalf& problem, float* table) {
  if (!resizes(problem)) {
    std::copy_n(problem.position_table, table_size(problem), table);
    return;
  }
  for_each_task(problem.heads, thread_count(), [&](int64_t head, int64_t) {
    MOAT_KERNELS_DISPATCH(attention_half_resize)(problem, head, table);
  });
}

AttentionHalfEval::AttentionHalfEval(const AttentionHalf& problem, const float* packed,
                                     const float* table)
    : problem_(problem), packed_(packed) {
  if (!packed) return;
  const PackedLayout layout = packed_layout(problem_);
  problem_.norm_weight = packed + layout.norm_weight;
  problem_.norm_bias = packed + layout.norm_bias;
  problem_.position_table = nullptr;
  problem_.bias_table = table;
}

int64_t AttentionHalfEval::scratch_size() const { return Run(problem_, packed_).size; }

void AttentionHalfEval::compute(float* scratch) const { Run(problem_, packed_).compute(scratch); }

AttentionHalf read_attention_half(const AttentionHalfTensors& tensors, int64_t heads,
                                  int64_t head_dim, double scale, double eps, const Pool& pool,
                                  const ShortcutTensors& shortcut) {
  STD_TORCH_CHECK(heads > 0 && head_dim > 0 && heads < kLongestSide && head_dim < kLongestSide,
                  "heads and head_dim must be positive and below 2^20, got ", heads, " and ",
                  head_dim);
  AttentionHalf problem = {};
  const int64_t read = axis_of("qkv_weight", tensors.qkv_weight, 1);
  problem.channels = axis_of("proj_weight", tensors.proj_weight, 0);
  problem.pool = pool;
  problem.in_channels = pool.kind == PoolKind::none ? problem.channels : read;
  problem.heads = heads;
  problem.head_dim = head_dim;
  problem.scale = static_cast<float>(scale);
  problem.eps = static_cast<float>(eps);
  const int64_t channels = problem.channels;
  const int64_t in = problem.in_channels;
  const int64_t inner = heads * head_dim;
  problem.norm_weight = float_data("norm_weight", tensors.norm_weight, {in});
  problem.norm_bias = float_data("norm_bias", tensors.norm_bias, {in});
  problem.qkv_weight = float_data("qkv_weight", tensors.qkv_weight, {3 * inner, in});
  problem.qkv_bias = float_data("qkv_bias", tensors.qkv_bias, {3 * inner});
  problem.proj_weight = float_data("proj_weight", tensors.proj_weight, {channels, inner});
  problem.proj_bias = float_data("proj_bias", tensors.proj_bias, {channels});
  if (pool.kind != PoolKind::none) axis_of("shortcut_weight", shortcut.shortcut_weight, 1);
  problem.shortcut_weight = float_data("shortcut_weight", shortcut.shortcut_weight, {channels, in});
  problem.shortcut_bias = float_data("shortcut_bias", shortcut.shortcut_bias, {channels});
  set_position_table(tensors.position_table, problem);
  return problem;
}

void set_position_table(const std::optional<Tensor>& table, AttentionHalf& problem) {
  if (!table.has_value()) return;
  STD_TORCH_CHECK(table->dim() == 3 && table->size(0) == problem.heads && table->numel() > 0,
                  "the position table must be [", problem.heads, ", height, width], got ",
                  shape_of(*table));
  problem.position_height = table->size(1);
  problem.position_width = table->size(2);
  problem.position_table =
      float_data("the position table", table,
                 {problem.heads, problem.position_height, problem.position_width});
  problem.bias_table = problem.position_table;
}

void set_maps(const MapSize& y, const Padding& padding, int64_t window_height, int64_t window_width,
              AttentionHalf& problem) {
  STD_TORCH_CHECK(y.height > 0 && y.width > 0, "y must be [B, C, H, W] with H, W >= 1");
  STD_TORCH_CHECK(y.channels == problem.in_channels, "y must have ", problem.in_channels,
                  " channels, got ", y.channels);
  STD_TORCH_CHECK(window_height > 0 && window_width > 0 && window_height < kLongestSide &&
                      window_width < kLongestSide,
                  "window_height and window_width must be positive and below 2^20, got ",
                  window_height, " and ", window_width);
  problem.batch = y.batch;
  problem.in_height = problem.height = y.height;
  problem.in_width = problem.width = y.width;
  Pool& pool = problem.pool;
  if (pool.kind != PoolKind::none) {
    set_padding(padding, pool);
    problem.height = output_size(y.height, padding.top, padding.bottom, pool.size, pool.stride);
    problem.width = output_size(y.width, padding.left, padding.right, pool.size, pool.stride);
    STD_TORCH_CHECK(problem.height > 0 && problem.width > 0, "y is smaller than the pool");
  }
  problem.window_height = window_height;
  problem.window_width = window_width;
  problem.window_rows = divide_up(problem.height, window_height);
  problem.window_columns = divide_up(problem.width, window_width);
}

namespace {

Tensor attention_half_eval(Tensor y, const AttentionHalfTensors& tensors, int64_t heads,
                           int64_t head_dim, int64_t window_height, int64_t window_width,
                           double scale, double eps) {
  const MapSize size = map_size("y", y);
  const ElementType element = element_type("y", y.scalar_type());
  y = torch::stable::contiguous(y, torch::headeronly::MemoryFormat::ChannelsLast);
  const AttentionHalfTensors kept = readable(tensors);
  AttentionHalf problem = read_attention_half(kept, heads, head_dim, scale, eps);
  set_maps(size, {}, window_height, window_width, problem);
  problem.element = element;
  const Tensor output = empty_maps(y, size, y.scalar_type());
  if (output.numel() == 0) return output;
  problem.y = y.const_data_ptr();
  problem.result = output.mutable_data_ptr();
  const AttentionHalfEval eval(problem, nullptr, nullptr);
  const Scratch memory(y, eval.scratch_size());
  eval.compute(memory.data());
  return output;
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_attention_half_eval",
               moat_kernels::boxed<&moat_kernels::cpu::attention_half_eval>);
}
