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
template <class Element>
[[gnu::always_inline]] inline void centred_and_slope(const Element* z, const Element* grad,
                                                     const NormLanes& norm, Lanes& values,
                                                     Lanes& dy) {
  unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
    values.v[i] = load(z + i * kWidth) - norm.centre.v[i];
    const Vec y = fma(values.v[i], norm.scale.v[i], norm.shift.v[i]);
    dy.v[i] = load(grad + i * kWidth) * gelu_and_slope(y).slope;
  });
}

template <class Element>
void apply(int64_t rows, int64_t period, const void* z, const StemNorm& norm, Element* output) {
  const auto* from = static_cast<const Element*>(z);
  for_groups(rows, period,
             [&](int64_t lane, int64_t offset, int64_t count) __attribute__((always_inline)) {
               const NormLanes coefficients = load_norm(norm, lane);
               for (int64_t row = 0; row < count; ++row, offset += period) {
                 Lanes value = load_lanes(from + offset);
                 unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
                   value.v[i] = fma(value.v[i] - coefficients.centre.v[i], coefficients.scale.v[i],
                                    coefficients.shift.v[i]);
                 });
                 activate<Activation::gelu, kLanes, Element>(value.v);
                 store_lanes(output + offset, value);
               }
             });
}

template <class Element>
void add_sums(int64_t rows, int64_t period, const void* z, const StemNorm& norm,
              const Element* grad, double* sums) {
  const auto* from = static_cast<const Element*>(z);
  for_groups(rows, period,
             [&](int64_t lane, int64_t offset, int64_t count) __attribute__((always_inline)) {
               const NormLanes coefficients = load_norm(norm, lane);
               Lanes sum = {};
               Lanes product = {};
               for (int64_t row = 0; row < count; ++row, offset += period) {
                 Lanes values;
                 Lanes dy;
                 centred_and_slope(from + offset, grad + offset, coefficients, values, dy);
                 unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
                   sum.v[i] += dy.v[i];
                   product.v[i] = fma(dy.v[i], values.v[i], product.v[i]);
                 });
               }
               flush(sum, sums + lane);
               flush(product, sums + period + lane);
             });
}

template <class Element>
void differentiate(int64_t rows, int64_t period, const void* z, const StemNorm& norm,
                   const Combination& factors, Element* grad) {
  const auto* from = static_cast<const Element*>(z);
  for_groups(rows, period,
             [&](int64_t lane, int64_t offset, int64_t count) __attribute__((always_inline)) {
               const NormLanes coefficients = load_norm(norm, lane);
               const Lanes a = load_lanes(factors.a + lane);
               const Lanes b = load_lanes(factors.b + lane);
               const Lanes c = load_lanes(factors.c + lane);
               for (int64_t row = 0; row < count; ++row, offset += period) {
                 Lanes values;
                 Lanes dy;
                 centred_and_slope(from + offset, grad + offset, coefficients, values, dy);
                 unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
                   dy.v[i] = fma(dy.v[i], a.v[i], fma(values.v[i], b.v[i], c.v[i]));
                 });
                 store_lanes(grad + offset, dy);
               }
             });
}

}  // namespace

void stem_train_forward(ElementType type, int64_t rows, int64_t period, const void* z,
                        const StemNorm& norm, void* output) {
  with_elements(type, output, [&](auto* to) { apply(rows, period, z, norm, to); });
}

void stem_train_sums(ElementType type, int64_t rows, int64_t period, const void* z,
                     const StemNorm& norm, const void* grad, double* sums) {
  with_elements(type, grad,
                [&](auto* gradient) { add_sums(rows, period, z, norm, gradient, sums); });
}

void stem_train_backward(ElementType type, int64_t rows, int64_t period, const void* z,
                         const StemNorm& norm, const Combination& factors, void* grad) {
  with_elements(type, grad,
                [&](auto* gradient) { differentiate(rows, period, z, norm, factors, gradient); });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
