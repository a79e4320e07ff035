#pragma once

namespace moat_kernels::cpu {

struct BatchNorm {
  bool present = false;
  const float* weight = nullptr;  // null: ones
  const float* bias = nullptr;    // null: zeros
  const float* mean = nullptr;
  const float* variance = nullptr;
  float eps = 0;
};

// A 1x1 convolution [out, in] or the depthwise one [channels, 9].
struct Convolution {
  const float* weight = nullptr;
  const float* bias = nullptr;  // null: zeros
};

}  // namespace moat_kernels::cpu
