#pragma once

// The build compiles every file of csrc/cpu/isa once per instruction set, with MOAT_KERNELS_ISA
// defined as that set's name, and those of csrc/cpu/host once, for any CPU. This header declares a
// kernel for all sets, cpu/host/dispatch.h chooses one of them at run time:
//
//   common/double_kernels.h   MOAT_KERNELS_DECLARE_PER_ISA(
//                                 void double_values(float* values, int64_t n);)
//   isa/double_kernels.cpp    namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
//                             void double_values(float* values, int64_t n) { ... }
//                             }
//   host/double.cpp           MOAT_KERNELS_DISPATCH(double_values)(values, n);
//
// What a file of csrc/cpu/isa compiles lies in its instruction set's namespace or has internal
// linkage. An inline function or a template from elsewhere, std:: included, would be emitted once
// per instruction set under one name, and the linker may keep the copy that the running CPU cannot
// execute. So such a file includes only headers of csrc/cpu/isa, those of csrc/cpu/common, which
// hold plain structs and declarations, and a few of the standard library for their types.
// tests/test_native_sources.py checks that, and compiles the files to look for what they share.

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
  namespace avx512_bf16 {                 \
  __VA_ARGS__                             \
  }                                       \
  namespace amx {                         \
  __VA_ARGS__                             \
  }                                       \
  }

#else

#define MOAT_KERNELS_DECLARE_PER_ISA(...) \
  namespace moat_kernels::cpu::baseline { \
  __VA_ARGS__                             \
  }

#endif
