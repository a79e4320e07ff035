#pragma once

#include <cstdint>

namespace moat_kernels::cpu {

enum class PoolKind { none, average, maximum };

struct Pool {
  PoolKind kind = PoolKind::none;
  int64_t size = 1;
  int64_t stride = 1;
  int64_t top = 0;
  int64_t left = 0;
  bool counts_padding = false;
};

}  // namespace moat_kernels::cpu
