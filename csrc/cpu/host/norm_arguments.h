#pragma once

// The tensors of batch norms among the arguments of ops.

#include "cpu/common/layers.h"
#include "cpu/host/tensors.h"
#include "fields.h"

namespace moat_kernels::cpu {

struct NormTensors : Fields {
  std::optional<Tensor> weight, bias, running_mean, running_var;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("weight", self.weight);
    field("bias", self.bias);
    field("running_mean", self.running_mean);
    field("running_var", self.running_var);
  }
};

// With fixed statistics; absent if it has none.
inline BatchNorm read_norm(const char* name, const NormTensors& tensors, double eps,
                           int64_t channels) {
  BatchNorm norm;
  norm.weight = float_data(name, tensors.weight, {channels}, "_weight");
  norm.bias = float_data(name, tensors.bias, {channels}, "_bias");
  norm.mean = float_data(name, tensors.running_mean, {channels}, "_running_mean");
  norm.variance = float_data(name, tensors.running_var, {channels}, "_running_var");
  STD_TORCH_CHECK((norm.mean == nullptr) == (norm.variance == nullptr), name,
                  " must have both running_mean and running_var, or none");
  norm.present = norm.mean != nullptr;
  norm.eps = static_cast<float>(eps);
  return norm;
}

}  // namespace moat_kernels::cpu
