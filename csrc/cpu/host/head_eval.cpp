// How the classifier is divided among threads.

#include "cpu/host/head_eval.h"

#include <algorithm>

#include "cpu/host/dispatch.h"
#include "cpu/host/parallel.h"

namespace moat_kernels::cpu {

HeadProblem read_head(const HeadTensors& tensors, double eps) {
  HeadProblem problem;
  problem.channels = axis_of("norm_weight", tensors.norm_weight, 0);
  problem.eps = static_cast<float>(eps);
  problem.norm_weight = float_data("norm_weight", tensors.norm_weight, {problem.channels});
  problem.norm_bias = float_data("norm_bias", tensors.norm_bias, {problem.channels});
  if (!tensors.head_weight.has_value()) return problem;
  problem.classes = axis_of("head_weight", tensors.head_weight, 0);
  problem.weight =
      float_data("head_weight", tensors.head_weight, {problem.classes, problem.channels});
  problem.bias = float_data("head_bias", tensors.head_bias, {problem.classes});
  return problem;
}

void set_maps(const MapSize& x, HeadProblem& problem) {
  STD_TORCH_CHECK(x.channels == problem.channels, "x must have ", problem.channels,
                  " channels, got ", x.channels);
  STD_TORCH_CHECK(x.height > 0 && x.width > 0, "x must have H, W >= 1");
  problem.batch = x.batch;
  problem.pixels = x.height * x.width;
}

int64_t HeadEval::packed_size(const HeadProblem& problem) {
  return MOAT_KERNELS_DISPATCH(head_eval_packed_size)(problem);
}

void HeadEval::pack(const HeadProblem& problem, float* packed) {
  MOAT_KERNELS_DISPATCH(head_eval_pack)(problem, packed);
}

int64_t HeadEval::scratch_size() const {
  return problem_.batch * problem_.channels +
         thread_count() * MOAT_KERNELS_DISPATCH(head_eval_panel_scratch)(problem_);
}

void HeadEval::compute(float* output, float* scratch) const {
  HeadProblem problem = problem_;
  problem.output = output;
  float* pooled = problem.classes > 0 ? scratch : output;
  const int64_t workers = thread_count();
  const auto pool = MOAT_KERNELS_DISPATCH(head_eval_pool);
  for_each_task(problem.batch, workers,
                [&](int64_t image, int64_t) { pool(problem, packed_, image, pooled); });
  float* const panels = scratch + problem.batch * problem.channels;
  const int64_t panel_scratch = MOAT_KERNELS_DISPATCH(head_eval_panel_scratch)(problem);
  const auto classify = MOAT_KERNELS_DISPATCH(head_eval_classify);
  for_each_task(MOAT_KERNELS_DISPATCH(head_eval_panels)(problem), workers,
                [&](int64_t panel, int64_t worker) {
                  classify(problem, packed_, pooled, panel, panels + worker * panel_scratch);
                });
}

}  // namespace moat_kernels::cpu
