#pragma once

// Vectors of floats in the width of the instruction set that the file is compiled for, and the
// conversions between float and the 16-bit types. All intrinsics of the kernels are in this file.
//
// Everything lies in the instruction set's namespace; cpu/common/per_isa.h says why.

#include <cstddef>
#include <cstdint>
#include <utility>

#include "cpu/common/types.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Vec = float __attribute__((vector_size(kWidth * 4)));
using IntVec = int32_t __attribute__((vector_size(kWidth * 4)));
using BitsVec = uint32_t __attribute__((vector_size(kWidth * 4)));
using HalfBitsVec = uint16_t __attribute__((vector_size(kWidth * 2)));

// As std::integral_constant, whose conversion would be a function that instruction sets share.
template <auto constant>
struct Constant {
  static constexpr auto value = constant;
  [[gnu::always_inline]] constexpr operator decltype(constant)() const { return constant; }
};

// Calls function(Constant<i>) for i = 0 .. count-1. Constant subscripts keep local arrays of
// vectors in registers, where GCC spills them if a loop is unrolled later.
template <class Function, int... i>
[[gnu::always_inline]] inline void unroll_over(Function&& function,
                                               std::integer_sequence<int, i...>) {
  (function(Constant<i>{}), ...);
}

template <int count, class Function>
[[gnu::always_inline]] inline void unroll(Function&& function) {
  unroll_over(function, std::make_integer_sequence<int, count>{});
}

[[gnu::always_inline]] inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
[[gnu::always_inline]] inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
[[gnu::always_inline]] inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
[[gnu::always_inline]] inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

[[gnu::always_inline]] inline Vec load(const float* source) {
  Vec value;
  __builtin_memcpy(&value, source, sizeof(value));
  return value;
}

[[gnu::always_inline]] inline void store(float* destination, Vec value) {
  __builtin_memcpy(destination, &value, sizeof(value));
}

// The same of memory that holds integers.
template <class Vector>
[[gnu::always_inline]] inline Vector load_as(const float* source) {
  Vector value;
  __builtin_memcpy(&value, source, sizeof(value));
  return value;
}
[[gnu::always_inline]] inline void store(float* destination, IntVec value) {
  __builtin_memcpy(destination, &value, sizeof(value));
}

// The first `count` elements of a vector; what is not loaded is zero.
inline Vec load_part(const float* source, int64_t count) {
  if (count >= kWidth) return load(source);
  float values[kWidth] = {};
  __builtin_memcpy(values, source, static_cast<size_t>(count) * sizeof(float));
  return load(values);
}

inline void store_part(float* destination, Vec value, int64_t count) {
  if (count >= kWidth) return store(destination, value);
  __builtin_memcpy(destination, &value, static_cast<size_t>(count) * sizeof(float));
}

// Subtracting zero changes no value, -0 included, so the compiler drops it.
[[gnu::always_inline]] inline Vec broadcast(float value) { return value - Vec{}; }

// a * b + c; fused where the CPU can (the build lets the compiler contract).
[[gnu::always_inline]] inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

[[gnu::always_inline]] inline BitsVec bits_of(Vec value) { return (BitsVec)value; }
[[gnu::always_inline]] inline Vec vec_of(BitsVec bits) { return (Vec)bits; }

[[gnu::always_inline]] inline Vec absolute(Vec value) {
  return vec_of(bits_of(value) & 0x7fffffffu);
}

// The smaller and the larger of each pair; the second operand where one is NaN.
[[gnu::always_inline]] inline Vec minimum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

[[gnu::always_inline]] inline Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// Sum of the lanes, pairwise, in an order that depends on the width only.
[[gnu::always_inline]] inline float sum_of_lanes(Vec value) {
  float lanes[kWidth];
  store(lanes, value);
  for (int width = kWidth / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <int... i>
[[gnu::always_inline]] inline Vec interleave_low(Vec a, Vec b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i / 2 + (i % 2) * kWidth)...);
}

template <int... i>
[[gnu::always_inline]] inline Vec interleave_high(Vec a, Vec b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (kWidth / 2 + i / 2 + (i % 2) * kWidth)...);
}

