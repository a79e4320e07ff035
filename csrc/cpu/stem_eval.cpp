// The op cpu_stem_eval: checks, memory and threads around the kernel.

#include "cpu/kernels/stem_eval.h"

#include <torch/csrc/stable/library.h>

#include "cpu/mbconv_arguments.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace moat_kernels::cpu {
namespace {

// Places in `tensors`; the order of the Python side.
enum StemTensor {
  kFirstWeight,
  kFirstBias,
  kNormWeight,
  kNormBias,
  kNormMean,
  kNormVariance,
  kSecondWeight,
  kSecondBias,
  kStemTensors
};

Tensor stem_eval(Tensor x, OptionalTensors tensors, double eps) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float, "x must be a float32 map");
  STD_TORCH_CHECK(tensors.size() == kStemTensors && tensors[kFirstWeight].has_value() &&
                      tensors[kSecondWeight].has_value(),
                  "stem: wrong number of tensors");
  for (std::optional<Tensor>& tensor : tensors) {
    if (tensor.has_value()) tensor = as_floats(*tensor);
  }
  StemProblem problem;
  problem.batch = x.size(0);
  problem.in_channels = x.size(1);
  problem.height = x.size(2);
  problem.width = x.size(3);
  STD_TORCH_CHECK(problem.height > 0 && problem.width > 0, "x must have H, W >= 1");
  problem.channels = tensors[kFirstWeight]->size(0);
  problem.out_height = (problem.height + 1) / 2;
  problem.out_width = (problem.width + 1) / 2;
  // TensorFlow's SAME: at stride 2 an odd side has a border on both ends, an even one at the end.
  problem.top = problem.height % 2;
  problem.left = problem.width % 2;
  problem.x = static_cast<const float*>(x.const_data_ptr());
  problem.image_stride = x.stride(0);
  problem.channel_stride = x.stride(1);
  problem.row_stride = x.stride(2);
  problem.column_stride = x.stride(3);
  const int64_t channels = problem.channels;
  problem.first.weight =
      float_data("conv_0.weight", tensors[kFirstWeight], channels * problem.in_channels * 9);
  problem.first.bias = float_data("conv_0.bias", tensors[kFirstBias], channels);
  problem.second.weight =
      float_data("conv_1.weight", tensors[kSecondWeight], channels * channels * 9);
  problem.second.bias = float_data("conv_1.bias", tensors[kSecondBias], channels);
  const OptionalTensors norm(tensors.begin() + kNormWeight, tensors.begin() + kSecondWeight);
  problem.norm = read_norm("norm_0", norm, 0, {eps}, channels);
  STD_TORCH_CHECK(problem.norm.present, "norm_0 must have running statistics");

  const Tensor output = torch::stable::empty(
      {problem.batch, channels, problem.out_height, problem.out_width}, ScalarType::Float,
      std::nullopt, x.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  problem.output = data_of(output);

  const int64_t workers = thread_count();
  const int64_t packed_size = MOAT_KERNELS_DISPATCH(stem_eval_packed_size)(problem);
  const int64_t scratch_size = MOAT_KERNELS_DISPATCH(stem_eval_scratch_size)(problem);
  const Scratch memory(x, packed_size + workers * scratch_size);
  float* const packed = memory.data();
  const auto pack = MOAT_KERNELS_DISPATCH(stem_eval_pack);
  for_each_task(MOAT_KERNELS_DISPATCH(stem_eval_panels)(problem), workers,
                [&](int64_t panel, int64_t) { pack(problem, panel, packed); });
  const auto compute = MOAT_KERNELS_DISPATCH(stem_eval);
  const int64_t strips = MOAT_KERNELS_DISPATCH(stem_eval_strips)(problem);
  for_each_task(problem.batch * strips, workers, [&](int64_t task, int64_t worker) {
    compute(problem, packed, task / strips, task % strips,
            packed + packed_size + worker * scratch_size);
  });
  return output;
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_stem_eval", TORCH_BOX(&moat_kernels::cpu::stem_eval));
}
