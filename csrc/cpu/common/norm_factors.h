#pragma once

// What passes of training multiply channels by.

namespace moat_kernels::cpu {

// Scale and shift of a norm, [channels] each.
struct ScaleShift {
  const float* scale;
  const float* shift;
};

// a * gradient + b * z + c, [channels] each: what the backward of a norm makes of them.
struct Combination {
  const float* a;
  const float* b;
  const float* c;
};

}  // namespace moat_kernels::cpu
