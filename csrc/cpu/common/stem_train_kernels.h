#pragma once

#include <cstdint>

#include "cpu/common/norm_factors.h"
#include "cpu/common/per_isa.h"
#include "cpu/common/types.h"

namespace moat_kernels::cpu {

// A multiple of the floats that the passes below take at once, in any instruction set.
constexpr int64_t kStemGroup = 64;

// A norm's coefficients, [period] each: y = (z - centre) * scale + shift.
struct StemNorm {
  const float* centre;
  const float* scale;
  const float* shift;
};

}  // namespace moat_kernels::cpu

// Norm and GELU in the stem's training. Maps [pixels][C], all of one type, are seen as rows of
// `period` elements, a common multiple of C and kStemGroup: each lane of a row is of one channel,
// whatever C is.
MOAT_KERNELS_DECLARE_PER_ISA(
    // output = gelu(y)
    void stem_train_forward(ElementType type, int64_t rows, int64_t period, const void* z,
                            const StemNorm& norm, void* output);
    // With dy = grad gelu'(y): sums[0][period] += dy, sums[1][period] += dy (z - centre).
    void stem_train_sums(ElementType type, int64_t rows, int64_t period, const void* z,
                         const StemNorm& norm, const void* grad, double* sums);
    // grad = a dy + b (z - centre) + c, in place.
    void stem_train_backward(ElementType type, int64_t rows, int64_t period, const void* z,
                             const StemNorm& norm, const Combination& factors, void* grad);)
