#pragma once

#include "cpu/common/per_isa.h"
#include "cpu/common/quantization.h"
#include "cpu/common/types.h"

namespace moat_kernels::cpu {

// The MLP of a transformer block: result = y + W2 act(W1 norm(y) + b1) + b2 of each row.
struct MlpProblem {
  int64_t rows = 0, channels = 0, hidden = 0;
  Activation activation = Activation::gelu;
  float eps = 0;
  const float* norm_weight = nullptr;  // [channels] or null, as the next
  const float* norm_bias = nullptr;
  const float* fc1_weight = nullptr;  // [hidden, channels]
  const float* fc1_bias = nullptr;    // [hidden] or null
  const float* fc2_weight = nullptr;  // [channels, hidden]
  const float* fc2_bias = nullptr;    // [channels] or null
  const void* y = nullptr;            // [rows, channels], as the result
  void* result = nullptr;
  ElementType element = ElementType::float32;  // of y and the result
  Product product = Product::float32;
  // For bytes: of the normalised rows, and of the hidden channels.
  Quantization norm_quantization, hidden_quantization;
};

}  // namespace moat_kernels::cpu

// A block is a piece of the hidden channels. Sizes are in floats, rows are [first, last).
//
//   mlp_pack_shared, mlp_pack_block
//                   what all blocks need, and a block's weights -> packed
//   mlp_strip       y -> the result, for rows whose hidden channels exist a block at a time
//
// and in its place, where threads share rows:
//
//   mlp_normalize   y -> normalized [rows][words of the channels] (isa/product.h)
//   mlp_expand      normalized -> a panel of the hidden channels, in hidden [blocks][rows][pitch]
//   mlp_project     hidden, y -> a panel of the result's channels
MOAT_KERNELS_DECLARE_PER_ISA(int64_t mlp_blocks(const MlpProblem& problem);
                             int64_t mlp_packed_size(const MlpProblem& problem);
                             void mlp_pack_shared(const MlpProblem& problem, float* packed);
                             void mlp_pack_block(const MlpProblem& problem, int64_t block,
                                                 float* packed);
                             int64_t mlp_strip_size(const MlpProblem& problem, int64_t rows);
                             void mlp_strip(const MlpProblem& problem, const float* packed,
                                            int64_t first, int64_t last, float* scratch);
                             int64_t mlp_normalized_words(const MlpProblem& problem);
                             int64_t mlp_hidden_size(const MlpProblem& problem);
                             int64_t mlp_hidden_panels(const MlpProblem& problem);
                             int64_t mlp_panels(const MlpProblem& problem);
                             int64_t mlp_panel_size(const MlpProblem& problem);
                             void mlp_normalize(const MlpProblem& problem, const float* packed,
                                                int64_t first, int64_t last, float* normalized);
                             void mlp_expand(const MlpProblem& problem, const float* packed,
                                             int64_t panel, const float* normalized, float* scratch,
                                             float* hidden);
                             void mlp_project(const MlpProblem& problem, const float* packed,
                                              int64_t panel, const float* hidden, float* scratch);)
