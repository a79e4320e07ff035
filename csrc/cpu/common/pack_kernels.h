#pragma once

#include <cstdint>

#include "cpu/common/per_isa.h"
#include "cpu/common/types.h"

// Matrices as the products of cpu/isa/gemm.h read them: panels of [words of the depth][kPanel], one
// after the other. Not of int8.
MOAT_KERNELS_DECLARE_PER_ISA(
    // Columns rounded up to whole panels.
    int64_t panelled_columns(int64_t columns);
    // weight [columns][depth] (times scale[depth], may be null) or, transposed, [depth][columns]
    // (times scale[columns]) -> packed. stride: floats from one row of the weight to the next.
    void pack_panels(Product product, const float* weight, int64_t stride, int64_t columns,
                     int64_t depth, const float* scale, float* packed);
    void pack_panels_transposed(Product product, const float* weight, int64_t stride,
                                int64_t columns, int64_t depth, const float* scale, float* packed);
    // Rows of bfloat16 [rows][columns], columns a multiple of 16, as words along the rows:
    // [words of the rows][columns], the last of an odd number with zeros.
    void pair_rows(const void* source, int64_t rows, int64_t columns, float* pairs);)
