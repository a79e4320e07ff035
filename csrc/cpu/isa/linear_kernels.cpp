// The three products of a linear layer's training: x W^T, grad W and grad^T x. Each operand crosses
// memory about once; a strip of rows stays in the L2 cache beside the part of the result that it
// adds to.

#include "cpu/common/linear_kernels.h"

#include "cpu/isa/gemm.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

// Rows of grad that are a tile together, in words along the rows. A pitch of exactly kLinearColumns
// words would map them to a quarter of the sets of an L1 cache.
constexpr int64_t kTileRows = 128;
constexpr int64_t kPitch = kLinearColumns + 16;

}  // namespace

int64_t linear_scratch() {
  return larger(kTileRows * kPitch, kLinearTileRows * kLinearTileColumns);
}

void linear_rows(Product product, int64_t rows, int64_t columns, int64_t depth, const void* x,
                 const float* packed, const float* bias, void* out, ElementType type,
                 int64_t out_stride, float* scratch) {
  const bool in_place = type == ElementType::float32;
  float* sums = in_place ? static_cast<float*>(out) : scratch;
  const int64_t stride = in_place ? out_stride : kLinearTileColumns;
  with_unscaled_product(product, [&](auto kind) __attribute__((always_inline)) {
    using Kind = decltype(kind);
    const int64_t words = words_of<Kind>(depth);
    gemm<Kind>(rows, columns, words, {static_cast<const float*>(x), words, 1}, packed,
               words * kPanel, kPanel, sums, stride, false, bias);
  });
  if (in_place) return;
  with_elements(type, out, [&](auto* elements) {
    for (int64_t row = 0; row < rows; ++row) {
      narrow(sums + row * stride, columns, elements + row * out_stride);
    }
  });
}

void linear_weight(Product product, int64_t rows, int64_t columns, int64_t depth, const void* grad,
                   int64_t grad_stride, const float* pairs, float* scratch, float* gradient,
                   float* sums) {
  float totals[kLinearColumns] = {};
  with_unscaled_product(product, [&](auto kind) __attribute__((always_inline)) {
    using Kind = decltype(kind);
    const auto* elements = static_cast<const typename Kind::Element*>(grad);
    for (int64_t first = 0; first < rows; first += kTileRows) {
      const int64_t count = smaller(kTileRows, rows - first);
      // The product reads grad down its columns: from a tile whose rows lie close together.
      for (int64_t column = 0; column < columns; column += kWidth) {
        Vec sum = load(totals + column);
        for_words<Kind>(0, count, [&](int64_t row, auto together) __attribute__((always_inline)) {
          Vec values[Kind::kPerWord] = {};
          unroll<together>([&](auto i) __attribute__((always_inline)) {
            values[i] = load(elements + (first + row + i) * grad_stride + column);
            sum += values[i];
          });
          store(scratch + row / Kind::kPerWord * kPitch + column, Kind::word_of(values));
        });
        store(totals + column, sum);
      }
      gemm<Kind>(columns, depth, words_of<Kind>(count), {scratch, 1, kPitch},
                 pairs + words_of<Kind>(first) * depth, kPanel, depth, gradient, depth, first > 0);
    }
  });
  __builtin_memcpy(sums, totals, static_cast<size_t>(columns) * sizeof(float));
}

void linear_add_parts(const float* part, int64_t parts, int64_t stride, int64_t count,
                      float* total) {
  for (int64_t i = 0; i < count; i += kWidth) {
    Vec sum = load(part + i);
    for (int64_t index = 1; index < parts; ++index) sum += load(part + index * stride + i);
    store(total + i, sum);
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
