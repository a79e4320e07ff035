#pragma once

#include <cstdint>

#include "cpu/common/per_isa.h"
#include "cpu/common/types.h"

MOAT_KERNELS_DECLARE_PER_ISA(
    // Mean [C] and sum of squared deviations [C] of `pixels` pixels of x [..][C] from `first` on.
    void channel_moments(const void* x, ElementType type, int64_t first, int64_t pixels,
                         int64_t channels, double* moments);)
