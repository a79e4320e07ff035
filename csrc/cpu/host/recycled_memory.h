#pragma once

// Memory for large tensors that is used again. The system clears every page that it hands out,
// which for a tensor that is written once and read twice costs about as much as writing it; the C
// library gives large blocks back to the system at once, and gets them cleared anew in every
// training step.
//
// A released block is kept, up to the most that was ever in use at a time: a request that no kept
// block fits is cut from a larger one, or takes the pages of several. The system may take the pages
// of a block that was long out of use when it needs memory (MADV_FREE).

#include <utility>

#include "cpu/host/tensors.h"

namespace moat_kernels::cpu {

// An uninitialised CPU tensor. Small ones come from PyTorch's allocator, and all where the system
// is not Linux.
Tensor recycled_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType type);

inline Tensor recycled_floats(const Tensor& like, std::vector<int64_t> sizes) {
  return recycled_tensor(like, std::move(sizes), ScalarType::Float);
}

// From this size on the C library keeps no block either, so that inference too has its large maps
// and scratch memory from here.
constexpr int64_t kLargeBytes = int64_t{32} << 20;

// Maps that the caller may read: uninitialised, in channels_last.
Tensor empty_maps(const Tensor& like, const MapSize& size, ScalarType type);

}  // namespace moat_kernels::cpu
