#include "cpu/common/pack_kernels.h"

#include "cpu/isa/gemm.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

int64_t panelled_columns(int64_t columns) { return panelled(columns); }

void pack_panels(Product product, const float* weight, int64_t stride, int64_t columns,
                 int64_t depth, const float* scale, float* packed) {
  with_unscaled_product(product, [&](auto kind) __attribute__((always_inline)) {
    pack<decltype(kind)>(weight, stride, columns, depth, nullptr, scale, packed);
  });
}

void pack_panels_transposed(Product product, const float* weight, int64_t stride, int64_t columns,
                            int64_t depth, const float* scale, float* packed) {
  with_unscaled_product(product, [&](auto kind) __attribute__((always_inline)) {
    using Kind = decltype(kind);
    const int64_t words = words_of<Kind>(depth);
    for (int64_t first = 0; first < columns; first += kWidth) {
      const int64_t count = columns - first;
      const Vec factor = scale ? load_part(scale + first, count) : broadcast(1.0f);
      float* panel = packed + first / kPanel * words * kPanel + first % kPanel;
      for_words<Kind>(0, depth, [&](int64_t k, auto rows) __attribute__((always_inline)) {
        Vec values[Kind::kPerWord] = {};
        unroll<rows>([&](auto i) __attribute__((always_inline)) {
          values[i] = load_part(weight + (k + i) * stride + first, count) * factor;
        });
        store(panel + k / Kind::kPerWord * kPanel, Kind::word_of(values));
      });
    }
  });
}

void pair_rows(const void* source, int64_t rows, int64_t columns, float* pairs) {
  const auto* row = static_cast<const uint16_t*>(source);
  for (int64_t i = 0; i < rows; i += 2, row += 2 * columns, pairs += columns) {
    for (int64_t column = 0; column < columns; column += kWidth) {
      const BitsVec odd = i + 1 < rows ? load_half_bits(row + columns + column) : BitsVec{};
      store(pairs + column, vec_of(load_half_bits(row + column) | (odd << 16)));
    }
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
