// The op cpu_mbconv_eval: how the inverted bottleneck is divided among threads.

#include "cpu/host/mbconv_eval.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/host/dispatch.h"
#include "cpu/host/mbconv_arguments.h"
#include "cpu/host/parallel.h"
#include "cpu/host/recycled_memory.h"
#include "cpu/host/scratch.h"

namespace moat_kernels::cpu {
namespace {

// Pieces per image that the batch does not need; rows cost a repeated halo, blocks a partial sum.
struct Partition {
  int64_t row_parts = 1;
  int64_t block_parts = 1;
  bool packs = false;  // see MBConvTask
};

constexpr int64_t kFewestRows = 14;

// Whether `tasks` equal tasks keep all threads busy nearly all the time.
bool balances(int64_t tasks, int64_t threads) {
  return tasks % threads == 0 || tasks >= 8 * threads;
}

Partition divide_work(const MBConvProblem& problem, int64_t blocks, int64_t threads) {
  Partition partition;
  const int64_t most_rows = problem.out_height / kFewestRows;
  for (int64_t parts = 1; parts <= std::max<int64_t>(most_rows, 1); ++parts) {
    partition.row_parts = parts;
    if (balances(problem.batch * parts, threads)) return partition;
  }
  if (problem.squeeze_excite.present) return partition;
  for (int64_t parts = 2; parts <= std::min(blocks, threads); ++parts) {
    partition.block_parts = parts;
    if (balances(problem.batch * partition.row_parts * parts, threads)) break;
  }
  return partition;
}

Partition choose_partition(const MBConvProblem& problem, int64_t blocks, int64_t threads,
                           bool has_packed) {
  Partition partition = divide_work(problem, blocks, threads);
  const int64_t strip_rows = MOAT_KERNELS_DISPATCH(mbconv_eval_strip_rows)(problem);
  partition.packs = !has_packed && problem.batch * partition.row_parts == 1 &&
                    strip_rows >= problem.out_height && !problem.squeeze_excite.present;
  return partition;
}

// Pixels that make the best of a block's weights once they are in cache.
constexpr int64_t kGroupPixels = 256;

// Small maps of a large batch go through the tiles together.
int64_t choose_images_per_tile(const MBConvProblem& problem, int64_t threads) {
  const int64_t fitting = kGroupPixels / (problem.out_height * problem.out_width);
  const int64_t share = problem.batch / threads;
  if (fitting < 2 || share < 2 || problem.squeeze_excite.present ||
      !MOAT_KERNELS_DISPATCH(mbconv_eval_groups)(problem)) {
    return 1;
  }
  const int64_t groups = (share + fitting - 1) / fitting;
  return (share + groups - 1) / groups;
}

MBConvTask task_at(const MBConvProblem& problem, const Partition& partition, int64_t blocks,
                   int64_t index) {
  const int64_t block_part = index % partition.block_parts;
  const int64_t row_part = index / partition.block_parts % partition.row_parts;
  MBConvTask task;
  task.images = 1;
  task.image = index / partition.block_parts / partition.row_parts;
  task.first_row = problem.out_height * row_part / partition.row_parts;
  task.last_row = problem.out_height * (row_part + 1) / partition.row_parts;
  task.first_block = blocks * block_part / partition.block_parts;
  task.last_block = blocks * (block_part + 1) / partition.block_parts;
  task.packs = partition.packs;
  return task;
}

// The weights of squeeze-excite in a packed buffer, behind all others, as they are.
struct GateLayout {
  int64_t reduce, reduce_bias, expand, expand_bias, end;
};

GateLayout gate_layout(const MBConvProblem& problem) {
  GateLayout layout = {};
  layout.end = whole_lines(MOAT_KERNELS_DISPATCH(mbconv_eval_packed_size)(problem, true));
  if (!problem.squeeze_excite.present) return layout;
  const auto take = [&](int64_t floats) {
    const int64_t begin = layout.end;
    layout.end += whole_lines(floats);
    return begin;
  };
  const int64_t wide = problem.wide_channels;
  const int64_t reduced = problem.squeeze_excite.channels;
  layout.reduce = take(reduced * wide);
  layout.reduce_bias = take(reduced);
  layout.expand = take(wide * reduced);
  layout.expand_bias = take(wide);
  return layout;
}

void copy_or_clear(const float* from, int64_t count, float* to) {
  if (from) {
    std::copy_n(from, count, to);
  } else {
    std::fill_n(to, count, 0.0f);
  }
}

// What all blocks share and, unless the tasks do that, the blocks.
void pack_weights(const MBConvProblem& problem, bool with_blocks, float* packed) {
  MOAT_KERNELS_DISPATCH(mbconv_eval_fold)(problem, packed);
  if (!with_blocks) return;
  const auto pack_block = MOAT_KERNELS_DISPATCH(mbconv_eval_pack);
  for_each_task(MOAT_KERNELS_DISPATCH(mbconv_eval_blocks)(problem), thread_count(),
                [&](int64_t block, int64_t) { pack_block(problem, block, packed); });
}

void pack_gate(const MBConvProblem& problem, float* packed) {
  const GateLayout layout = gate_layout(problem);
  const SqueezeExcite& excite = problem.squeeze_excite;
  const int64_t wide = problem.wide_channels;
  copy_or_clear(excite.reduce.weight, excite.channels * wide, packed + layout.reduce);
  copy_or_clear(excite.reduce.bias, excite.channels, packed + layout.reduce_bias);
  copy_or_clear(excite.expand.weight, wide * excite.channels, packed + layout.expand);
  copy_or_clear(excite.expand.bias, wide, packed + layout.expand_bias);
}

// The parts of a call's scratch memory, in floats.
struct Layout {
  int64_t packed = 0;    // weights, unless they are given
  int64_t workers = 0;   // what each worker needs, one after the other
  int64_t partials = 0;  // by_blocks: [batch, block parts, pixels, result columns]
  int64_t gated = 0;     // gated: see there
  int64_t end = 0;
};

// A call in progress.
struct Run {
  const MBConvProblem& problem;
  const float* given;  // packed weights or null
  int64_t workers;
  int64_t blocks;
  Partition partition;
  int64_t scratch_size;
  Layout layout;
  float* memory = nullptr;
  const float* packed = nullptr;

