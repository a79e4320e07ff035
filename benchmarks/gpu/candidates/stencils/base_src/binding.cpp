// The CUDA kernels as PyTorch ops: checks, outputs and scratch, on the caller's current stream.
// Scratch is freed when an op returns, before the kernels have run: PyTorch's allocator hands it to
// later work on the same stream only, so nothing waits, and graphs can capture it.

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/launchers.h"
#include "cuda/stream.h"
#include "fields.h"
#include "tensor_checks.h"

// The tests compile the kernels for the host and register them there.
#ifndef MOAT_KERNELS_CUDA_KEY
#define MOAT_KERNELS_CUDA_KEY CUDA
#endif

namespace moat_kernels::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_status(const char* op, int status) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ",
                  cudaGetErrorString(static_cast<cudaError_t>(status)));
}

Element element_of(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Element::float32;
  if (type == ScalarType::BFloat16) return Element::bfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, name, " must be float32, bfloat16 or float16, got ",
                  name_of(type));
  return Element::float16;
}

Activation parse_activation(const std::string& name) {
  STD_TORCH_CHECK(name == "gelu" || name == "identity", "activation must be gelu or identity, got ",
                  name);
  return name == "gelu" ? Activation::gelu : Activation::identity;
}

// The data of a contiguous, 16-byte aligned tensor of these sizes.
const void* data_of(const char* name, const Tensor& tensor, ScalarType type, int32_t device,
                    const std::vector<int64_t>& sizes) {
  check_memory(name, "", tensor, DeviceType::MOAT_KERNELS_CUDA_KEY, type);
  check_sizes(name, "", tensor, sizes.data(), sizes.size());
  STD_TORCH_CHECK(tensor.get_device_index() == device, name, " must be on GPU ", device,
                  ", got one on GPU ", tensor.get_device_index());
  const void* data = tensor.const_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
                  " must be aligned to 16 bytes");
  return data;
}

const float* floats_of(const char* name, const OptionalTensor& tensor, int32_t device,
                       const std::vector<int64_t>& sizes) {
  if (!tensor.has_value()) return nullptr;
  return static_cast<const float*>(data_of(name, *tensor, ScalarType::Float, device, sizes));
}

// Where the kernel's windows lie; the border at the bottom and on the right follows from the sizes.
struct Geometry : Fields {
  int64_t out_height = 0, out_width = 0, stride = 1, padding_top = 0, padding_left = 0;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("out_height", self.out_height);
    field("out_width", self.out_width);
    field("stride", self.stride);
    field("padding_top", self.padding_top);
    field("padding_left", self.padding_left);
  }
};

DepthwiseShape read_shape(const Tensor& map, int64_t channels, const Geometry& geometry) {
  STD_TORCH_CHECK(map.device().type() == DeviceType::MOAT_KERNELS_CUDA_KEY,
                  "the map must be on the GPU, as the other tensors are");
  STD_TORCH_CHECK(map.dim() == 4 && map.numel() > 0,
                  "the map must be [B, H, W, C] and not be empty, got ", shape_of(map));
  static constexpr int64_t kMost =
      std::numeric_limits<int>::max() / 2;  // kernels count pixels in ints
  bool fits = channels <= kMost;
  for (const int64_t size : map.sizes()) fits = fits && size <= kMost;
  STD_TORCH_CHECK(fits, "sizes must be below 2^30, got a map of ", shape_of(map), " with ",
                  channels, " channels");
  const auto check_size = [](const char* name, int64_t size, int64_t least) {
    STD_TORCH_CHECK(size >= least && size <= kMost, name, " must be from ", least, " to ", kMost,
                    ", got ", size);
  };
  check_size("out_height", geometry.out_height, 1);
  check_size("out_width", geometry.out_width, 1);
  check_size("padding_top", geometry.padding_top, 0);
  check_size("padding_left", geometry.padding_left, 0);
  STD_TORCH_CHECK(geometry.stride == 1 || geometry.stride == 2, "stride must be 1 or 2, got ",
                  geometry.stride);
  DepthwiseShape shape;
  shape.images = map.size(0);
  shape.height = static_cast<int>(map.size(1));
  shape.width = static_cast<int>(map.size(2));
  shape.out_height = static_cast<int>(geometry.out_height);
  shape.out_width = static_cast<int>(geometry.out_width);
  shape.stride = static_cast<int>(geometry.stride);
  shape.top = static_cast<int>(geometry.padding_top);
  shape.left = static_cast<int>(geometry.padding_left);
  shape.channels = static_cast<int>(channels);
  STD_TORCH_CHECK(std::max(map.size(2), geometry.out_width) * channels <= kMost / 2,
                  "a row of a map must have at most ", kMost / 2, " elements, got a map of ",
                  shape_of(map), " with ", channels, " channels");
  return shape;
}

