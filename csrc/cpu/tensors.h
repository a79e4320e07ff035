#pragma once

// What the ops of the CPU need of tensors: checked pointers and buffers.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <string>
#include <vector>

#include "cpu/types.h"

namespace moat_kernels::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensors = std::vector<std::optional<Tensor>>;

// The size of maps [batch, channels, height, width].
struct MapSize {
  int64_t batch, channels, height, width;
};

inline MapSize map_size(const char* name, const Tensor& maps) {
  STD_TORCH_CHECK(maps.dim() == 4, name, " must be [B, C, H, W]");
  return {maps.size(0), maps.size(1), maps.size(2), maps.size(3)};
}

inline ElementType element_type(const char* name, ScalarType type) {
  if (type == ScalarType::Float) return ElementType::float32;
  if (type == ScalarType::BFloat16) return ElementType::bfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, name, " must be float32, bfloat16 or float16");
  return ElementType::float16;
}

// The data of a contiguous float32 tensor of `count` elements; null for none.
inline const float* float_data(const char* name, const std::optional<Tensor>& tensor,
                               int64_t count) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous(), name,
                  " must be contiguous and float32");
  STD_TORCH_CHECK(tensor->numel() == count, name, " must have ", count, " elements, got ",
                  tensor->numel());
  return static_cast<const float*>(tensor->const_data_ptr());
}

// The tensor as a contiguous float32 one: itself, if it is that already.
inline Tensor as_floats(const Tensor& tensor) {
  const bool is_float = tensor.scalar_type() == ScalarType::Float;
  const Tensor floats = is_float ? tensor : torch::stable::to(tensor, ScalarType::Float);
  return floats.is_contiguous() ? floats : torch::stable::contiguous(floats);
}

// Converted copies of those tensors that kernels cannot read as they are.
inline void make_readable(OptionalTensors& tensors) {
  for (std::optional<Tensor>& tensor : tensors) {
    if (tensor.has_value()) tensor = as_floats(*tensor);
  }
}

// Maps that the caller may read: uninitialised, in channels_last.
inline Tensor empty_maps(const Tensor& like, const MapSize& size, ScalarType type) {
  return torch::stable::empty({size.batch, size.channels, size.height, size.width}, type,
                              std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// Asks for huge pages where a tensor spans some: PyTorch's allocator gives large memory back to the
// system, and touching it anew, 4 KB at a time, costs several times what writing it does.
inline Tensor with_huge_pages(Tensor tensor) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel()) * sizeof(float);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = end / kHugePage * kHugePage;
  // Advice that is not taken changes nothing.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

// Uninitialised floats.
inline Tensor float_tensor(const Tensor& like, std::vector<int64_t> sizes) {
  return with_huge_pages(torch::stable::new_empty(like, sizes, ScalarType::Float));
}

// The same without a shape, freed with the tensor.
inline Tensor float_buffer(const Tensor& like, int64_t count) {
  return float_tensor(like, {count});
}

inline float* data_of(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

inline Activation parse_activation(const std::string& name) {
  if (name == "identity") return Activation::identity;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(name == "relu", "unknown activation ", name);
  return Activation::relu;
}

}  // namespace moat_kernels::cpu
