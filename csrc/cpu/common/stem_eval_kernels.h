#pragma once

#include <cstdint>

#include "cpu/common/layers.h"
#include "cpu/common/per_isa.h"
#include "cpu/common/types.h"

namespace moat_kernels::cpu {

// The stem with fixed statistics: two 3x3 convolutions, the first with stride 2, a norm and an
// activation between. out_height, out_width: of both. top, left: border of zeros before x, a pixel
// or none.
struct StemProblem {
  int64_t batch = 0, in_channels = 0, height = 0, width = 0;
  int64_t channels = 0, out_channels = 0;  // of the first convolution and of the second
  int64_t out_height = 0, out_width = 0, top = 0, left = 0;
  bool symmetric = false;  // whether the border before x is a pixel for maps of any size
  Activation activation = Activation::gelu;
  const float* x = nullptr;
  int64_t image_stride = 0, channel_stride = 0, row_stride = 0, column_stride = 0;  // of x, floats
  Convolution first;       // [channels, in_channels, 3, 3]
  BatchNorm norm;          // of its output
  Convolution second;      // [out_channels, channels, 3, 3]
  void* output = nullptr;  // [batch, out_height, out_width, out_channels]
  ElementType output_type = ElementType::float32;
  Product product = Product::float32;  // of the second convolution
};

}  // namespace moat_kernels::cpu

// stem_eval_pack lays out what panel `panel` of the channels of both needs; stem_eval computes
// strip `strip` of an image. Sizes are in floats.
MOAT_KERNELS_DECLARE_PER_ISA(int64_t stem_eval_panels(const StemProblem& problem);
                             int64_t stem_eval_strips(const StemProblem& problem);
                             int64_t stem_eval_packed_size(const StemProblem& problem);
                             int64_t stem_eval_scratch_size(const StemProblem& problem);
                             void stem_eval_pack(const StemProblem& problem, int64_t panel,
                                                 float* packed);
                             void stem_eval(const StemProblem& problem, const float* packed,
                                            int64_t image, int64_t strip, float* scratch);)
