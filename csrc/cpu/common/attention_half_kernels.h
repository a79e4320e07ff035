#pragma once

#include "cpu/common/per_isa.h"
#include "cpu/common/pool.h"
#include "cpu/common/quantization.h"
#include "cpu/common/window_attention_kernels.h"

namespace moat_kernels::cpu {

// The attention half of a MOAT block: output = y + W_p attention(W_qkv norm(y) + b_qkv) + b_p on
// maps [batch, height, width, channels] without gaps. `qkv`, `output` and `log_sum_exp` of the base
// are not used. `bias_table` fits the window; it is computed from `position_table` of another size
// where there is one. With a pool it is, for y [batch, in_height, in_width, in_channels],
//   output = W_s pool(y) + b_s + W_p attention(W_qkv pool(norm(y)) + b_qkv) + b_p
struct AttentionHalf : WindowAttention {
  int64_t channels;
  Pool pool;
  int64_t in_channels;  // as channels, height and width where there is no pool
  int64_t in_height;
  int64_t in_width;
  float eps;
  const float* norm_weight;  // [in_channels] or null, as the next
  const float* norm_bias;
  const float* qkv_weight;       // [3 * heads * head_dim, in_channels]
  const float* qkv_bias;         // or null
  const float* proj_weight;      // [channels, heads * head_dim]
  const float* proj_bias;        // or null
  const float* shortcut_weight;  // [channels, in_channels] with a pool
  const float* shortcut_bias;    // or null
  const float* position_table;   // [heads, position_height, position_width] or null
  int64_t position_height;
  int64_t position_width;
  const void* y;
  void* result;
  Product product;
  // Of int8: what qkv and proj read.
  Quantization norm_quantization, attended_quantization;
  // Consecutive windows are computed together: their tokens are the rows of a unit.
  int64_t windows_per_unit;
};

// A unit's windows.
struct AttentionUnit {
  int64_t first_window, last_window;
};

}  // namespace moat_kernels::cpu

// How a call is computed; sizes are in floats.
//
//   attention_half_resize     position_table -> a head of bias_table
//   attention_half_pack_head, attention_half_pack_panel
//                             the weights of a head, or of a panel of proj's outputs -> packed
//   attention_half_normalize  rows first to last of a unit of y -> normalized [rows, words of the
//                             channels] (isa/product.h)
//   attention_half_pool       the same with a pool, which also leaves pool(y) in the last columns
//   of
//                             attended
//   attention_half_attend     normalized -> a head's columns of attended [rows, attended words],
//                             for one of some equal blocks of the unit's rows
//   attention_half_project    attended, y -> a panel of the result's columns for a block of rows
//
// Where `packed` is null, the last two pack what they need themselves.
MOAT_KERNELS_DECLARE_PER_ISA(
    int64_t attention_half_head_size(const AttentionHalf& problem);
    int64_t attention_half_panel_size(const AttentionHalf& problem);
    int64_t attention_half_panels(const AttentionHalf& problem);
    int64_t attention_half_normalized_words(const AttentionHalf& problem);
    int64_t attention_half_attended_words(const AttentionHalf& problem);
    int64_t attention_half_scratch_size(const AttentionHalf& problem);
    void attention_half_resize(const AttentionHalf& problem, int64_t head, float* bias_table);
    void attention_half_pack_head(const AttentionHalf& problem, int64_t head, float* packed);
    void attention_half_pack_panel(const AttentionHalf& problem, int64_t panel, float* packed);
    void attention_half_normalize(const AttentionHalf& problem, const AttentionUnit& unit,
                                  int64_t first, int64_t last, float* normalized);
    void attention_half_pool(const AttentionHalf& problem, const AttentionUnit& unit, int64_t first,
                             int64_t last, float* scratch, float* normalized, float* attended);
    void attention_half_attend(const AttentionHalf& problem, const AttentionUnit& unit,
                               int64_t head, int64_t block, int64_t blocks, const float* packed,
                               const float* normalized, float* scratch, float* attended);
    void attention_half_project(const AttentionHalf& problem, const AttentionUnit& unit,
                                int64_t panel, int64_t block, int64_t blocks, const float* packed,
                                const float* attended, float* scratch);)
