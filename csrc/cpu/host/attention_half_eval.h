#pragma once

// The attention half without gradients, for the op that takes plain weights and for those that keep
// packed ones.

#include "cpu/common/attention_half_kernels.h"
#include "cpu/host/pool_arguments.h"
#include "cpu/host/tensors.h"
#include "fields.h"

namespace moat_kernels::cpu {

struct AttentionHalfTensors : Fields {
  std::optional<Tensor> norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias;
  std::optional<Tensor> position_table;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("norm_weight", self.norm_weight);
    field("norm_bias", self.norm_bias);
    field("qkv_weight", self.qkv_weight);
    field("qkv_bias", self.qkv_bias);
    field("proj_weight", self.proj_weight);
    field("proj_bias", self.proj_bias);
    field("position_table", self.position_table);
  }
};

// Of a half with a pool.
struct ShortcutTensors : Fields {
  std::optional<Tensor> shortcut_weight, shortcut_bias;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("shortcut_weight", self.shortcut_weight);
    field("shortcut_bias", self.shortcut_bias);
  }
};

struct HalfSettings : Fields {
  int64_t heads = 0, head_dim = 0;
  double scale = 0, eps = 0;
  PoolSettings pool;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("heads", self.heads);
    field("head_dim", self.head_dim);
    field("scale", self.scale);
    field("eps", self.eps);
    field("pool", self.pool);
  }
};

// Sizes are in floats.
class AttentionHalfEval {
 public:
  // All weights of a problem as the kernels read them, but for the position table.
  static int64_t packed_size(const AttentionHalf& problem);
  static void pack(const AttentionHalf& problem, float* packed);

  // The position table for the problem's windows; of size 0 if there is none.
  static int64_t table_size(const AttentionHalf& problem);
  static void make_table(const AttentionHalf& problem, float* table);

  // packed, table: what `pack` and `make_table` wrote, table null for none. packed null: each call
  // packs the problem's own weights and takes its own table.
  AttentionHalfEval(const AttentionHalf& problem, const float* packed, const float* table);
  int64_t scratch_size() const;
  void compute(float* scratch) const;

 private:
  AttentionHalf problem_;
  const float* packed_;
};

// All of an attention half but the maps that it reads; tensors must be contiguous floats.
AttentionHalf read_attention_half(const AttentionHalfTensors& tensors, int64_t heads,
                                  int64_t head_dim, double scale, double eps, const Pool& pool = {},
                                  const ShortcutTensors& shortcut = {});

// The maps that it reads, and the size of its windows. padding: of the pool.
void set_maps(const MapSize& y, const Padding& padding, int64_t window_height, int64_t window_width,
              AttentionHalf& problem);

// A position table [heads, height, width], or none.
void set_position_table(const std::optional<Tensor>& table, AttentionHalf& problem);

}  // namespace moat_kernels::cpu
