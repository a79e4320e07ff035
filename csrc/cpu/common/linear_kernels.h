#pragma once

#include <cstdint>

#include "cpu/common/per_isa.h"

namespace moat_kernels::cpu {

// Columns of a result that a task packs the weight for, or computes the weight's gradient for.
constexpr int64_t kLinearColumns = 64;

}  // namespace moat_kernels::cpu

// A linear layer's products, over a part of its rows or of its weight [N, K]. N and K are multiples
// of 16. Weights are packed as pack_kernels.h says.
MOAT_KERNELS_DECLARE_PER_ISA(
    // out = x W^T + bias for some rows of x [rows][depth] and the columns that `packed` holds; bias
    // may be null. out_stride: floats from one row of `out` to the next.
    void linear_rows(int64_t rows, int64_t columns, int64_t depth, const float* x,
                     const float* packed, const float* bias, float* out, int64_t out_stride);
    // gradient [columns][depth] = grad^T x and sums [columns] of grad, for at most kLinearColumns
    // of the columns of grad [rows][grad_stride].
    void linear_weight(int64_t rows, int64_t columns, int64_t depth, const float* grad,
                       int64_t grad_stride, const float* x, float* scratch, float* gradient,
                       float* sums);
    // Floats of scratch that linear_weight needs.
    int64_t linear_scratch();
    // total [0 .. count) = the sum of `parts` parts, `stride` floats from one to the next.
    void linear_add_parts(const float* part, int64_t parts, int64_t stride, int64_t count,
                          float* total);)
