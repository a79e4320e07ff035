#include "cpu/common/pack_kernels.h"

#include "cpu/isa/gemm.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

int64_t panelled_columns(int64_t columns) { return panelled(columns); }

void pack_panels(const float* weight, int64_t stride, int64_t columns, int64_t depth,
                 const float* scale, float* packed) {
  pack(weight, stride, columns, depth, nullptr, scale, packed);
}

void pack_panels_transposed(const float* weight, int64_t stride, int64_t columns, int64_t depth,
                            const float* scale, float* packed) {
  for (int64_t first = 0; first < columns; first += kWidth) {
    const int64_t count = columns - first;
    const Vec factor = scale ? load_part(scale + first, count) : broadcast(1.0f);
    float* panel = packed + first / kPanel * depth * kPanel + first % kPanel;
    for (int64_t k = 0; k < depth; ++k) {
      store(panel + k * kPanel, load_part(weight + k * stride + first, count) * factor);
    }
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
