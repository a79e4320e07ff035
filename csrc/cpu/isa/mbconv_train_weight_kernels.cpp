// Gradients of weights of the inverted bottleneck's training from the passes' partial sums, and
// what a norm's shift adds. Each touches a weight [E][C] once.

#include "cpu/common/mbconv_train_kernels.h"
#include "cpu/isa/wide.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

Vec sum_of_groups(const float* partial, int64_t groups, int64_t stride) {
  Vec sum = load(partial);
  for (int64_t group = 1; group < groups; ++group) sum += load(partial + group * stride);
  return sum;
}

void add_part(double* totals, Vec value, int64_t count) {
  for (int64_t i = 0; i < smaller(kWidth, count); ++i) totals[i] += static_cast<double>(value[i]);
}

}  // namespace

void train_constants(const float* weight, int64_t rows, int64_t channels, const float* shift,
                     double* constants) {
  for (int64_t row = 0; row < rows; ++row) {
    Vec sum = {};
    for (int64_t i = 0; i < channels; i += kWidth) {
      const int64_t count = channels - i;
      sum = fma(load_part(weight + row * channels + i, count), load_part(shift + i, count), sum);
    }
    constants[row] = static_cast<double>(sum_of_lanes(sum));
  }
}

void train_finish_expand_weight(const float* partial, int64_t groups, int64_t stride, int64_t rows,
                                int64_t channels, const float* weight, const float* scale,
                                const double* constants, const float* shift, float* gradient,
                                double* products, double* totals) {
  const int64_t columns = round_up(channels, kPanel);
  for (int64_t i = 0; i < channels; i += kWidth) {
    const int64_t count = channels - i;
    const Vec factor = load_part(scale + i, count);
    const Vec offset = load_part(shift + i, count);
    Vec product = {};
    Vec total = {};
    for (int64_t row = 0; row < rows; ++row) {
      const Vec sum = sum_of_groups(partial + row * columns + i, groups, stride);
      const Vec w = load_part(weight + row * channels + i, count);
      Vec result = sum * factor;
      product = fma(sum, w, product);
      if (constants) {
        const Vec constant = broadcast(static_cast<float>(constants[row]));
        result = fma(constant, offset, result);
        total = fma(constant, w, total);
      }
      store_part(gradient + row * channels + i, result, count);
    }
    add_part(products + i, product, count);
    add_part(totals + i, total, count);
  }
}

void train_finish_project_weight(const float* partial, int64_t groups, int64_t stride, int64_t rows,
                                 int64_t channels, float* gradient, int64_t gradient_stride) {
  const int64_t columns = round_up(channels, kPanel);
  for (int64_t row = 0; row < rows; row += kWidth) {
    for (int64_t column = 0; column < channels; column += kWidth) {
      Vec tile[kWidth];
      unroll<kWidth>([&](auto i) __attribute__((always_inline)) {
        tile[i] = sum_of_groups(partial + (row + i) * columns + column, groups, stride);
      });
      transpose(tile);
      for (int64_t i = 0; i < smaller(kWidth, channels - column); ++i) {
        store_part(gradient + (column + i) * gradient_stride + row, tile[i], rows - row);
      }
    }
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
