// How the MLP of a transformer block is divided among threads.

#include "cpu/host/mlp_eval.h"

#include <algorithm>

#include "cpu/host/dispatch.h"
#include "cpu/host/parallel.h"
#include "cpu/host/scratch.h"

namespace moat_kernels::cpu {
namespace {

// What a strip may take of the L2 cache, beside a block's weights.
constexpr int64_t kStripFloats = 96 << 10;
// Rows that make the best of the weights once they are in cache.
constexpr int64_t kMostRows = 256;
// Where a thread would have fewer, all share the rows, and each reads a part of the weights.
constexpr int64_t kFewestRows = 64;
// Rows that are normalised together where threads share them.
constexpr int64_t kNormalizedRows = 32;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many for each thread; none where rows are few.
int64_t strip_count(const MlpProblem& problem, int64_t workers) {
  if (problem.rows < kFewestRows * workers) return 0;
  const int64_t row = MOAT_KERNELS_DISPATCH(mlp_strip_size)(problem, 64) / 64;
  const int64_t fitting = std::clamp<int64_t>(kStripFloats / row, kFewestRows / 2, kMostRows);
  return divide_up(divide_up(problem.rows, fitting), workers) * workers;
}

}  // namespace

int64_t MlpEval::packed_size(const MlpProblem& problem) {
  return MOAT_KERNELS_DISPATCH(mlp_packed_size)(problem);
}

void MlpEval::pack(const MlpProblem& problem, float* packed) {
  MOAT_KERNELS_DISPATCH(mlp_pack_shared)(problem, packed);
  for_each_task(MOAT_KERNELS_DISPATCH(mlp_blocks)(problem), thread_count(),
                [&](int64_t block, int64_t) {
                  MOAT_KERNELS_DISPATCH(mlp_pack_block)(problem, block, packed);
                });
}

MlpEval::MlpEval(const MlpProblem& problem, const float* packed)
    : problem_(problem),
      packed_(packed),
      workers_(thread_count()),
      strips_(strip_count(problem, workers_)) {}

int64_t MlpEval::scratch_size() const {
  if (strips_ > 0) {
    const int64_t rows = divide_up(problem_.rows, strips_);
    return workers_ * whole_lines(MOAT_KERNELS_DISPATCH(mlp_strip_size)(problem_, rows));
  }
  return whole_lines(problem_.rows * MOAT_KERNELS_DISPATCH(mlp_normalized_words)(problem_)) +
         whole_lines(MOAT_KERNELS_DISPATCH(mlp_hidden_size)(problem_)) +
         workers_ * whole_lines(MOAT_KERNELS_DISPATCH(mlp_panel_size)(problem_));
}

void MlpEval::compute(void* result, float* scratch) const {
  MlpProblem problem = problem_;
  problem.result = result;
  if (strips_ > 0) {
    by_strips(problem, scratch);
  } else {
    by_steps(problem, scratch);
  }
}

void MlpEval::by_strips(const MlpProblem& problem, float* scratch) const {
  const int64_t rows = divide_up(problem.rows, strips_);
  const int64_t size = whole_lines(MOAT_KERNELS_DISPATCH(mlp_strip_size)(problem, rows));
  const auto compute = MOAT_KERNELS_DISPATCH(mlp_strip);
  for_each_task(strips_, workers_, [&](int64_t strip, int64_t worker) {
    compute(problem, packed_, problem.rows * strip / strips_, problem.rows * (strip + 1) / strips_,
            scratch + worker * size);
  });
}

void MlpEval::by_steps(const MlpProblem& problem, float* scratch) const {
  float* const normalized = scratch;
  const int64_t words = MOAT_KERNELS_DISPATCH(mlp_normalized_words)(problem);
  float* const hidden = normalized + whole_lines(problem.rows * words);
  float* const panels = hidden + whole_lines(MOAT_KERNELS_DISPATCH(mlp_hidden_size)(problem));
  const int64_t size = whole_lines(MOAT_KERNELS_DISPATCH(mlp_panel_size)(problem));
  const auto normalize = MOAT_KERNELS_DISPATCH(mlp_normalize);
  for_each_task(divide_up(problem.rows, kNormalizedRows), workers_, [&](int64_t task, int64_t) {
    const int64_t first = task * kNormalizedRows;
    normalize(problem, packed_, first, std::min(first + kNormalizedRows, problem.rows), normalized);
  });
  const auto expand = MOAT_KERNELS_DISPATCH(mlp_expand);
  for_each_task(MOAT_KERNELS_DISPATCH(mlp_hidden_panels)(problem), workers_,
                [&](int64_t panel, int64_t worker) {
                  expand(problem, packed_, panel, normalized, panels + worker * size, hidden);
                });
  const auto project = MOAT_KERNELS_DISPATCH(mlp_project);
  for_each_task(MOAT_KERNELS_DISPATCH(mlp_panels)(problem), workers_,
                [&](int64_t panel, int64_t worker) {
                  project(problem, packed_, panel, hidden, panels + worker * size);
                });
}

MlpProblem read_mlp(const MlpTensors& tensors, Activation activation, double eps) {
  MlpProblem problem;
  problem.hidden = axis_of("fc1_weight", tensors.fc1_weight, 0);
  problem.channels = axis_of("fc2_weight", tensors.fc2_weight, 0);
  problem.activation = activation;
  problem.eps = static_cast<float>(eps);
  const int64_t channels = problem.channels, hidden = problem.hidden;
  problem.norm_weight = float_data("norm_weight", tensors.norm_weight, {channels});
  problem.norm_bias = float_data("norm_bias", tensors.norm_bias, {channels});
  problem.fc1_weight = float_data("fc1_weight", tensors.fc1_weight, {hidden, channels});
  problem.fc1_bias = float_data("fc1_bias", tensors.fc1_bias, {hidden});
  problem.fc2_weight = float_data("fc2_weight", tensors.fc2_weight, {channels, hidden});
  problem.fc2_bias = float_data("fc2_bias", tensors.fc2_bias, {channels});
  return problem;
}

void check_maps(const MapSize& y, const MlpProblem& problem) {
  STD_TORCH_CHECK(y.channels == problem.channels, "y must have ", problem.channels,
                  " channels, got ", y.channels);
  STD_TORCH_CHECK(y.height > 0 && y.width > 0, "y must have H, W >= 1");
}

}  // namespace moat_kernels::cpu
