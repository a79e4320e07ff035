#pragma once

// What kernels and their callers both name, whatever the instruction set.

namespace moat_kernels::cpu {

// Of maps in memory; arithmetic is always in float.
enum class ElementType { float32, bfloat16, float16 };

enum class Activation { identity, gelu, gelu_tanh, silu, relu };

}  // namespace moat_kernels::cpu
