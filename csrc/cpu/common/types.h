#pragma once

// What kernels and their callers both name, whatever the instruction set.

#include <cstdint>

namespace moat_kernels::cpu {

// Of maps in memory; arithmetic but for products is always in float.
enum class ElementType { float32, bfloat16, float16 };

// A map as a module has it; none if `data` is null.
struct Map {
  void* data;
  ElementType type;
};

// What the operands of products are rounded to. The sums are in float, those of int8 in int32.
enum class Product { float32, bfloat16, int8 };

// 32-bit words that `count` elements of an operand take (cpu/isa/product.h).
[[gnu::always_inline]] inline int64_t words_of(Product product, int64_t count) {
  const int64_t per_word = product == Product::int8 ? 4 : product == Product::bfloat16 ? 2 : 1;
  return (count + per_word - 1) / per_word;
}

enum class Activation { identity, gelu, gelu_tanh, silu, relu };

}  // namespace moat_kernels::cpu