void check_channels(const char* name, int64_t channels, Element type) {
  STD_TORCH_CHECK(channels % channel_multiple(type) == 0, name, " must be a multiple of ",
                  channel_multiple(type), " in this dtype, got ", channels);
}

BlockPlan read_plan(int64_t target_blocks, int64_t columns) {
  STD_TORCH_CHECK(target_blocks > 0 && target_blocks < 1 << 20,
                  "target_blocks must be positive and below 2^20, got ", target_blocks);
  STD_TORCH_CHECK(columns > 0 && columns <= kMostColumns, "columns must be from 1 to ",
                  kMostColumns, ", got ", columns);
  return {static_cast<int>(target_blocks), static_cast<int>(columns)};
}

std::vector<int64_t> input_sizes(const DepthwiseShape& shape) {
  return {shape.images, shape.height, shape.width, shape.channels};
}

std::vector<int64_t> output_sizes(const DepthwiseShape& shape) {
  return {shape.images, shape.out_height, shape.out_width, shape.channels};
}

Tensor new_floats(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

float* mutable_floats(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<float*>(tensor->mutable_data_ptr()) : nullptr;
}

// Mean and squared deviations [1, 2, E] from a kernel's partial moments; [0, 2, E] without them.
Tensor finish(const Tensor& like, const OptionalTensor& partials, int channels, void* stream) {
  const Tensor moments = new_floats(like, {partials.has_value() ? 1 : 0, 2, channels});
  if (partials.has_value()) {
    check_status("finish_moments", finish_moments(mutable_floats(partials), partials->size(0),
                                                  channels, mutable_floats(moments), stream));
  }
  return moments;
}

// affine: scale and shift, [2, E].
Prologue read_prologue(const OptionalTensor& affine, const std::string& activation, int32_t device,
                       int64_t channels) {
  const float* scale = floats_of("affine", affine, device, {2, channels});
  return {scale, scale ? scale + channels : nullptr, parse_activation(activation)};
}

Epilogue read_epilogue(const OptionalTensor& bias, const std::string& activation, int32_t device,
                       int64_t channels) {
  return {floats_of("bias", bias, device, {channels}), parse_activation(activation)};
}

OptionalTensor new_moments(const Tensor& like, bool measures, int64_t count, int channels) {
  if (!measures) return std::nullopt;
  return new_floats(like, {count, kMomentRows, channels});
}

std::tuple<Tensor, Tensor> forward(const Tensor& z1, const OptionalTensor& affine,
                                   const std::string& activation, const Tensor& weights,
                                   const OptionalTensor& bias, const std::string& output_activation,
                                   const Geometry& geometry, bool measures, int64_t target_blocks,
                                   int64_t columns) {
  const Element type = element_of("z1", z1);
  const DepthwiseShape shape = read_shape(z1, z1.size(-1), geometry);
  check_channels("the channels", shape.channels, type);
  const int32_t device = z1.get_device_index();
  const DeviceScope scope(device);
  void* stream = current_stream(device);
  const BlockPlan plan = read_plan(target_blocks, columns);
  const void* data = data_of("z1", z1, z1.scalar_type(), device, input_sizes(shape));
  const Prologue prologue = read_prologue(affine, activation, device, shape.channels);
  const float* taps = floats_of("weights", weights, device, {9, shape.channels});
  const Epilogue epilogue = read_epilogue(bias, output_activation, device, shape.channels);
  const Tensor z2 = torch::stable::new_empty(z1, output_sizes(shape));
  const OptionalTensor partials =
      new_moments(z1, measures, depthwise_forward_partials(shape, plan), shape.channels);
  check_status("depthwise_forward",
               depthwise_forward(shape, type, data, prologue, taps, epilogue, z2.mutable_data_ptr(),
                                 mutable_floats(partials), plan, stream));
  return {z2, finish(z1, partials, shape.channels, stream)};
}

// factors [3, E]: slope, z2_slope and constant.
NormBackward read_norm(const OptionalTensor& z2, const OptionalTensor& factors, ScalarType dtype,
                       int32_t device, const DepthwiseShape& shape) {
  STD_TORCH_CHECK(z2.has_value() == factors.has_value(), "z2 and factors come together");
  if (!z2.has_value()) return {};
  const float* slope = floats_of("factors", factors, device, {3, shape.channels});
  return {data_of("z2", *z2, dtype, device, output_sizes(shape)), slope, slope + shape.channels,
          slope + 2 * shape.channels};
}

// -> dpre, partial gradients [P, 11, E]
std::tuple<Tensor, Tensor> backward(const Tensor& dy2, const OptionalTensor& z2,
                                    const OptionalTensor& factors, const Tensor& z1,
                                    const OptionalTensor& affine, const std::string& activation,
                                    const Tensor& weights, const Geometry& geometry,
                                    int64_t target_blocks, int64_t columns) {
  const Element type = element_of("z1", z1);
  const DepthwiseShape shape = read_shape(z1, z1.size(-1), geometry);
  check_channels("the channels", shape.channels, type);
  const int32_t device = z1.get_device_index();
  const DeviceScope scope(device);
  void* stream = current_stream(device);
  const BlockPlan plan = read_plan(target_blocks, columns);
  const ScalarType dtype = z1.scalar_type();
  const void* input = data_of("z1", z1, dtype, device, input_sizes(shape));
  const void* gradient = data_of("dy2", dy2, dtype, device, output_sizes(shape));
  const NormBackward norm = read_norm(z2, factors, dtype, device, shape);
  const Prologue prologue = read_prologue(affine, activation, device, shape.channels);
  const float* taps = floats_of("weights", weights, device, {9, shape.channels});
  const Tensor dpre = torch::stable::new_empty(z1, input_sizes(shape));
  const int64_t count = depthwise_backward_partials(shape, plan);
  const Tensor partials = new_floats(z1, {count, kGradientRows, shape.channels});
  check_status("depthwise_backward",
               depthwise_backward(shape, type, gradient, norm, input, prologue, taps,
                                  dpre.mutable_data_ptr(), mutable_floats(partials), plan, stream));
  return {dpre, partials};
}

// Checked arguments of the kernels that begin with the expand GEMM.
struct ExpandInput {
  DepthwiseShape shape;
  Element type;
  int32_t device;
  int in_channels;
  const void* x;
  const void* weight;
  Epilogue hidden;
};

ExpandInput read_expand(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const std::string& activation, const Geometry& geometry) {
  ExpandInput input;
  input.type = element_of("x", x);
  STD_TORCH_CHECK(input.type != Element::float32, "x must be bfloat16 or float16");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0,
                  "weight must be [E, C] and not be empty, got ", shape_of(weight));
  input.shape = read_shape(x, weight.size(0), geometry);
  const DepthwiseShape& shape = input.shape;
  const int64_t in_channels = x.size(3);
  check_channels("the channels of x", in_channels, input.type);
  check_channels("the rows of weight", shape.channels, input.type);
  input.in_channels = static_cast<int>(in_channels);
  input.device = x.get_device_index();
  const ScalarType dtype = x.scalar_type();
  input.x =
      data_of("x", x, dtype, input.device, {shape.images, shape.height, shape.width, in_channels});
  input.weight = data_of("weight", weight, dtype, input.device, {shape.channels, in_channels});
  input.hidden = read_epilogue(bias, activation, input.device, shape.channels);
  return input;
}