// rows[i][j] <-> rows[j][i]: log2(kWidth) perfect shuffles.
[[gnu::always_inline]] inline void transpose(Vec (&rows)[kWidth]) {
  constexpr auto lanes = std::make_integer_sequence<int, kWidth>{};
  constexpr int rounds = kWidth == 16 ? 4 : kWidth == 8 ? 3 : 2;
  unroll<rounds>([&](auto) __attribute__((always_inline)) {
    Vec next[kWidth];
    unroll<kWidth / 2>([&](auto i) __attribute__((always_inline)) {
      next[2 * i] = interleave_low(rows[i], rows[i + kWidth / 2], lanes);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kWidth / 2], lanes);
    });
    unroll<kWidth>([&](auto i) __attribute__((always_inline)) { rows[i] = next[i]; });
  });
}

// The 16-bit types, as bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

[[gnu::always_inline]] inline BitsVec load_half_bits(const void* source) {
  HalfBitsVec bits;
  __builtin_memcpy(&bits, source, sizeof(bits));
  return __builtin_convertvector(bits, BitsVec);
}

[[gnu::always_inline]] inline void store_half_bits(void* destination, BitsVec bits) {
  const HalfBitsVec narrow = __builtin_convertvector(bits, HalfBitsVec);
  __builtin_memcpy(destination, &narrow, sizeof(narrow));
}

[[gnu::always_inline]] inline Vec load(const BFloat16* source) {
  return vec_of(load_half_bits(source) << 16);
}

// Rounds to nearest even; NaN stays NaN. The CPU's own instruction takes subnormals for zero.
[[gnu::always_inline]] inline void store(BFloat16* destination, Vec value) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
  __builtin_memcpy(destination, &rounded, sizeof(rounded));
#else
  const BitsVec bits = bits_of(value);
  const BitsVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_half_bits(destination, (BitsVec)(value != value ? BitsVec{} + 0x7fc0u : rounded));
#endif
}

#if defined(__AVX512BF16__)
// sums[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1] of vectors of BFloat16.
[[gnu::always_inline]] inline Vec add_products(Vec a, Vec b, Vec sums) {
  return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}

// sums[i] + the products of four unsigned bytes of a and signed ones of b.
[[gnu::always_inline]] inline IntVec add_products(Vec a, Vec b, IntVec sums) {
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
}

// Rounded to nearest even; 255 above that. No value may be negative.
[[gnu::always_inline]] inline void store_bytes(uint8_t* destination, Vec value) {
  const __m512i rounded = _mm512_maskz_cvtps_epi32(0xffff, (__m512)value);
  const __m128i bytes = _mm512_maskz_cvtusepi32_epi8(0xffff, rounded);
  __builtin_memcpy(destination, &bytes, sizeof(bytes));
}

using PairedHalfBitsVec = uint16_t __attribute__((vector_size(kWidth * 4)));

// 0, kWidth, 1, kWidth + 1 ...
template <int... i>
[[gnu::always_inline]] inline PairedHalfBitsVec interleaved(std::integer_sequence<int, i...>) {
  return PairedHalfBitsVec{(i / 2 + i % 2 * kWidth)...};
}

// first[0], first[1] ... second[0], second[1] ... as BFloat16.
[[gnu::always_inline]] inline Vec join_rounded(Vec first, Vec second) {
  return (Vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

// even[0], odd[0], even[1], odd[1] ... as BFloat16.
[[gnu::always_inline]] inline Vec interleave_rounded(Vec even, Vec odd) {
  const auto order = interleaved(std::make_integer_sequence<int, 2 * kWidth>{});
  return (Vec)_mm512_maskz_permutexvar_epi16(~0u, (__m512i)order, (__m512i)join_rounded(even, odd));
}
#endif

#if defined(__AVX512F__)
// x - floor(x); NaN for NaN.
[[gnu::always_inline]] inline Vec fraction(Vec x) {
  return (Vec)_mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEG_INF);
}

// value * 2^floor(exponent) where the exponent is at least `least` or NaN, else 0.
[[gnu::always_inline]] inline Vec times_power_of_2(Vec value, Vec exponent, float least) {
  const __mmask16 kept =
      _mm512_cmp_ps_mask((__m512)exponent, (__m512)broadcast(least), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(kept, (__m512)value, (__m512)exponent);
}
#endif

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
// The tile registers, by number; strides are in words. Compilers' own intrinsics do not tell them
// that memory is read and written.
template <class Shapes>
[[gnu::always_inline]] inline void configure_tiles(const Shapes* shapes) {
  asm volatile("ldtilecfg %0" ::"m"(*shapes) : "memory");
}
[[gnu::always_inline]] inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }

template <int tile>
[[gnu::always_inline]] inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile) : "memory");
}
template <int tile>
[[gnu::always_inline]] inline void load_tile(const float* source, int64_t stride) {
  asm volatile("tileloadd (%1,%2,4), %%tmm%c0" ::"i"(tile), "r"(source), "r"(stride) : "memory");
}
template <int tile>
[[gnu::always_inline]] inline void store_tile(float* destination, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,4)" ::"i"(tile), "r"(destination), "r"(stride)
               : "memory");
}

