#pragma once

// From the arguments of the mbconv ops to an MBConvProblem, with every size checked.

#include "cpu/common/mbconv_problem.h"
#include "cpu/host/tensors.h"

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
  const int64_t room = size + before + after - kernel;
  return room < 0 ? 0 : room / stride + 1;
}

inline BatchNorm read_norm(const char* name, const OptionalTensors& norms, int64_t index,
                           const std::vector<double>& eps, int64_t channels) {
  BatchNorm norm;
  norm.weight = float_data(name, norms[4 * index], {channels}, ".weight");
  norm.bias = float_data(name, norms[4 * index + 1], {channels}, ".bias");
  norm.mean = float_data(name, norms[4 * index + 2], {channels}, ".running_mean");
  norm.variance = float_data(name, norms[4 * index + 3], {channels}, ".running_var");
  STD_TORCH_CHECK((norm.mean == nullptr) == (norm.variance == nullptr), name,
                  " must have both running_mean and running_var, or none");
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
  problem.in_channels = axis_of("expand_weight", convolutions[kExpandWeight], 1);
  problem.wide_channels = axis_of("expand_weight", convolutions[kExpandWeight], 0);
  problem.out_channels = axis_of("project_weight", convolutions[kProjectWeight], 0);
  problem.stride = stride;
  const int64_t in = problem.in_channels;
  const int64_t wide = problem.wide_channels;
  const int64_t out = problem.out_channels;
  const auto weight = [&](const char* name, int index, int64_t rows, int64_t columns) {
    return pointwise_data(name, convolutions[index], rows, columns);
  };
  const auto bias = [&](const char* name, int index, int64_t channels) {
    return float_data(name, convolutions[index], {channels});
  };
  problem.expand = {weight("expand_weight", kExpandWeight, wide, in),
                    bias("expand_bias", kExpandBias, wide)};
  axis_of("depthwise_weight", convolutions[kDepthwiseWeight], 0);
  problem.depthwise = {
      float_data("depthwise_weight", convolutions[kDepthwiseWeight], {wide, 1, 3, 3}),
      bias("depthwise_bias", kDepthwiseBias, wide)};
  problem.project = {weight("project_weight", kProjectWeight, out, wide),
                     bias("project_bias", kProjectBias, out)};
  problem.shortcut = {weight("shortcut_weight", kShortcutWeight, out, in),
                      bias("shortcut_bias", kShortcutBias, out)};
  problem.projects_shortcut = problem.shortcut.weight != nullptr;
  SqueezeExcite& excite = problem.squeeze_excite;
  excite.present = convolutions[kReduceWeight].has_value();
  if (excite.present) {
    excite.channels = axis_of("se_reduce_weight", convolutions[kReduceWeight], 0);
    excite.activation = parse_activation(activations[2]);
    excite.reduce = {weight("se_reduce_weight", kReduceWeight, excite.channels, wide),
                     bias("se_reduce_bias", kReduceBias, excite.channels)};
    axis_of("se_expand_weight", convolutions[kGateWeight], 0);
    excite.expand = {weight("se_expand_weight", kGateWeight, wide, excite.channels),
                     bias("se_expand_bias", kGateBias, wide)};
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
  STD_TORCH_CHECK(settings.size() == 7, "pool must have 7 settings, got ", settings.size());
  STD_TORCH_CHECK(kind == "average" || kind == "max", "pool_kind must be average or max, got ",
                  kind);
  STD_TORCH_CHECK(settings[0] > 0 && settings[0] < kLongestSide && settings[1] > 0 &&
                      settings[1] < kLongestSide,
                  "the size and stride of pool must be positive and below 2^20, got ", settings[0],
                  " and ", settings[1]);
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

inline void check_padding(const char* name, const std::vector<int64_t>& padding, int64_t below) {
  bool fits = padding.size() == 4;
  for (const int64_t side : padding) fits = fits && side >= 0 && side < below;
  STD_TORCH_CHECK(fits, name, " must be top, bottom, left, right, from 0 to ", below - 1, ", got ",
                  text_of(padding.data(), padding.size()));
}

// The maps [batch, C_in, height, width] that a block reads, with the padding (top, bottom, left,
// right) of its depthwise convolution and of its pool, if it has one.
inline void set_maps(const MapSize& x, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& pool_padding, MBConvProblem& problem) {
  STD_TORCH_CHECK(x.channels == problem.in_channels, "x must have ", problem.in_channels,
                  " channels, got ", x.channels);
  STD_TORCH_CHECK(x.height > 0 && x.width > 0, "x must have H, W >= 1");
  check_padding("padding", padding, kLongestSide);
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
    check_padding("the padding of pool", pool_padding, pool.size);  // no window without pixels
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
