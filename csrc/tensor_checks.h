#pragma once

// What every op checks of a tensor before it touches its memory. Errors name the argument, what is
// supported and what it was.

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string>

namespace moat_kernels {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text_of(const int64_t* sizes, size_t count) {
  std::string text = "[";
  for (size_t axis = 0; axis < count; ++axis) {
    text += (axis > 0 ? ", " : "") + std::to_string(sizes[axis]);
  }
  return text + "]";
}

inline std::string shape_of(const Tensor& tensor) {
  return text_of(tensor.sizes().data(), tensor.sizes().size());
}

// As PyTorch's Python calls it; other types as its C++ does.
inline std::string name_of(ScalarType type) {
  if (type == ScalarType::Float) return "float32";
  if (type == ScalarType::Double) return "float64";
  if (type == ScalarType::Half) return "float16";
  if (type == ScalarType::BFloat16) return "bfloat16";
  return torch::headeronly::toString(type);
}

inline bool has_sizes(const Tensor& tensor, const int64_t* sizes, size_t count) {
  const auto actual = tensor.sizes();
  return actual.size() == count && std::equal(sizes, sizes + count, actual.data());
}

// part: of the argument, behind its name.
inline void check_sizes(const char* name, const char* part, const Tensor& tensor,
                        const int64_t* sizes, size_t count) {
  STD_TORCH_CHECK(has_sizes(tensor, sizes, count), name, part, " must be ", text_of(sizes, count),
                  ", got ", shape_of(tensor));
}

// That the tensor's memory is `device`'s, of elements of `type` one after the other.
inline void check_memory(const char* name, const char* part, const Tensor& tensor,
                         DeviceType device, ScalarType type) {
  STD_TORCH_CHECK(tensor.device().type() == device, name, part, " must be on the ",
                  device == DeviceType::CPU ? "CPU" : "GPU", ", as the other tensors are");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, part, " must be ", name_of(type), ", got ",
                  name_of(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, part, " must be contiguous");
}

}  // namespace moat_kernels
