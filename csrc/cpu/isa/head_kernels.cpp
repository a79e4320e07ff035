// The classifier: output = W norm(mean of the pixels of x) + b. Memory moves x and W once; a panel
// of classes is multiplied with all images.

#include "cpu/common/head_kernels.h"

#include "cpu/isa/gemm.h"
#include "cpu/isa/layer_norm.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

// The norm's weight and bias, the panels [channels][kPanel], the classes' biases.
struct PackedHead {
  int64_t norm_bias, panels, biases, size;
};

PackedHead packed_head(const HeadProblem& problem) {
  PackedHead packed;
  const int64_t channels = round_up(problem.channels, kPanel);
  const int64_t classes = round_up(problem.classes, kPanel);
  packed.norm_bias = channels;
  packed.panels = 2 * channels;
  packed.biases = packed.panels + classes * problem.channels;
  packed.size = packed.biases + classes;
  return packed;
}

}  // namespace

int64_t head_eval_packed_size(const HeadProblem& problem) { return packed_head(problem).size; }

int64_t head_eval_panels(const HeadProblem& problem) { return divide_up(problem.classes, kPanel); }

int64_t head_eval_panel_scratch(const HeadProblem& problem) { return problem.batch * kPanel; }

void head_eval_pack(const HeadProblem& problem, float* packed) {
  const PackedHead layout = packed_head(problem);
  for (int64_t i = 0; i < problem.channels; ++i) {
    packed[i] = problem.norm_weight ? problem.norm_weight[i] : 1.0f;
    packed[layout.norm_bias + i] = problem.norm_bias ? problem.norm_bias[i] : 0.0f;
  }
  pack(problem.weight, problem.channels, problem.classes, problem.channels, nullptr, nullptr,
       packed + layout.panels);
  for (int64_t i = 0; i < round_up(problem.classes, kPanel); ++i) {
    packed[layout.biases + i] = problem.bias && i < problem.classes ? problem.bias[i] : 0.0f;
  }
}

void head_eval_pool(const HeadProblem& problem, const float* packed, int64_t image, float* pooled) {
  const int64_t channels = problem.channels;
  float* row = pooled + image * channels;
  __builtin_memset(row, 0, static_cast<size_t>(channels) * sizeof(float));
  with_elements(problem.x_type, problem.x, [&](auto* x) __attribute__((always_inline)) {
    x += image * problem.pixels * channels;
    for (int64_t pixel = 0; pixel < problem.pixels; ++pixel)
      add(x + pixel * channels, channels, row);
  });
  const float factor = 1.0f / static_cast<float>(problem.pixels);
  for (int64_t i = 0; i < channels; ++i) row[i] *= factor;
  normalize_row(channels, problem.eps, packed, packed + packed_head(problem).norm_bias, row,
                Rounded<float>(row));
}

void head_eval_classify(const HeadProblem& problem, const float* packed, const float* pooled,
                        int64_t panel, float* scratch) {
  const PackedHead layout = packed_head(problem);
  const int64_t channels = problem.channels;
  const int64_t first = panel * kPanel;
  const int64_t columns = smaller(problem.classes - first, kPanel);
  gemm(problem.batch, columns, channels, {pooled, channels, 1},
       packed + layout.panels + first * channels, channels * kPanel, kPanel, scratch, kPanel, false,
       packed + layout.biases + first);
  for (int64_t image = 0; image < problem.batch; ++image) {
    narrow(scratch + image * kPanel, columns, problem.output + image * problem.classes + first);
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
