#pragma once

// What kernels and their callers both name, whatever the instruction set.

namespace moat_kernels::cpu {

// Of maps in memory; arithmetic but for products is always in float.
enum class ElementType { float32, bfloat16, float16 };

// What the operands of products are rounded to. The sums are in float, those of int8 in int32.
enum class Product { float32, bfloat16, int8 };

enum class Activation { identity, gelu, gelu_tanh, silu, relu };

}  // namespace moat_kernels::cpu
