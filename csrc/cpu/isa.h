#pragma once

// The build compiles every file of csrc/cpu/kernels once per instruction set, with MOAT_KERNELS_ISA
// defined as that set's name. This header is what a kernel needs to be declared in all of them, and
// what its caller needs to choose one at run time:
//
//   kernels/double.h    MOAT_KERNELS_DECLARE_PER_ISA(void double_values(float* values, int64_t n);)
//   kernels/double.cpp  namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
//                       void double_values(float* values, int64_t n) { ... }
//                       }
//   the caller          MOAT_KERNELS_DISPATCH(double_values)(values, n);
//
// A kernel file holds only code of its own: an inline function or a template from elsewhere, std::
// included, would be emitted once per instruction set under one name, and the linker may keep the
// copy that the running CPU cannot execute.

#if defined(__x86_64__)

#define MOAT_KERNELS_DECLARE_PER_ISA(...) \
  namespace moat_kernels::cpu {           \
  namespace baseline {                    \
  __VA_ARGS__                             \
  }                                       \
  namespace avx2 {                        \
  __VA_ARGS__                             \
  }                                       \
  namespace avx512 {                      \
  __VA_ARGS__                             \
  }                                       \
  }

#define MOAT_KERNELS_DISPATCH(function)                                  \
  ::moat_kernels::cpu::choose({&::moat_kernels::cpu::baseline::function, \
                               &::moat_kernels::cpu::avx2::function,     \
                               &::moat_kernels::cpu::avx512::function})

#else

#define MOAT_KERNELS_DECLARE_PER_ISA(...) \
  namespace moat_kernels::cpu::baseline { \
  __VA_ARGS__                             \
  }

#define MOAT_KERNELS_DISPATCH(function) \
  ::moat_kernels::cpu::choose({&::moat_kernels::cpu::baseline::function})

#endif

namespace moat_kernels::cpu {

// In the order of MOAT_KERNELS_DISPATCH.
enum class Isa { baseline, avx2, avx512 };

// The widest instruction set that this CPU has and the build knows, or the one that the environment
// variable MOAT_KERNELS_CPU_ISA names. Throws std::runtime_error if that is unknown or not usable.
Isa active_isa();

template <class Function, decltype(sizeof(0)) count>
Function choose(const Function (&variants)[count]) {
  return variants[static_cast<int>(active_isa())];
}

}  // namespace moat_kernels::cpu