  Run(const MBConvProblem& problem, const float* given)
      : problem(problem),
        given(given),
        workers(thread_count()),
        blocks(MOAT_KERNELS_DISPATCH(mbconv_eval_blocks)(problem)),
        partition(choose_partition(problem, blocks, workers, given)),
        scratch_size(MOAT_KERNELS_DISPATCH(mbconv_eval_scratch_size)(problem)),
        layout(make_layout()) {}

  Layout make_layout() const {
    Layout result;
    const auto take = [&](int64_t floats) {
      const int64_t begin = result.end;
      result.end += whole_lines(floats);
      return begin;
    };
    const auto packed_size = MOAT_KERNELS_DISPATCH(mbconv_eval_packed_size);
    result.packed = take(given ? 0 : packed_size(problem, !partition.packs));
    result.workers = take(workers * scratch_size);
    result.partials = take(
        partition.block_parts > 1 ? problem.batch * partition.block_parts * partial_size() : 0);
    result.gated =
        take(problem.squeeze_excite.present
                 ? images_at_once() * (gated_size() + (1 + partition.row_parts) * gate_size())
                 : 0);
    return result;
  }

  float* scratch(int64_t worker) const { return memory + layout.workers + worker * scratch_size; }

  int64_t partial_row() const {
    return problem.out_width * MOAT_KERNELS_DISPATCH(mbconv_eval_result_columns)(problem);
  }
  int64_t partial_size() const { return problem.out_height * partial_row(); }
  int64_t gated_size() const { return MOAT_KERNELS_DISPATCH(mbconv_eval_gated_size)(problem); }
  int64_t gate_size() const { return MOAT_KERNELS_DISPATCH(mbconv_eval_gate_size)(problem); }
  int64_t images_at_once() const { return std::min(problem.batch, workers); }

  void compute(float* scratch_memory) {
    memory = scratch_memory;
    packed = given ? given : memory + layout.packed;
    if (!given) pack_weights(problem, !partition.packs, memory + layout.packed);
    if (problem.squeeze_excite.present) {
      gated();
    } else if (partition.block_parts > 1) {
      by_blocks();
    } else {
      fused();
    }
  }

  void fused() const {
    const auto compute = MOAT_KERNELS_DISPATCH(mbconv_eval_fused);
    const int64_t images = partition.row_parts == 1 ? problem.images_per_tile : 1;
    const int64_t groups = (problem.batch + images - 1) / images;
    for_each_task(groups * partition.row_parts, workers, [&](int64_t index, int64_t worker) {
      MBConvTask task = task_at(problem, partition, blocks, index);
      task.image *= images;
      task.images = std::min(images, problem.batch - task.image);
      compute(problem, packed, task, scratch(worker));
    });
  }

