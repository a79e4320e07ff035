#pragma once

// The classifier without gradients.

#include "cpu/common/head_kernels.h"
#include "cpu/host/tensors.h"
#include "fields.h"

namespace moat_kernels::cpu {

struct HeadTensors : Fields {
  std::optional<Tensor> norm_weight, norm_bias, head_weight, head_bias;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("norm_weight", self.norm_weight);
    field("norm_bias", self.norm_bias);
    field("head_weight", self.head_weight);
    field("head_bias", self.head_bias);
  }
};

// Sizes are in floats.
class HeadEval {
 public:
  // All weights of a problem as the kernels read them.
  static int64_t packed_size(const HeadProblem& problem);
  static void pack(const HeadProblem& problem, float* packed);

  // packed: what `pack` wrote.
  HeadEval(const HeadProblem& problem, const float* packed) : problem_(problem), packed_(packed) {}
  // Of the output.
  int64_t columns() const { return problem_.classes > 0 ? problem_.classes : problem_.channels; }
  int64_t scratch_size() const;
  void compute(float* output, float* scratch) const;

 private:
  HeadProblem problem_;
  const float* packed_;
};

// All of a head but the maps that it reads; tensors must be contiguous floats, the norm's weight is
// given.
HeadProblem read_head(const HeadTensors& tensors, double eps);
void set_maps(const MapSize& x, HeadProblem& problem);

}  // namespace moat_kernels::cpu
