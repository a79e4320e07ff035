#pragma once

// Pools and padding as ops take them.

#include "cpu/common/pool.h"
#include "cpu/host/tensors.h"
#include "fields.h"

namespace moat_kernels::cpu {

struct PoolSettings : Fields {
  std::string kind;  // "average", "max", or empty for none
  int64_t kernel_size = 1, stride = 1;
  bool count_include_pad = false;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("kind", self.kind);
    field("kernel_size", self.kernel_size);
    field("stride", self.stride);
    field("count_include_pad", self.count_include_pad);
  }
};

struct Padding : Fields {
  int64_t top = 0, bottom = 0, left = 0, right = 0;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("top", self.top);
    field("bottom", self.bottom);
    field("left", self.left);
    field("right", self.right);
  }
};

inline int64_t output_size(int64_t size, int64_t before, int64_t after, int64_t kernel,
                           int64_t stride) {
  const int64_t room = size + before + after - kernel;
  return room < 0 ? 0 : room / stride + 1;
}

inline Pool read_pool(const PoolSettings& settings) {
  Pool pool;
  if (settings.kind.empty()) return pool;
  STD_TORCH_CHECK(settings.kind == "average" || settings.kind == "max",
                  "pool_kind must be average or max, got ", settings.kind);
  STD_TORCH_CHECK(settings.kernel_size > 0 && settings.kernel_size < kLongestSide &&
                      settings.stride > 0 && settings.stride < kLongestSide,
                  "pool_kernel_size and pool_stride must be positive and below 2^20, got ",
                  settings.kernel_size, " and ", settings.stride);
  pool.kind = settings.kind == "max" ? PoolKind::maximum : PoolKind::average;
  pool.size = settings.kernel_size;
  pool.stride = settings.stride;
  pool.counts_padding = settings.count_include_pad;
  return pool;
}

inline void check_padding(const char* name, const Padding& padding, int64_t below) {
  for (const int64_t side : {padding.top, padding.bottom, padding.left, padding.right}) {
    STD_TORCH_CHECK(side >= 0 && side < below, name, " must be from 0 to ", below - 1, ", got ",
                    side);
  }
}

inline void set_padding(const Padding& padding, Pool& pool) {
  check_padding("pool_padding", padding, pool.size);  // no window without pixels
  pool.top = padding.top;
  pool.left = padding.left;
}

}  // namespace moat_kernels::cpu