  // Blocks of channels in parallel: each part sums its own, then the sums are added in order.
  void by_blocks() const {
    const int64_t row = partial_row();
    const int64_t part_stride = partial_size();
    const auto partials = [&](int64_t image) {
      return memory + layout.partials + image * partition.block_parts * part_stride;
    };
    const auto compute = MOAT_KERNELS_DISPATCH(mbconv_eval_bottleneck);
    const int64_t tasks = problem.batch * partition.row_parts * partition.block_parts;
    for_each_task(tasks, workers, [&](int64_t index, int64_t worker) {
      const MBConvTask task = task_at(problem, partition, blocks, index);
      const int64_t part = index % partition.block_parts;
      compute(problem, packed, task, scratch(worker),
              partials(task.image) + part * part_stride + task.first_row * row);
    });
    const auto finish = MOAT_KERNELS_DISPATCH(mbconv_eval_finish);
    const Partition rows = {std::min(problem.out_height, workers), 1, false};
    for_each_task(problem.batch * rows.row_parts, workers, [&](int64_t index, int64_t worker) {
      const MBConvTask task = task_at(problem, rows, blocks, index);
      finish(problem, packed, task, scratch(worker), partials(task.image), partition.block_parts,
             part_stride);
    });
  }

  // Images in groups, as many as there are threads: all of a group up to the gate, then the rest.
  void gated() const {
    const int64_t gated_size = this->gated_size();
    const int64_t gate_size = this->gate_size();
    const int64_t group = images_at_once();
    const int64_t parts = partition.row_parts;
    float* const gated = memory + layout.gated;
    float* const gates = gated + group * gated_size;
    float* const sums = gates + group * gate_size;
    const auto stencil = MOAT_KERNELS_DISPATCH(mbconv_eval_stencil);
    const auto excite = MOAT_KERNELS_DISPATCH(mbconv_eval_gate);
    const auto project = MOAT_KERNELS_DISPATCH(mbconv_eval_project);
    for (int64_t first = 0; first < problem.batch; first += group) {
      const int64_t images = std::min(group, problem.batch - first);
      const auto task_of = [&](int64_t index) {
        MBConvTask task = task_at(problem, partition, blocks, index);
        task.image += first;
        return task;
      };
      for_each_task(images * parts, workers, [&](int64_t index, int64_t worker) {
        const MBConvTask task = task_of(index);
        stencil(problem, packed, task, scratch(worker), gated + (task.image - first) * gated_size,
                sums + index * gate_size);
      });
      for_each_task(images, workers, [&](int64_t image, int64_t worker) {
        excite(problem, sums + image * parts * gate_size, parts, gate_size, scratch(worker),
               gates + image * gate_size);
      });
      for_each_task(images * parts, workers, [&](int64_t index, int64_t worker) {
        const MBConvTask task = task_of(index);
        const int64_t image = task.image - first;
        project(problem, packed, task, scratch(worker), gated + image * gated_size,
                gates + image * gate_size);
      });
    }
  }
};

}  // namespace

int64_t MBConvEval::packed_size(const MBConvProblem& problem) { return gate_layout(problem).end; }

void MBConvEval::pack(const MBConvProblem& problem, float* packed) {
  pack_weights(problem, true, packed);
  if (problem.squeeze_excite.present) pack_gate(problem, packed);
}

MBConvEval::MBConvEval(const MBConvProblem& problem, const float* packed)
    : problem_(problem), packed_(packed) {
  problem_.images_per_tile = choose_images_per_tile(problem_, thread_count());
  SqueezeExcite& excite = problem_.squeeze_excite;
  if (packed && excite.present) {
    const GateLayout layout = gate_layout(problem_);
    excite.reduce = {packed + layout.reduce, packed + layout.reduce_bias};
    excite.expand = {packed + layout.expand, packed + layout.expand_bias};
  }
}

int64_t MBConvEval::scratch_size() const { return Run(problem_, packed_).layout.end; }

void MBConvEval::compute(float* scratch) const { Run(problem_, packed_).compute(scratch); }

MapSize output_map(const MBConvProblem& problem) {
  return {problem.batch, problem.out_channels, problem.out_height, problem.out_width};
}

namespace {

Tensor mbconv_eval(Tensor x, const BlockTensors& tensors, std::optional<Tensor> drop_path_scale,
                   const BlockSettings& settings, const BlockPadding& padding, ScalarType dtype) {
  const MapSize size = map_size("x", x);
  const ElementType output_type = element_type("dtype", dtype);
  x = torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
  const BlockTensors kept = readable(tensors);
  if (drop_path_scale.has_value()) drop_path_scale = as_floats(*drop_path_scale);
  MBConvProblem problem = read_block(kept, settings);
  set_maps(size, padding, problem);
  problem.x = x.const_data_ptr();
  problem.x_type = element_type("x", x.scalar_type());
  problem.drop_path_scale = float_data("drop_path_scale", drop_path_scale, {problem.batch});
  const Tensor output = empty_maps(x, output_map(problem), dtype);
  problem.output = output.mutable_data_ptr();
  problem.output_type = output_type;
  if (output.numel() == 0) return output;

  const MBConvEval eval(problem, nullptr);
  const Scratch memory(x, eval.scratch_size());
  eval.compute(memory.data());
  return output;
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_mbconv_eval", moat_kernels::boxed<&moat_kernels::cpu::mbconv_eval>);
}
