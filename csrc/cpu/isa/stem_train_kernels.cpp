// Norm and GELU of the stem in training:
//   forward   gelu((z - centre) scale + shift)               reads z, writes the output
//   sums      dy = grad gelu'(y), its sum and that of dy z   reads grad and z
//   backward  a dy + b z + c in place of grad                reads grad and z, writes grad
// dy is computed twice rather than stored: a pass over memory costs more than the polynomial.

#include "cpu/common/stem_train_kernels.h"

#include "cpu/isa/activation.h"
#include "cpu/isa/lanes.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

static_assert(kStemGroup % kLaneFloats == 0);

// Calls function(lane, offset) for the first of each group of lanes, over runs of rows that stay in
// the L1 cache; `count` rows of it follow each other `period` floats apart from `offset` on.
template <class Function>
[[gnu::always_inline]] inline void for_groups(int64_t rows, int64_t period, Function&& function) {
  for_pixel_runs(rows, [&](int64_t first, int64_t last) __attribute__((always_inline)) {
    for (int64_t lane = 0; lane < period; lane += kLaneFloats) {
      function(lane, first * period + lane, last - first);
    }
  });
}

// The coefficients of a group of lanes.
struct NormLanes {
  Lanes centre, scale, shift;
};

[[gnu::always_inline]] inline NormLanes load_norm(const StemNorm& norm, int64_t lane) {
  return {load_lanes(norm.centre + lane), load_lanes(norm.scale + lane),
          load_lanes(norm.shift + lane)};
}

// values = z - centre; dy = grad * gelu'(values * scale + shift)
[[gnu::always_inline]] inline void centred_and_slope(const float* z, const float* grad,
                                                     const NormLanes& norm, Lanes& values,
                                                     Lanes& dy) {
  unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
    values.v[i] = load(z + i * kWidth) - norm.centre.v[i];
    const Vec y = fma(values.v[i], norm.scale.v[i], norm.shift.v[i]);
    dy.v[i] = load(grad + i * kWidth) * gelu_and_slope(y).slope;
  });
}

}  // namespace

void stem_train_forward(int64_t rows, int64_t period, const float* z, const StemNorm& norm,
                        float* output) {
  for_groups(rows, period,
             [&](int64_t lane, int64_t offset, int64_t count) __attribute__((always_inline)) {
               const NormLanes coefficients = load_norm(norm, lane);
               for (int64_t row = 0; row < count; ++row, offset += period) {
                 Lanes value = load_lanes(z + offset);
                 unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
                   value.v[i] = fma(value.v[i] - coefficients.centre.v[i], coefficients.scale.v[i],
                                    coefficients.shift.v[i]);
                 });
                 gelu<kLanes>(value.v);
                 store_lanes(output + offset, value);
               }
             });
}

void stem_train_sums(int64_t rows, int64_t period, const float* z, const StemNorm& norm,
                     const float* grad, double* sums) {
  for_groups(rows, period,
             [&](int64_t lane, int64_t offset, int64_t count) __attribute__((always_inline)) {
               const NormLanes coefficients = load_norm(norm, lane);
               Lanes sum = {};
               Lanes product = {};
               for (int64_t row = 0; row < count; ++row, offset += period) {
                 Lanes values;
                 Lanes dy;
                 centred_and_slope(z + offset, grad + offset, coefficients, values, dy);
                 unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
                   sum.v[i] += dy.v[i];
                   product.v[i] = fma(dy.v[i], values.v[i], product.v[i]);
                 });
               }
               flush(sum, sums + lane);
               flush(product, sums + period + lane);
             });
}

void stem_train_backward(int64_t rows, int64_t period, const float* z, const StemNorm& norm,
                         const Combination& factors, float* grad) {
  for_groups(rows, period,
             [&](int64_t lane, int64_t offset, int64_t count) __attribute__((always_inline)) {
               const NormLanes coefficients = load_norm(norm, lane);
               const Lanes a = load_lanes(factors.a + lane);
               const Lanes b = load_lanes(factors.b + lane);
               const Lanes c = load_lanes(factors.c + lane);
               for (int64_t row = 0; row < count; ++row, offset += period) {
                 Lanes values;
                 Lanes dy;
                 centred_and_slope(z + offset, grad + offset, coefficients, values, dy);
                 unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
                   dy.v[i] = fma(dy.v[i], a.v[i], fma(values.v[i], b.v[i], c.v[i]));
                 });
                 store_lanes(grad + offset, dy);
               }
             });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
