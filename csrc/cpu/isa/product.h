#pragma once

// What products multiply. Their operands lie in memory in words of 32 bits: a float, two numbers in
// bfloat16 or four bytes that are neighbours along the depth; what a depth lacks to whole words is
// zero in B. A step of depth multiplies a word of A with a vector of words of B, so whatever the
// type, a matrix has the same layout in words and a product the same loops.
//
// A kind of product has
//   Element        of A and, but for bytes, of B
//   Sum            vectors of sums
//   Writer         writes vectors of floats as elements of A
//   Side           the kind of the products beside those of the large layers: of attention's own,
//                  of shortcuts, and of what a gate scales

#include "cpu/common/quantization.h"
#include "cpu/isa/simd.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// Fewer values than a vector, by a writer of whose place no more is written.
template <class Writer>
inline void write_part(Writer to, int64_t i, const float* values, int64_t count) {
  typename Writer::Element rest[kWidth];
  auto* const place = to.data + i;
  to.data = rest;
  to.store(0, load_part(values, count));
  __builtin_memcpy(place, rest, static_cast<size_t>(count) * sizeof(*rest));
}

// Vectors of floats as elements of a type.
template <class Type>
struct Rounded {
  using Element = Type;
  Type* data;

  Rounded(Type* data, Quantization = {}) : data(data) {}
  Rounded at(int64_t first) const { return Rounded(data + first); }
  [[gnu::always_inline]] void store(int64_t i, Vec value) const {
    MOAT_KERNELS_ISA::store(data + i, value);
  }
};

struct FloatProduct {
  using Element = float;
  using Sum = Vec;
  using Writer = Rounded<float>;
  using Side = FloatProduct;
  static constexpr ElementType kElementType = ElementType::float32;
  static constexpr int kPerWord = 1;
  static constexpr bool kScaled = false;

  [[gnu::always_inline]] static Vec broadcast_word(const float* word) { return broadcast(*word); }
  [[gnu::always_inline]] static Vec multiply_add(Vec a, Vec b, Vec sums) { return fma(a, b, sums); }
  // A vector of words of rows that follow one another along the depth.
  [[gnu::always_inline]] static Vec word_of(const Vec (&rows)[kPerWord]) { return rows[0]; }
};

#if defined(__AVX512BF16__)

// Of words that are no floats.
struct PackedWords {
  [[gnu::always_inline]] static Vec broadcast_word(const float* word) {
    uint32_t bits;
    __builtin_memcpy(&bits, word, sizeof(bits));
    return vec_of(BitsVec{} + bits);
  }
};

struct BFloat16Product : PackedWords {
  using Element = BFloat16;
  using Sum = Vec;
  using Writer = Rounded<BFloat16>;
  using Side = BFloat16Product;
  static constexpr ElementType kElementType = ElementType::bfloat16;
  static constexpr int kPerWord = 2;
  static constexpr bool kScaled = false;

  [[gnu::always_inline]] static Vec multiply_add(Vec a, Vec b, Vec sums) {
    return add_products(a, b, sums);
  }
  [[gnu::always_inline]] static Vec word_of(const Vec (&rows)[kPerWord]) {
    return interleave_rounded(rows[0], rows[1]);
  }
#if defined(__AMX_TILE__)
  template <int sums, int a, int b>
  [[gnu::always_inline]] static void multiply_add_tiles() {
    add_tile_products<sums, a, b>();
  }
#endif
};

// Vectors of floats as bytes: value / scale + zero, rounded and clamped to 0 ... 255; NaN is 0.
struct Quantized {
  using Element = uint8_t;
  uint8_t* data;
  float factor, zero;

  Quantized(uint8_t* data, Quantization to) : Quantized(data, 1.0f / to.scale, to.zero) {}
  Quantized at(int64_t first) const { return Quantized(data + first, factor, zero); }
  [[gnu::always_inline]] void store(int64_t i, Vec value) const {
    store_bytes(data + i, maximum(fma(value, broadcast(factor), broadcast(zero)), Vec{}));
  }

