#pragma once

namespace moat_kernels::cpu {

// Numbers as bytes: number = (byte - zero) * scale, with a whole number `zero`.
struct Quantization {
  float scale = 1.0f;
  float zero = 0.0f;
};

}  // namespace moat_kernels::cpu
