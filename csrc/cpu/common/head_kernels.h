#pragma once

#include <cstdint>

#include "cpu/common/per_isa.h"
#include "cpu/common/types.h"

namespace moat_kernels::cpu {

// The classifier: W norm(mean of the pixels of x) + b, or without W the norm alone.
struct HeadProblem {
  int64_t batch = 0, pixels = 0, channels = 0;
  int64_t classes = 0;  // 0: no W
  float eps = 0;
  const float* norm_weight = nullptr;  // [channels] or null, as the next
  const float* norm_bias = nullptr;
  const float* weight = nullptr;  // [classes, channels]
  const float* bias = nullptr;    // or null
  const void* x = nullptr;        // [batch, pixels, channels]
  ElementType x_type = ElementType::float32;
  float* output = nullptr;  // [batch, classes or channels]
};

}  // namespace moat_kernels::cpu

// head_eval_pack writes all weights; head_eval_pool an image's row of pooled [batch, channels],
// normalised; head_eval_classify panel `panel` of the classes of all images. Sizes are in floats.
MOAT_KERNELS_DECLARE_PER_ISA(int64_t head_eval_packed_size(const HeadProblem& problem);
                             int64_t head_eval_panels(const HeadProblem& problem);
                             int64_t head_eval_panel_scratch(const HeadProblem& problem);
                             void head_eval_pack(const HeadProblem& problem, float* packed);
                             void head_eval_pool(const HeadProblem& problem, const float* packed,
                                                 int64_t image, float* pooled);
                             void head_eval_classify(const HeadProblem& problem,
                                                     const float* packed, const float* pooled,
                                                     int64_t panel, float* scratch);)