Tensor expand(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
              const std::string& activation, const Tensor& depthwise_weights,
              const OptionalTensor& depthwise_bias, const std::string& output_activation,
              const Geometry& geometry) {
  const ExpandInput input = read_expand(x, weight, bias, activation, geometry);
  const DepthwiseShape& shape = input.shape;
  const DeviceScope scope(input.device);
  void* stream = current_stream(input.device);
  const Epilogue epilogue =
      read_epilogue(depthwise_bias, output_activation, input.device, shape.channels);
  const float* taps =
      floats_of("depthwise_weights", depthwise_weights, input.device, {9, shape.channels});
  const Tensor z2 = torch::stable::new_empty(x, output_sizes(shape));
  check_status("expand_depthwise",
               expand_depthwise(shape, input.in_channels, input.type, input.x, input.weight,
                                input.hidden, taps, epilogue, z2.mutable_data_ptr(), stream));
  return z2;
}

}  // namespace
}  // namespace moat_kernels::cuda

// The schemas are those of moat_kernels/ops/mbconv/triton/cuda_kernels.py.
STABLE_TORCH_LIBRARY_IMPL(moat_kernels, MOAT_KERNELS_CUDA_KEY, library) {
  library.impl("cuda_depthwise_forward", moat_kernels::boxed<&moat_kernels::cuda::forward>);
  library.impl("cuda_depthwise_backward", moat_kernels::boxed<&moat_kernels::cuda::backward>);
  library.impl("cuda_expand_depthwise", moat_kernels::boxed<&moat_kernels::cuda::expand>);
}
