#pragma once

// The classifier without gradients.

#include "cpu/common/head_kernels.h"
#include "cpu/host/tensors.h"

namespace moat_kernels::cpu {

// Places in the tensors of a head; the order of the Python side.
enum HeadTensor { kHeadNormWeight, kHeadNormBias, kHeadWeight, kHeadBias, kHeadTensors };

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
HeadProblem read_head(const OptionalTensors& tensors, double eps);
void set_maps(const MapSize& x, HeadProblem& problem);

}  // namespace moat_kernels::cpu
