#pragma once

// What this CPU multiplies.

#include "cpu/common/isa_facts.h"
#include "cpu/host/dispatch.h"
#include "cpu/host/tensors.h"

namespace moat_kernels::cpu {

inline bool has_product(Product product) { return MOAT_KERNELS_DISPATCH(isa_multiplies)(product); }

// Of tensors of a type: in bfloat16 if they are that and the CPU multiplies it, else in float32.
inline Product product_of(ScalarType type) {
  const bool narrow = type == ScalarType::BFloat16 && has_product(Product::bfloat16);
  return narrow ? Product::bfloat16 : Product::float32;
}

// Of the operands of such products, of float32 or bfloat16.
inline ScalarType operand_type(Product product) {
  return product == Product::bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

}  // namespace moat_kernels::cpu
