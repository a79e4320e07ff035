#include "cpu/common/isa_name.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

const char* isa_name() {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
  return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
  return "avx2";
#else
  return "baseline";
#endif
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
