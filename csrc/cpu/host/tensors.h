#pragma once

// What the ops of the CPU need of tensors: checked pointers and buffers.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "cpu/common/types.h"
#include "fields.h"
#include "tensor_checks.h"

namespace moat_kernels::cpu {

// The size of maps [batch, channels, height, width].
struct MapSize {
  int64_t batch, channels, height, width;
};

// Windows, strides and borders are shorter: products of them do not overflow.
constexpr int64_t kLongestSide = int64_t{1} << 20;

inline MapSize map_size(const char* name, const Tensor& maps) {
  STD_TORCH_CHECK(maps.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(maps.dim() == 4, name, " must be [B, C, H, W], got ", shape_of(maps));
  return {maps.size(0), maps.size(1), maps.size(2), maps.size(3)};
}

inline ElementType element_type(const char* name, ScalarType type) {
  if (type == ScalarType::Float) return ElementType::float32;
  if (type == ScalarType::BFloat16) return ElementType::bfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, name, " must be float32, bfloat16 or float16, got ",
                  name_of(type));
  return ElementType::float16;
}

inline ScalarType scalar_type(ElementType type) {
  if (type == ElementType::float32) return ScalarType::Float;
  return type == ElementType::bfloat16 ? ScalarType::BFloat16 : ScalarType::Half;
}

// The data of a contiguous tensor of this type and these sizes, on the CPU.
inline const void* checked_data(const char* name, const char* part, const Tensor& tensor,
                                ScalarType type, const int64_t* sizes, size_t count) {
  check_memory(name, part, tensor, DeviceType::CPU, type);
  check_sizes(name, part, tensor, sizes, count);
  return tensor.const_data_ptr();
}

// The same of float32; null for none. part: of the argument, behind its name.
inline const float* float_data(const char* name, const std::optional<Tensor>& tensor,
                               std::initializer_list<int64_t> sizes, const char* part = "") {
  if (!tensor.has_value()) return nullptr;
  return static_cast<const float*>(
      checked_data(name, part, *tensor, ScalarType::Float, sizes.begin(), sizes.size()));
}

// The same of any of the types that kernels know.
inline Map map_data(const char* name, const std::optional<Tensor>& tensor,
                    const std::vector<int64_t>& sizes) {
  if (!tensor) return {nullptr, ElementType::float32};
  const ScalarType type = tensor->scalar_type();
  const ElementType element = element_type(name, type);
  checked_data(name, "", *tensor, type, sizes.data(), sizes.size());
  return {tensor->mutable_data_ptr(), element};
}

// Of a tensor of any number of axes.
inline const float* any_float_data(const char* name, const Tensor& tensor,
                                   const std::vector<int64_t>& sizes) {
  return static_cast<const float*>(
      checked_data(name, "", tensor, ScalarType::Float, sizes.data(), sizes.size()));
}

// Of a 1x1 convolution [rows, columns] or [rows, columns, 1, 1].
inline const float* pointwise_data(const char* name, const std::optional<Tensor>& tensor,
                                   int64_t rows, int64_t columns) {
  if (tensor.has_value() && tensor->dim() == 4) {
    return float_data(name, tensor, {rows, columns, 1, 1});
  }
  return float_data(name, tensor, {rows, columns});
}

inline double* double_data(const char* name, const Tensor& tensor,
                           std::initializer_list<int64_t> sizes) {
  checked_data(name, "", tensor, ScalarType::Double, sizes.begin(), sizes.size());
  return static_cast<double*>(tensor.mutable_data_ptr());
}

// The length of an axis of a tensor that must be there and not be empty.
inline int64_t axis_of(const char* name, const std::optional<Tensor>& tensor, int64_t axis) {
  STD_TORCH_CHECK(tensor.has_value(), name, " must be given");
  STD_TORCH_CHECK(tensor->dim() > axis && tensor->numel() > 0, name, " must have more than ", axis,
                  " axes and not be empty, got ", shape_of(*tensor));
  return tensor->size(axis);
}

// The tensor as a contiguous float32 one: itself, if it is that already. What is not floating point
// stays as it is, for `float_data` to refuse by its name.
inline Tensor as_floats(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  const bool is_float = type == ScalarType::Float;
  if (!is_float && type != ScalarType::Double && type != ScalarType::Half &&
      type != ScalarType::BFloat16) {
    return tensor;
  }
  const Tensor floats = is_float ? tensor : torch::stable::to(tensor, ScalarType::Float);
  return floats.is_contiguous() ? floats : torch::stable::contiguous(floats);
}

// Converted copies of those tensors that kernels cannot read as they are.
struct ReadableTensors {
  template <class T>
  void operator()(const char*, T& value) const {
    if constexpr (has_fields<T>) {
      T::visit(value, *this);
    } else if (value.has_value()) {
      value = as_floats(*value);
    }
  }
};

template <class T>
T readable(T tensors) {
  T::visit(tensors, ReadableTensors{});
  return tensors;
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
