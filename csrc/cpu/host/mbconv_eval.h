#pragma once

// The inverted bottleneck with fixed statistics, for the op that takes plain weights and for those
// that keep packed ones.

#include "cpu/common/mbconv_eval_kernels.h"
#include "cpu/host/mbconv_arguments.h"

namespace moat_kernels::cpu {

// Sizes are in floats.
class MBConvEval {
 public:
  // All weights of a problem as the kernels read them.
  static int64_t packed_size(const MBConvProblem& problem);
  static void pack(const MBConvProblem& problem, float* packed);

  // packed: what `pack` wrote; null: each call packs the problem's own weights.
  MBConvEval(const MBConvProblem& problem, const float* packed);
  int64_t scratch_size() const;
  void compute(float* scratch) const;

 private:
  MBConvProblem problem_;
  const float* packed_;
};

MapSize output_map(const MBConvProblem& problem);

}  // namespace moat_kernels::cpu
