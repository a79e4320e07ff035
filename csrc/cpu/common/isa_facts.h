#pragma once

#include "cpu/common/per_isa.h"
#include "cpu/common/types.h"

// isa_name: the instruction set that the called copy was compiled for, as the compiler itself
// reports it; isa_multiplies: whether its kernels have products of a kind.
MOAT_KERNELS_DECLARE_PER_ISA(const char* isa_name(); bool isa_multiplies(Product kind);)