// sums += a b in bfloat16.
template <int sums, int a, int b>
[[gnu::always_inline]] inline void add_tile_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b) : "memory");
}
// The same of unsigned bytes in a and signed ones in b.
template <int sums, int a, int b>
[[gnu::always_inline]] inline void add_tile_byte_products() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b) : "memory");
}
#endif

[[gnu::always_inline]] inline Vec load(const Float16* source) {
  const BitsVec bits = load_half_bits(source);
  const BitsVec magnitude = (bits & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, and makes subnormals normal.
  const BitsVec finite = bits_of(vec_of(magnitude) * 0x1p112f);
  const BitsVec result = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : finite;
  return vec_of(result | ((bits & 0x8000u) << 16));
}

// Rounds to nearest even; overflows to infinity; NaN stays NaN.
[[gnu::always_inline]] inline void store(Float16* destination, Vec value) {
  const BitsVec bits = bits_of(value);
  const BitsVec magnitude = bits & 0x7fffffffu;
  // Adding 0.5 leaves a subnormal half, rounded by the adder, in the low bits.
  const BitsVec subnormal = bits_of(vec_of(magnitude) + 0.5f) - 0x3f000000u;
  const BitsVec normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const BitsVec infinite = magnitude > 0x7f800000u ? BitsVec{} + 0x7e00u : BitsVec{} + 0x7c00u;
  const BitsVec finite = magnitude < 0x38800000u ? subnormal : normal;
  const BitsVec result = magnitude >= 0x47800000u ? infinite : finite;
  store_half_bits(destination, result | ((bits >> 16) & 0x8000u));
}

// Calls function(pointer of the element type that `type` names).
template <class Function>
[[gnu::always_inline]] inline void with_elements(ElementType type, const void* data,
                                                 Function&& function) {
  switch (type) {
    case ElementType::float32:
      return function(static_cast<const float*>(data));
    case ElementType::bfloat16:
      return function(static_cast<const BFloat16*>(data));
    case ElementType::float16:
      return function(static_cast<const Float16*>(data));
  }
}

template <class Function>
[[gnu::always_inline]] inline void with_elements(ElementType type, void* data,
                                                 Function&& function) {
  switch (type) {
    case ElementType::float32:
      return function(static_cast<float*>(data));
    case ElementType::bfloat16:
      return function(static_cast<BFloat16*>(data));
    case ElementType::float16:
      return function(static_cast<Float16*>(data));
  }
}

// destination[0 .. count) = source[0 .. count) as float.
template <class Element>
inline void widen(const Element* source, int64_t count, float* destination) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(destination + i, load(source + i));
  if (i < count) {
    Element rest[kWidth] = {};
    float wide[kWidth];
    __builtin_memcpy(rest, source + i, (count - i) * sizeof(Element));
    store(wide, load(rest));
    __builtin_memcpy(destination + i, wide, (count - i) * sizeof(float));
  }
}

// destination[0 .. count) = source[0 .. count), rounded to the element type.
template <class Element>
inline void narrow(const float* source, int64_t count, Element* destination) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(destination + i, load(source + i));
  if (i < count) {
    float wide[kWidth] = {};
    Element rest[kWidth];
    __builtin_memcpy(wide, source + i, (count - i) * sizeof(float));
    store(rest, load(wide));
    __builtin_memcpy(destination + i, rest, (count - i) * sizeof(Element));
  }
}

// destination[0 .. count) += source[0 .. count).
template <class Element>
inline void add(const Element* source, int64_t count, float* destination) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    store(destination + i, load(destination + i) + load(source + i));
  }
  if (i < count) {
    float rest[kWidth];
    widen(source + i, count - i, rest);
    for (int64_t j = 0; i + j < count; ++j) destination[i + j] += rest[j];
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
