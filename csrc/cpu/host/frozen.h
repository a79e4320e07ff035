#pragma once

#include "cpu/host/mbconv_arguments.h"

namespace moat_kernels::cpu {

// Maps of one size, and what a step does with them: the padding is of an inverted bottleneck, the
// window of an attention half.
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

}  // namespace moat_kernels::cpu
