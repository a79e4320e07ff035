#pragma once

#include "cpu/common/per_isa.h"

// The instruction set that the called copy was compiled for, as the compiler itself reports it.
MOAT_KERNELS_DECLARE_PER_ISA(const char* isa_name();)
