#pragma once

#include <cstdint>

#include "cpu/common/per_isa.h"

MOAT_KERNELS_DECLARE_PER_ISA(
    // Mean [C] and sum of squared deviations [C] of x [pixels][C].
    void channel_moments(const float* x, int64_t pixels, int64_t channels, double* moments);)
