#pragma once

// Weights as signed bytes with a scale per column: weight = byte * scale.

#include "cpu/isa/gemm.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// The weights column_scale * depth_scale[k] * source[k]; depth_scale may be null.
struct WeightColumn {
  const float* source;
  int64_t depth;
  float column_scale;
  const float* depth_scale;

  float at(int64_t k) const {
    return column_scale * (depth_scale ? depth_scale[k] : 1.0f) * source[k];
  }

  // Such that the largest weight is 127.
  float scale() const {
    float largest = 0.0f;
    for (int64_t k = 0; k < depth; ++k) {
      const float magnitude = __builtin_fabsf(at(k));
      if (magnitude > largest) largest = magnitude;
    }
    return largest > 0.0f ? largest / 127.0f : 1.0f;
  }

  int8_t byte(int64_t k, float scale) const {
    return static_cast<int8_t>(__builtin_rintf(at(k) / scale));
  }

  // The sum of the bytes.
  float sum(float scale) const {
    int64_t total = 0;
    for (int64_t k = 0; k < depth; ++k) total += byte(k, scale);
    return static_cast<float>(total);
  }

  // To place `column` of a panel [words of the depth][kPanel].
  void pack(float scale, int64_t column, float* panel) const {
    int8_t* bytes = reinterpret_cast<int8_t*>(panel);
    for (int64_t k = 0; k < round_up(depth, 4); ++k) {
      bytes[(k / 4 * kPanel + column) * 4 + k % 4] = k < depth ? byte(k, scale) : 0;
    }
  }
};

// A column that does not exist.
inline void clear_column(int64_t depth, int64_t column, float* panel) {
  for (int64_t word = 0; word < divide_up(depth, 4); ++word) panel[word * kPanel + column] = 0.0f;
}

// What the sums of a column are multiplied with, and what is added, so that a product of bytes is
// one of numbers plus bias: the zero of A's bytes is in the shift.
struct FactorAndShift {
  float factor, shift;
};

inline FactorAndShift to_number(Quantization a, float scale, float sum, float bias) {
  const float factor = a.scale * scale;
  return {factor, bias - a.zero * factor * sum};
}

// A panel of `columns` rows of `source`, each of `depth` times its column_scale, which may be null.
// shift: holds their biases, and then with `factor` what turns sums to numbers.
inline void pack_scaled(Quantization a, const float* source, int64_t columns, int64_t depth,
                        const float* column_scale, const float* depth_scale, float* panel,
                        float* shift, float* factor) {
  for (int64_t i = 0; i < kPanel; ++i) {
    if (i >= columns) {
      clear_column(depth, i, panel);
      factor[i] = 0.0f;
      continue;
    }
    const WeightColumn column = {source + i * depth, depth, column_scale ? column_scale[i] : 1.0f,
                                 depth_scale};
    const float scale = column.scale();
    column.pack(scale, i, panel);
    const FactorAndShift number = to_number(a, scale, column.sum(scale), shift[i]);
    shift[i] = number.shift;
    factor[i] = number.factor;
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
