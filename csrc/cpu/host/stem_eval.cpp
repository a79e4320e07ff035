// The op cpu_stem_eval: checks, memory and threads around the kernel.

#include "cpu/host/stem_eval.h"

#include <torch/csrc/stable/library.h>

#include "cpu/host/dispatch.h"
#include "cpu/host/parallel.h"
#include "cpu/host/recycled_memory.h"
#include "cpu/host/scratch.h"

namespace moat_kernels::cpu {
StemProblem read_stem(const StemTensors& tensors, double eps) {
  StemProblem problem;
  problem.channels = axis_of("conv_0_weight", tensors.conv_0_weight, 0);
  problem.in_channels = axis_of("conv_0_weight", tensors.conv_0_weight, 1);
  problem.out_channels = axis_of("conv_1_weight", tensors.conv_1_weight, 0);
  const int64_t channels = problem.channels;
  const int64_t outputs = problem.out_channels;
  problem.first.weight =
      float_data("conv_0_weight", tensors.conv_0_weight, {channels, problem.in_channels, 3, 3});
  problem.first.bias = float_data("conv_0_bias", tensors.conv_0_bias, {channels});
  problem.second.weight =
      float_data("conv_1_weight", tensors.conv_1_weight, {outputs, channels, 3, 3});
  problem.second.bias = float_data("conv_1_bias", tensors.conv_1_bias, {outputs});
  problem.norm = read_norm("norm_0", tensors.norm_0, eps, channels);
  STD_TORCH_CHECK(problem.norm.present, "norm_0 must have running statistics");
  return problem;
}

void set_maps(const MapSize& x, StemProblem& problem) {
  STD_TORCH_CHECK(x.height > 0 && x.width > 0, "x must have H, W >= 1");
  STD_TORCH_CHECK(x.channels == problem.in_channels, "x must have ", problem.in_channels,
                  " channels, got ", x.channels);
  problem.batch = x.batch;
  problem.height = x.height;
  problem.width = x.width;
  problem.out_height = (problem.height + 1) / 2;
  problem.out_width = (problem.width + 1) / 2;
  // TensorFlow's SAME: at stride 2 an odd side has a border on both ends, an even one at the end.
  problem.top = problem.symmetric ? 1 : problem.height % 2;
  problem.left = problem.symmetric ? 1 : problem.width % 2;
}

void check_stem_input(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.scalar_type() == ScalarType::Float,
                  "x must be a float32 map [B, C, H, W] on the CPU, got ", shape_of(x), " in ",
                  name_of(x.scalar_type()));
}

MapSize output_map(const StemProblem& problem) {
  return {problem.batch, problem.out_channels, problem.out_height, problem.out_width};
}

int64_t StemEval::packed_size(const StemProblem& problem) {
  return MOAT_KERNELS_DISPATCH(stem_eval_packed_size)(problem);
}

void StemEval::pack(const StemProblem& problem, float* packed) {
  const auto pack_panel = MOAT_KERNELS_DISPATCH(stem_eval_pack);
  for_each_task(MOAT_KERNELS_DISPATCH(stem_eval_panels)(problem), thread_count(),
                [&](int64_t panel, int64_t) { pack_panel(problem, panel, packed); });
}

void StemEval::read(const Tensor& x) {
  problem_.x = static_cast<const float*>(x.const_data_ptr());
  problem_.image_stride = x.stride(0);
  problem_.channel_stride = x.stride(1);
  problem_.row_stride = x.stride(2);
  problem_.column_stride = x.stride(3);
}

int64_t StemEval::scratch_size() const {
  return (packed_ ? 0 : packed_size(problem_)) + thread_count() * worker_size();
}

int64_t StemEval::worker_size() const {
  return MOAT_KERNELS_DISPATCH(stem_eval_scratch_size)(problem_);
}

void StemEval::compute(void* output, float* scratch) {
  problem_.output = output;
  const float* packed = packed_;
  if (!packed) {
    pack(problem_, scratch);
    packed = scratch;
    scratch += packed_size(problem_);
  }
  const auto compute_strip = MOAT_KERNELS_DISPATCH(stem_eval);
  const int64_t strips = MOAT_KERNELS_DISPATCH(stem_eval_strips)(problem_);
  for_each_task(problem_.batch * strips, thread_count(), [&](int64_t task, int64_t worker) {
    compute_strip(problem_, packed, task / strips, task % strips, scratch + worker * worker_size());
  });
}

namespace {

Tensor stem_eval(const Tensor& x, const StemTensors& tensors, double eps) {
  check_stem_input(x);
  const StemTensors kept = readable(tensors);
  StemProblem problem = read_stem(kept, eps);
  set_maps(map_size("x", x), problem);
  const Tensor output = empty_maps(x, output_map(problem), ScalarType::Float);
  if (output.numel() == 0) return output;
  StemEval eval(problem, nullptr);
  eval.read(x);
  const Scratch memory(x, eval.scratch_size());
  eval.compute(output.mutable_data_ptr(), memory.data());
  return output;
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_stem_eval", moat_kernels::boxed<&moat_kernels::cpu::stem_eval>);
}
