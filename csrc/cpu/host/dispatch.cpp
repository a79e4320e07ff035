#include "cpu/host/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moat_kernels::cpu {
namespace {

constexpr const char* kVariable = "MOAT_KERNELS_CPU_ISA";

// Whether the CPU has tiles for bfloat16 and bytes, and Linux lets this process use them, which it
// does on request only.
bool has_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kAll = kBFloat16 | kTiles | kInt8;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl; see asm/prctl.h
  return (edx & kAll) == kAll && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa widest_supported() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool narrow =
        __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (avx512 && narrow) return has_tiles() ? Isa::amx : Isa::avx512_bf16;
    return avx512 ? Isa::avx512 : Isa::avx2;
  }
#endif
  return Isa::baseline;
}

Isa parse(const std::string& name) {
  if (name == "baseline") return Isa::baseline;
  if (name == "avx2") return Isa::avx2;
  if (name == "avx512") return Isa::avx512;
  if (name == "avx512_bf16") return Isa::avx512_bf16;
  if (name == "amx") return Isa::amx;
  throw std::runtime_error(std::string(kVariable) + "='" + name +
                           "' is unknown; it may be baseline, avx2, avx512, avx512_bf16 or amx");
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
