#pragma once

// Chooses a kernel's instruction set at run time; cpu/common/per_isa.h has an example.

namespace moat_kernels::cpu {

// In the order of MOAT_KERNELS_DISPATCH.
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx };

// The widest instruction set that this CPU has and the build knows, or the one that the environment
// variable MOAT_KERNELS_CPU_ISA names. Throws std::runtime_error if that is unknown or not usable.
Isa active_isa();

template <class Function, decltype(sizeof(0)) count>
Function choose(const Function (&variants)[count]) {
  return variants[static_cast<int>(active_isa())];
}

}  // namespace moat_kernels::cpu

// As many as MOAT_KERNELS_DECLARE_PER_ISA declares.
#if defined(__x86_64__)

#define MOAT_KERNELS_DISPATCH(function)                                                     \
  ::moat_kernels::cpu::choose(                                                              \
      {&::moat_kernels::cpu::baseline::function, &::moat_kernels::cpu::avx2::function,      \
       &::moat_kernels::cpu::avx512::function, &::moat_kernels::cpu::avx512_bf16::function, \
       &::moat_kernels::cpu::amx::function})

#else

#define MOAT_KERNELS_DISPATCH(function) \
  ::moat_kernels::cpu::choose({&::moat_kernels::cpu::baseline::function})

#endif
