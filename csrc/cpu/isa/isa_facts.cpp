#include "cpu/common/isa_facts.h"

#include "cpu/isa/product.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

const char* isa_name() {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
  return "amx";
#elif defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  return "avx512_bf16";
#else
  return "avx512";
#endif
#elif defined(__AVX2__) && defined(__FMA__)
  return "avx2";
#else
  return "baseline";
#endif
}

bool isa_multiplies(Product kind) { return has_product(kind); }

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