 private:
  Quantized(uint8_t* data, float factor, float zero) : data(data), factor(factor), zero(zero) {}
};

// Bytes of A are unsigned, those of B signed, and sums are integers, which `factor` and `shift` of
// the column turn into numbers.
struct Int8Product : PackedWords {
  using Element = uint8_t;
  using Sum = IntVec;
  using Writer = Quantized;
  using Side = BFloat16Product;
  static constexpr int kPerWord = 4;
  static constexpr bool kScaled = true;

  [[gnu::always_inline]] static IntVec multiply_add(Vec a, Vec b, IntVec sums) {
    return add_products(a, b, sums);
  }
#if defined(__AMX_TILE__)
  template <int sums, int a, int b>
  [[gnu::always_inline]] static void multiply_add_tiles() {
    add_tile_byte_products<sums, a, b>();
  }
#endif
};

#endif

// Whether products of this kind are compiled for this instruction set.
constexpr bool has_product([[maybe_unused]] Product kind) {
#if defined(__AVX512BF16__)
  return true;
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
  if (kind == Product::int8) return function(Int8Product{});
#endif
  function(FloatProduct{});
}

// The same for kinds without scales, which are those of training.
template <class Function>
[[gnu::always_inline]] inline void with_unscaled_product([[maybe_unused]] Product kind,
                                                         Function&& function) {
#if defined(__AVX512BF16__)
  if (kind == Product::bfloat16) return function(BFloat16Product{});
#endif
  function(FloatProduct{});
}

// The same for the kind of the products at its side.
template <class Function>
[[gnu::always_inline]] inline void with_side_product(Product kind, Function&& function) {
  with_product(kind, [&](auto product) __attribute__((always_inline)) {
    function(typename decltype(product)::Side{});
  });
}

inline Product side_of(Product kind) { return kind == Product::int8 ? Product::bfloat16 : kind; }

// Words of `count` elements.
using cpu::words_of;
template <class Kind>
[[gnu::always_inline]] inline int64_t words_of(int64_t count) {
  return divide_up(count, Kind::kPerWord);
}

// Calls function(first, Constant<count>) over the elements [first, last) that make up a word each;
// the last may lack some. `first` is the beginning of a word.
template <class Kind, class Function>
[[gnu::always_inline]] inline void for_words(int64_t first, int64_t last, Function&& function) {
  constexpr int kPerWord = Kind::kPerWord;
  static_assert(kPerWord <= 2);
  for (; first + kPerWord <= last; first += kPerWord) function(first, Constant<kPerWord>{});
  if (kPerWord > 1 && first < last) function(first, Constant<1>{});
}

template <class Kind>
[[gnu::always_inline]] inline typename Kind::Element* elements_of(float* words) {
  return reinterpret_cast<typename Kind::Element*>(words);
}

// words[0 .. words_of(count)) = values[0 .. count), the rest of the last word zero. `words` may be
// where the values are, or before.
template <class Kind>
inline void to_words(const float* values, int64_t count, float* words, Quantization to = {}) {
  auto* elements = elements_of<Kind>(words);
  const typename Kind::Writer writer(elements, to);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) writer.store(i, load(values + i));
  if (i < count) write_part(writer, i, values + i, count - i);
  for (i = count; i % Kind::kPerWord; ++i) elements[i] = {};
}

// rows[row][0 .. columns), sums of a product with bytes, to numbers: sum * factor + shift of the
// column; shift may be null.
template <class Kind>
inline void to_numbers(int64_t rows, int64_t columns, int64_t stride, const float* factor,
                       const float* shift, float* sums) {
  if constexpr (Kind::kScaled) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < columns; i += kWidth) {
        float* at = sums + row * stride + i;
        const Vec sum = __builtin_convertvector(load_as<IntVec>(at), Vec);
        store(at, fma(sum, load(factor + i), shift ? load(shift + i) : Vec{}));
      }
    }
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
