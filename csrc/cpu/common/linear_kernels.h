#pragma once

#include <cstdint>

#include "cpu/common/per_isa.h"
#include "cpu/common/types.h"

namespace moat_kernels::cpu {

// Columns of a result that a task packs the weight for, or computes the weight's gradient for; and
// the most rows and columns of a result that a task computes.
constexpr int64_t kLinearColumns = 64;
constexpr int64_t kLinearTileRows = 128;
constexpr int64_t kLinearTileColumns = 256;

}  // namespace moat_kernels::cpu

// A linear layer's products, over a part of its rows or of its weight [N, K]. N and K are multiples
// of 16. Rows are in what products read, floats or bfloat16, and weights are packed as
// pack_kernels.h says; depths are in elements.
MOAT_KERNELS_DECLARE_PER_ISA(
    // out = x W^T + bias for at most kLinearTileRows rows of x [rows][depth] and those
    // kLinearTileColumns columns that `packed` holds; bias may be null. out_stride: elements from
    // one row of `out` to the next. scratch: linear_scratch floats.
    void linear_rows(Product product, int64_t rows, int64_t columns, int64_t depth, const void* x,
                     const float* packed, const float* bias, void* out, ElementType type,
                     int64_t out_stride, float* scratch);
    // gradient [columns][depth] = grad^T x and sums [columns] of grad, for at most kLinearColumns
    // of the columns of grad [rows][grad_stride], whose elements are those of x. pairs: x as words
    // along the rows (pair_rows); of floats they are x.
    void linear_weight(Product product, int64_t rows, int64_t columns, int64_t depth,
                       const void* grad, int64_t grad_stride, const float* pairs, float* scratch,
                       float* gradient, float* sums);
    // Floats of scratch that either needs.
    int64_t linear_scratch();
    // total [0 .. count) = the sum of `parts` parts, `stride` floats from one to the next.
    void linear_add_parts(const float* part, int64_t parts, int64_t stride, int64_t count,
                          float* total);)
