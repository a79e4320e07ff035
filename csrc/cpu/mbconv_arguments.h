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

// All of a block but the maps that it reads. norms: weight, bias, mean and variance of pre_norm,
// expand_norm, depthwise_norm and project_norm; a norm without mean is absent. activations: expand,
// depthwise, squeeze-excite.
inline MBConvProblem read_block(const OptionalTensors& convolutions, const OptionalTensors& norms,
                                const std::vector<double>& eps, int64_t stride,
                                const std::vector<std::string>& activations) {
  STD_TORCH_CHECK(convolutions.size() == kConvolutionTensors && norms.size() == 16 &&
                      eps.size() == 4 && activations.size() == 3,
                  "mbconv: wrong number of tensors or settings");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  MBConvProblem problem;
  problem.in_channels = convolutions[kExpandWeight]->size(1);
  problem.wide_channels = convolutions[kExpandWeight]->size(0);
  problem.out_channels = convolutions[kProjectWeight]->size(0);
  problem.stride = stride;
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
  problem.projects_shortcut = problem.shortcut.weight != nullptr;
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
inline Pool read_pool(const std::string& kind, const std::vector<int64_t>& settings) {
  Pool pool;
  if (kind.empty()) return pool;
  STD_TORCH_CHECK(settings.size() == 7, "pool must have 7 settings");
  pool.kind = kind == "max" ? PoolKind::maximum : PoolKind::average;
  pool.size = settings[0];
  pool.stride = settings[1];
  pool.counts_padding = settings[6] != 0;
  return pool;
}

// Of the settings of a pool.
inline std::vector<int64_t> pool_padding(const std::vector<int64_t>& settings) {
  if (settings.size() < 6) return {0, 0, 0, 0};
  return {settings.begin() + 2, settings.begin() + 6};
}

// The maps [batch, C_in, height, width] that a block reads, with the padding (top, bottom, left,
// right) of its depthwise convolution and of its pool, if it has one.
inline void set_maps(const MapSize& x, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& pool_padding, MBConvProblem& problem) {
  STD_TORCH_CHECK(x.channels == problem.in_channels, "x must have ", problem.in_channels,
                  " channels, got ", x.channels);
  STD_TORCH_CHECK(padding.size() == 4 && pool_padding.size() == 4,
                  "padding must be top, bottom, left, right");
  problem.batch = x.batch;
  problem.height = x.height;
  problem.width = x.width;
  problem.top = padding[0];
  problem.left = padding[2];
  problem.out_height = output_size(x.height, padding[0], padding[1], 3, problem.stride);
  problem.out_width = output_size(x.width, padding[2], padding[3], 3, problem.stride);
  STD_TORCH_CHECK(problem.out_height > 0 && problem.out_width > 0, "x is smaller than the kernel");
  if (!problem.residual) return;
  Pool& pool = problem.pool;
  int64_t height = x.height;
  int64_t width = x.width;
  if (pool.kind != PoolKind::none) {
    pool.top = pool_padding[0];
    pool.left = pool_padding[2];
    height = output_size(height, pool_padding[0], pool_padding[1], pool.size, pool.stride);
    width = output_size(width, pool_padding[2], pool_padding[3], pool.size, pool.stride);
  }
  STD_TORCH_CHECK(height == problem.out_height && width == problem.out_width &&
                      (problem.projects_shortcut || problem.in_channels == problem.out_channels),
                  "the shortcut does not have the shape of the bottleneck");
}

}  // namespace moat_kernels::cpu
