#pragma once

#include <cstdint>

#include "cpu/common/per_isa.h"
#include "cpu/common/types.h"

namespace moat_kernels::cpu {

// A map [batch, height, width, channels] whose channels are dense; strides count elements.
struct AttentionMap {
  char* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t column_stride;
};

// What both directions compute: softmax(scale Q K^T + bias) V for every window and head.
struct WindowAttention {
  ElementType element;
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t heads;
  int64_t head_dim;
  int64_t window_height;
  int64_t window_width;
  // Windows per image, per axis; those at the end of an axis may reach beyond the map.
  int64_t window_rows;
  int64_t window_columns;
  // Tokens of a window lie side by side, or (grid) evenly spread over the map.
  bool grid;
  float scale;
  // The batch's windows are cut into this many chunks of consecutive ones.
  int64_t chunks;
  // And the heads into groups of at most this many.
  int64_t heads_per_unit;
  // Channels of qkv from q to k to v of a head, and from one head to the next.
  int64_t part_stride;
  int64_t head_stride;
  AttentionMap qkv;
  // [heads, 2 * window_height - 1, 2 * window_width - 1] by key - query, or null.
  const float* bias_table;
  // [batch, heads, height, width]: of every query, in units of ln 2.
  float* log_sum_exp;
};

struct WindowAttentionForward : WindowAttention {
  AttentionMap output;
  // The queries of a window are cut into this many blocks.
  int64_t query_blocks;
};

struct WindowAttentionBackward : WindowAttention {
  AttentionMap output;
  AttentionMap output_gradient;
  AttentionMap qkv_gradient;
  // [chunks, heads, 2 * window_height - 1, 2 * window_width - 1], or null if not needed.
  float* table_gradients;
};

}  // namespace moat_kernels::cpu

// Computes units begin to end (exclusive), a unit being (chunk of windows, group of heads, block of
// queries), and the floats of scratch memory that it needs.
MOAT_KERNELS_DECLARE_PER_ISA(
    void window_attention_forward(const WindowAttentionForward& problem, int64_t begin, int64_t end,
                                  float* scratch);
    int64_t window_attention_forward_scratch(const WindowAttentionForward& problem);)

// The same backward, a unit being (chunk of windows, group of heads).
MOAT_KERNELS_DECLARE_PER_ISA(
    void window_attention_backward(const WindowAttentionBackward& problem, int64_t begin,
                                   int64_t end, float* scratch);
    int64_t window_attention_backward_scratch(const WindowAttentionBackward& problem);)
