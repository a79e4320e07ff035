#pragma once

// One call of the inverted bottleneck as plain numbers and pointers. Maps are [batch, height,
// width, channels]; E is the number of channels between the expand and the project convolution.

#include <cstdint>

#include "cpu/common/layers.h"
#include "cpu/common/pool.h"
#include "cpu/common/quantization.h"
#include "cpu/common/types.h"

namespace moat_kernels::cpu {

// E channels that a tensor of training holds together.
constexpr int64_t kWideChannels = 64;

struct SqueezeExcite {
  bool present = false;
  int64_t channels = 0;
  Activation activation = Activation::silu;
  Convolution reduce;
  Convolution expand;
};

struct MBConvProblem {
  int64_t batch = 0, height = 0, width = 0, out_height = 0, out_width = 0;
  int64_t in_channels = 0, wide_channels = 0, out_channels = 0;
  int64_t stride = 1, top = 0, left = 0;  // of the depthwise convolution and its zero border

  const void* x = nullptr;
  int64_t skipped_columns = 0;  // pixels of x between the last of a row and the first of the next
  ElementType x_type = ElementType::float32;
  void* output = nullptr;
  ElementType output_type = ElementType::float32;
  Product product = Product::float32;
  // Of int8: x and what the project convolution reads.
  Quantization input_quantization, middle_quantization;

  BatchNorm pre_norm, expand_norm, depthwise_norm, project_norm;
  Convolution expand, depthwise, project, shortcut;
  Activation expand_activation = Activation::gelu;
  Activation depthwise_activation = Activation::gelu;
  SqueezeExcite squeeze_excite;
  bool residual = false;
  bool projects_shortcut = false;
  Pool pool;
  const float* drop_path_scale = nullptr;  // [batch]; null: ones

  // Images that a tile of the eval kernels holds side by side; more than one only where
  // mbconv_eval_groups allows it.
  int64_t images_per_tile = 1;
};

}  // namespace moat_kernels::cpu
