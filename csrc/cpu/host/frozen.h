#pragma once

#include "cpu/host/mbconv_arguments.h"

namespace moat_kernels::cpu {

// Maps of one size, and what a step does with them: the padding is of an inverted bottleneck, that
// of its pool of an attention half's too, the window of an attention half.
struct Placement : Fields {
  int64_t channels = 0, height = 0, width = 0;
  BlockPadding block;
  int64_t window_height = 0, window_width = 0;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("channels", self.channels);
    field("height", self.height);
    field("width", self.width);
    BlockPadding::visit(self.block, field);
    field("window_height", self.window_height);
    field("window_width", self.window_width);
  }
};

// What turns the two operands of a step's int8 products to bytes (cpu/common/quantization.h): of an
// inverted bottleneck x and what the project convolution reads, of an attention half what qkv and
// proj read, of an MLP what fc1 and fc2 read. Scales of zero: other products.
struct Quantizations : Fields {
  double first_scale = 0, first_zero = 0, second_scale = 0, second_zero = 0;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("first_scale", self.first_scale);
    field("first_zero", self.first_zero);
    field("second_scale", self.second_scale);
    field("second_zero", self.second_zero);
  }

  bool given() const { return first_scale > 0 && second_scale > 0; }
  Quantization first() const {
    return {static_cast<float>(first_scale), static_cast<float>(first_zero)};
  }
  Quantization second() const {
    return {static_cast<float>(second_scale), static_cast<float>(second_zero)};
  }
};

}  // namespace moat_kernels::cpu
