#pragma once

// From the arguments of the mbconv ops to an MBConvProblem, with every size checked.

#include "cpu/mbconv_problem.h"
#include "cpu/tensors.h"

namespace moat_kernels::cpu {

// Places in `convolutions`; the order of the Python side.
enum ConvolutionTensor {
  kExpandWeight,
  kDepthwiseWeight,
  kProjectWeight,
  kExpandBias,
  kDepthwiseBias,
  kProjectBias,
  kReduceWeight,
  kReduceBias,
  kGateWeight,
  kGateBias,
  kShortcutWeight,
  kShortcutBias,
  kConvolutionTensors
};

inline int64_t output_size(int64_t size, int64_t before, int64_t after, int64_t kernel,
                           int64_t stride) {
  return (size + before + after - kernel) / stride + 1;
}

inline BatchNorm read_norm(const char* name, const OptionalTensors& norms, int64_t index,
                           const std::vector<double>& eps, int64_t channels) {
  BatchNorm norm;
  norm.weight = float_data(name, norms[4 * index], channels);
  norm.bias = float_data(name, norms[4 * index + 1], channels);
  norm.mean = float_data(name, norms[4 * index + 2], channels);
  norm.variance = float_data(name, norms[4 * index + 3], channels);
  norm.present = norm.mean != nullptr;
  norm.eps = static_cast<float>(eps[index]);
  return norm;
}

// x: [batch, C_in, height, width] in channels_last. norms: weight, bias, mean and variance of
// pre_norm, expand_norm, depthwise_norm and project_norm; a norm without mean is absent. padding:
// top, bottom, left, right. activations: expand, depthwise, squeeze-excite.
inline MBConvProblem read_problem(const Tensor& x, const OptionalTensors& convolutions,
                                  const OptionalTensors& norms, const std::vector<double>& eps,
                                  int64_t stride, const std::vector<int64_t>& padding,
                                  const std::vector<std::string>& activations) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [B, C, H, W]");
  STD_TORCH_CHECK(convolutions.size() == kConvolutionTensors && norms.size() == 16 &&
                      eps.size() == 4 && padding.size() == 4 && activations.size() == 3,
                  "mbconv: wrong number of tensors or settings");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  MBConvProblem problem;
  problem.batch = x.size(0);
  problem.in_channels = x.size(1);
  problem.height = x.size(2);
  problem.width = x.size(3);
  problem.wide_channels = convolutions[kExpandWeight]->size(0);
  problem.out_channels = convolutions[kProjectWeight]->size(0);
  problem.stride = stride;
  problem.top = padding[0];
  problem.left = padding[2];
  problem.out_height = output_size(problem.height, padding[0], padding[1], 3, stride);
  problem.out_width = output_size(problem.width, padding[2], padding[3], 3, stride);
  STD_TORCH_CHECK(problem.out_height > 0 && problem.out_width > 0, "x is smaller than the kernel");
  problem.x = x.const_data_ptr();
  problem.x_type = element_type("x", x.scalar_type());

  const int64_t in = problem.in_channels;
  const int64_t wide = problem.wide_channels;
  const int64_t out = problem.out_channels;
  const auto read = [&](const char* name, int weight, int64_t elements, int bias,
                        int64_t channels) {
    return Convolution{float_data(name, convolutions[weight], elements),
                       float_data(name, convolutions[bias], channels)};
  };
  problem.expand = read("expand", kExpandWeight, wide * in, kExpandBias, wide);
  problem.depthwise = read("depthwise", kDepthwiseWeight, wide * 9, kDepthwiseBias, wide);
  problem.project = read("project", kProjectWeight, out * wide, kProjectBias, out);
  problem.shortcut = read("shortcut", kShortcutWeight, out * in, kShortcutBias, out);
  SqueezeExcite& excite = problem.squeeze_excite;
  excite.present = convolutions[kReduceWeight].has_value();
  if (excite.present) {
    excite.channels = convolutions[kReduceWeight]->size(0);
    excite.activation = parse_activation(activations[2]);
    excite.reduce =
        read("se_reduce", kReduceWeight, excite.channels * wide, kReduceBias, excite.channels);
    excite.expand = read("se_expand", kGateWeight, wide * excite.channels, kGateBias, wide);
  }
  problem.expand_activation = parse_activation(activations[0]);
  problem.depthwise_activation = parse_activation(activations[1]);
  problem.pre_norm = read_norm("pre_norm", norms, 0, eps, in);
  problem.expand_norm = read_norm("expand_norm", norms, 1, eps, wide);
  problem.depthwise_norm = read_norm("depthwise_norm", norms, 2, eps, wide);
  problem.project_norm = read_norm("project_norm", norms, 3, eps, out);
  return problem;
}

// kind: "average", "max", or empty for none. settings: size, stride, top, bottom, left, right, and
// whether padding counts.
inline Pool read_pool(const std::string& kind, const std::vector<int64_t>& settings,
                      const MBConvProblem& problem) {
  Pool pool;
  int64_t height = problem.height;
  int64_t width = problem.width;
  if (!kind.empty()) {
    STD_TORCH_CHECK(settings.size() == 7, "pool must have 7 settings");
    pool.kind = kind == "max" ? PoolKind::maximum : PoolKind::average;
    pool.size = settings[0];
    pool.stride = settings[1];
    pool.top = settings[2];
    pool.left = settings[4];
    pool.counts_padding = settings[6] != 0;
    height = output_size(height, settings[2], settings[3], pool.size, pool.stride);
    width = output_size(width, settings[4], settings[5], pool.size, pool.stride);
  }
  STD_TORCH_CHECK(height == problem.out_height && width == problem.out_width &&
                      (problem.shortcut.weight || problem.in_channels == problem.out_channels),
                  "the shortcut does not have the shape of the bottleneck");
  return pool;
}

}  // namespace moat_kernels::cpu
