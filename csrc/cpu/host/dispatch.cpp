#include "cpu/host/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace moat_kernels::cpu {
namespace {

constexpr const char* kVariable = "MOAT_KERNELS_CPU_ISA";

Isa widest_supported() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool narrow =
        __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (avx512) return narrow ? Isa::avx512_bf16 : Isa::avx512;
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

Isa parse(const std::string& name) {
  if (name == "baseline") return Isa::baseline;
  if (name == "avx2") return Isa::avx2;
  if (name == "avx512") return Isa::avx512;
  if (name == "avx512_bf16") return Isa::avx512_bf16;
  throw std::runtime_error(std::string(kVariable) + "='" + name +
                           "' is unknown; it may be baseline, avx2, avx512 or avx512_bf16");
}

Isa resolve() {
  const Isa widest = widest_supported();
  const char* requested = std::getenv(kVariable);
  if (requested == nullptr || *requested == '\0') return widest;
  const Isa isa = parse(requested);
  if (isa > widest) {
    throw std::runtime_error(std::string(kVariable) + "='" + requested +
                             "' names an instruction set that this CPU does not have");
  }
  return isa;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = resolve();
  return isa;
}

}  // namespace moat_kernels::cpu
