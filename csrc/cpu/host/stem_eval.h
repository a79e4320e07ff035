#pragma once

// The stem with fixed statistics, for the op that takes plain weights and for those that keep
// packed ones.

#include "cpu/common/stem_eval_kernels.h"
#include "cpu/host/norm_arguments.h"
#include "cpu/host/tensors.h"

namespace moat_kernels::cpu {

struct StemTensors : Fields {
  std::optional<Tensor> conv_0_weight, conv_0_bias;
  NormTensors norm_0;
  std::optional<Tensor> conv_1_weight, conv_1_bias;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("conv_0_weight", self.conv_0_weight);
    field("conv_0_bias", self.conv_0_bias);
    field("norm_0", self.norm_0);
    field("conv_1_weight", self.conv_1_weight);
    field("conv_1_bias", self.conv_1_bias);
  }
};

// Sizes are in floats.
class StemEval {
 public:
  // All weights of a problem as the kernels read them.
  static int64_t packed_size(const StemProblem& problem);
  static void pack(const StemProblem& problem, float* packed);

  // packed: what `pack` wrote; null: each call packs the problem's own weights.
  StemEval(const StemProblem& problem, const float* packed) : problem_(problem), packed_(packed) {}
  void read(const Tensor& x);  // any strides
  int64_t scratch_size() const;
  void compute(void* output, float* scratch);

 private:
  int64_t worker_size() const;

  StemProblem problem_;
  const float* packed_;
};

// Raises an error unless the kernel can read x.
void check_stem_input(const Tensor& x);

MapSize output_map(const StemProblem& problem);

// All of a stem but the images that it reads; tensors must be contiguous floats.
StemProblem read_stem(const StemTensors& tensors, double eps);
void set_maps(const MapSize& x, StemProblem& problem);

}  // namespace moat_kernels::cpu
