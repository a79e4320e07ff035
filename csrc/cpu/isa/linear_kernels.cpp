// The three products of a linear layer's training: x W^T, grad W and grad^T x. Each operand crosses
// memory about once; a strip of rows stays in the L2 cache beside the part of the result that it
// adds to.

#include "cpu/common/linear_kernels.h"

#include "cpu/isa/gemm.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

// A tile of grad. A pitch of exactly kLinearColumns floats would map its rows to a quarter of the
// sets of an L1 cache.
constexpr int64_t kTileRows = 128;
constexpr int64_t kPitch = kLinearColumns + 16;

}  // namespace

int64_t linear_scratch() { return kTileRows * kPitch; }

void linear_rows(int64_t rows, int64_t columns, int64_t depth, const float* x, const float* packed,
                 const float* bias, float* out, int64_t out_stride) {
  for (int64_t row = 0; bias && row < rows; ++row) {
    __builtin_memcpy(out + row * out_stride, bias, static_cast<size_t>(columns) * sizeof(float));
  }
  gemm(rows, columns, depth, {x, depth, 1}, packed, depth * kPanel, kPanel, out, out_stride,
       bias != nullptr);
}

void linear_weight(int64_t rows, int64_t columns, int64_t depth, const float* grad,
                   int64_t grad_stride, const float* x, float* scratch, float* gradient,
                   float* sums) {
  float totals[kLinearColumns] = {};
  for (int64_t first = 0; first < rows; first += kTileRows) {
    const int64_t count = smaller(kTileRows, rows - first);
    // The product reads grad down its columns: from a tile whose rows lie close together.
    for (int64_t column = 0; column < columns; column += kWidth) {
      Vec sum = load(totals + column);
      for (int64_t row = 0; row < count; ++row) {
        const Vec value = load(grad + (first + row) * grad_stride + column);
        store(scratch + row * kPitch + column, value);
        sum += value;
      }
      store(totals + column, sum);
    }
    gemm(columns, depth, count, {scratch, 1, kPitch}, x + first * depth, kPanel, depth, gradient,
         depth, first > 0);
  }
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
