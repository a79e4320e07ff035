#pragma once

// What products multiply. Their operands lie in memory in words of 32 bits: a float, or two numbers
// in bfloat16 that are neighbours along the depth, the last of an odd depth beside a zero. A step
// of depth multiplies a word of A with a vector of words of B, so whatever the type, a matrix has
// the same layout in words and a product the same loops.

#include "cpu/isa/simd.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

struct FloatProduct {
  using Element = float;
  static constexpr int kPerWord = 1;

  [[gnu::always_inline]] static Vec broadcast_word(const float* word) { return broadcast(*word); }
  [[gnu::always_inline]] static Vec multiply_add(Vec a, Vec b, Vec sums) { return fma(a, b, sums); }
  // A vector of words of rows that follow one another along the depth.
  [[gnu::always_inline]] static Vec word_of(const Vec (&rows)[kPerWord]) { return rows[0]; }
};

#if defined(__AVX512BF16__)
struct BFloat16Product {
  using Element = BFloat16;
  static constexpr int kPerWord = 2;

  [[gnu::always_inline]] static Vec broadcast_word(const float* word) {
    uint32_t bits;
    __builtin_memcpy(&bits, word, sizeof(bits));
    return vec_of(BitsVec{} + bits);
  }
  [[gnu::always_inline]] static Vec multiply_add(Vec a, Vec b, Vec sums) {
    return add_products(a, b, sums);
  }
  [[gnu::always_inline]] static Vec word_of(const Vec (&rows)[kPerWord]) {
    return interleave_rounded(rows[0], rows[1]);
  }
};
#endif

// Whether products of this kind are compiled for this instruction set.
constexpr bool has_product(Product kind) {
#if defined(__AVX512BF16__)
  return kind == Product::float32 || kind == Product::bfloat16;
#else
  return kind == Product::float32;
#endif
}

// Calls function(FloatProduct{}) or the like. The host asks for nothing else than has_product.
template <class Function>
[[gnu::always_inline]] inline void with_product([[maybe_unused]] Product kind,
                                                Function&& function) {
#if defined(__AVX512BF16__)
  if (kind == Product::bfloat16) return function(BFloat16Product{});
#endif
  function(FloatProduct{});
}

// Words of `count` elements.
inline int64_t words_of(Product kind, int64_t count) {
  return kind == Product::bfloat16 ? divide_up(count, 2) : count;
}
template <class Kind>
[[gnu::always_inline]] inline int64_t words_of(int64_t count) {
  return divide_up(count, Kind::kPerWord);
}

template <class Kind>
[[gnu::always_inline]] inline typename Kind::Element* elements_of(float* words) {
  return reinterpret_cast<typename Kind::Element*>(words);
}

// words[0 .. words_of(count)) = values[0 .. count), the rest of the last word zero. `words` may be
// where the values are, or before.
template <class Kind>
inline void to_words(const float* values, int64_t count, float* words) {
  auto* elements = elements_of<Kind>(words);
  narrow(values, count, elements);
  for (int64_t i = count; i % Kind::kPerWord; ++i) elements[i] = {};
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
