#pragma once

// The MLP of a transformer block without gradients.

#include "cpu/common/mlp_kernels.h"
#include "cpu/host/tensors.h"
#include "fields.h"

namespace moat_kernels::cpu {

struct MlpTensors : Fields {
  std::optional<Tensor> norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("norm_weight", self.norm_weight);
    field("norm_bias", self.norm_bias);
    field("fc1_weight", self.fc1_weight);
    field("fc1_bias", self.fc1_bias);
    field("fc2_weight", self.fc2_weight);
    field("fc2_bias", self.fc2_bias);
  }
};

// Sizes are in floats.
class MlpEval {
 public:
  // All weights of a problem as the kernels read them.
  static int64_t packed_size(const MlpProblem& problem);
  static void pack(const MlpProblem& problem, float* packed);

  // packed: what `pack` wrote.
  MlpEval(const MlpProblem& problem, const float* packed);
  int64_t scratch_size() const;
  void compute(void* result, float* scratch) const;

 private:
  void by_strips(const MlpProblem& problem, float* scratch) const;
  void by_steps(const MlpProblem& problem, float* scratch) const;

  MlpProblem problem_;
  const float* packed_;
  int64_t workers_;
  int64_t strips_;  // 0: threads share all rows
};

// All of an MLP but the maps that it reads; tensors must be contiguous floats.
MlpProblem read_mlp(const MlpTensors& tensors, Activation activation, double eps);
// Raises an error for maps that it cannot read.
void check_maps(const MapSize& y, const MlpProblem& problem);

}  // namespace moat_kernels::cpu
