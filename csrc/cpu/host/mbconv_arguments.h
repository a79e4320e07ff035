#pragma once

// From the arguments of the mbconv ops to an MBConvProblem, with every size checked.

#include "cpu/common/mbconv_problem.h"
#include "cpu/host/norm_arguments.h"
#include "cpu/host/pool_arguments.h"
#include "cpu/host/tensors.h"
#include "fields.h"

namespace moat_kernels::cpu {

// The tensors of all blocks, and those of evaluation after them. MBConvParameters of the Python
// side has the same fields in the same order, with the norms as tuples.
struct BottleneckTensors : Fields {
  std::optional<Tensor> expand_weight, depthwise_weight, project_weight;
  std::optional<Tensor> expand_bias, depthwise_bias, project_bias;
  NormTensors pre_norm, expand_norm, depthwise_norm;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("expand_weight", self.expand_weight);
    field("depthwise_weight", self.depthwise_weight);
    field("project_weight", self.project_weight);
    field("expand_bias", self.expand_bias);
    field("depthwise_bias", self.depthwise_bias);
    field("project_bias", self.project_bias);
    field("pre_norm", self.pre_norm);
    field("expand_norm", self.expand_norm);
    field("depthwise_norm", self.depthwise_norm);
  }
};

struct BlockTensors : BottleneckTensors {
  NormTensors project_norm;
  std::optional<Tensor> se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias;
  std::optional<Tensor> shortcut_weight, shortcut_bias;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    BottleneckTensors::visit(self, field);
    field("project_norm", self.project_norm);
    field("se_reduce_weight", self.se_reduce_weight);
    field("se_reduce_bias", self.se_reduce_bias);
    field("se_expand_weight", self.se_expand_weight);
    field("se_expand_bias", self.se_expand_bias);
    field("shortcut_weight", self.shortcut_weight);
    field("shortcut_bias", self.shortcut_bias);
  }
};

// What evaluation is told of a block beside its tensors, whatever the size of the map.
struct BlockSettings : Fields {
  int64_t stride = 1;
  std::string expand_activation, depthwise_activation, se_activation;
  double pre_norm_eps = 0, expand_norm_eps = 0, depthwise_norm_eps = 0, project_norm_eps = 0;
  bool residual = false;
  PoolSettings pool;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("stride", self.stride);
    field("expand_activation", self.expand_activation);
    field("depthwise_activation", self.depthwise_activation);
    field("se_activation", self.se_activation);
    field("pre_norm_eps", self.pre_norm_eps);
    field("expand_norm_eps", self.expand_norm_eps);
    field("depthwise_norm_eps", self.depthwise_norm_eps);
    field("project_norm_eps", self.project_norm_eps);
    field("residual", self.residual);
    field("pool", self.pool);
  }
};

// Of the depthwise convolution and of the shortcut's pool; these depend on the size of the map.
struct BlockPadding : Fields {
  Padding padding, pool_padding;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("padding", self.padding);
    field("pool_padding", self.pool_padding);
  }
};

// All of a block but the maps that it reads; tensors must be contiguous floats. A norm without
// running statistics is absent.
inline MBConvProblem read_block(const BlockTensors& tensors, const BlockSettings& settings) {
  STD_TORCH_CHECK(settings.stride == 1 || settings.stride == 2, "stride must be 1 or 2, got ",
                  settings.stride);
  MBConvProblem problem;
  problem.in_channels = axis_of("expand_weight", tensors.expand_weight, 1);
  problem.wide_channels = axis_of("expand_weight", tensors.expand_weight, 0);
  problem.out_channels = axis_of("project_weight", tensors.project_weight, 0);
  problem.stride = settings.stride;
  const int64_t in = problem.in_channels;
  const int64_t wide = problem.wide_channels;
  const int64_t out = problem.out_channels;
  problem.expand = {pointwise_data("expand_weight", tensors.expand_weight, wide, in),
                    float_data("expand_bias", tensors.expand_bias, {wide})};
  axis_of("depthwise_weight", tensors.depthwise_weight, 0);
  problem.depthwise = {float_data("depthwise_weight", tensors.depthwise_weight, {wide, 1, 3, 3}),
                       float_data("depthwise_bias", tensors.depthwise_bias, {wide})};
  problem.project = {pointwise_data("project_weight", tensors.project_weight, out, wide),
                     float_data("project_bias", tensors.project_bias, {out})};
  problem.shortcut = {pointwise_data("shortcut_weight", tensors.shortcut_weight, out, in),
                      float_data("shortcut_bias", tensors.shortcut_bias, {out})};
  problem.projects_shortcut = problem.shortcut.weight != nullptr;
  SqueezeExcite& excite = problem.squeeze_excite;
  excite.present = tensors.se_reduce_weight.has_value();
  if (excite.present) {
    excite.channels = axis_of("se_reduce_weight", tensors.se_reduce_weight, 0);
    const int64_t reduced = excite.channels;
    excite.activation = parse_activation(settings.se_activation);
    excite.reduce = {pointwise_data("se_reduce_weight", tensors.se_reduce_weight, reduced, wide),
                     float_data("se_reduce_bias", tensors.se_reduce_bias, {reduced})};
    axis_of("se_expand_weight", tensors.se_expand_weight, 0);
    excite.expand = {pointwise_data("se_expand_weight", tensors.se_expand_weight, wide, reduced),
                     float_data("se_expand_bias", tensors.se_expand_bias, {wide})};
  }
  problem.expand_activation = parse_activation(settings.expand_activation);
  problem.depthwise_activation = parse_activation(settings.depthwise_activation);
  problem.pre_norm = read_norm("pre_norm", tensors.pre_norm, settings.pre_norm_eps, in);
  problem.expand_norm =
      read_norm("expand_norm", tensors.expand_norm, settings.expand_norm_eps, wide);
  problem.depthwise_norm =
      read_norm("depthwise_norm", tensors.depthwise_norm, settings.depthwise_norm_eps, wide);
  problem.project_norm =
      read_norm("project_norm", tensors.project_norm, settings.project_norm_eps, out);
  problem.residual = settings.residual;
  problem.pool = read_pool(settings.pool);
  return problem;
}

// The maps [batch, C_in, height, width] that a block reads.
inline void set_maps(const MapSize& x, const BlockPadding& border, MBConvProblem& problem) {
  STD_TORCH_CHECK(x.channels == problem.in_channels, "x must have ", problem.in_channels,
                  " channels, got ", x.channels);
  STD_TORCH_CHECK(x.height > 0 && x.width > 0, "x must have H, W >= 1");
  const Padding& padding = border.padding;
  check_padding("padding", padding, kLongestSide);
  problem.batch = x.batch;
  problem.height = x.height;
  problem.width = x.width;
  problem.top = padding.top;
  problem.left = padding.left;
  problem.out_height = output_size(x.height, padding.top, padding.bottom, 3, problem.stride);
  problem.out_width = output_size(x.width, padding.left, padding.right, 3, problem.stride);
  STD_TORCH_CHECK(problem.out_height > 0 && problem.out_width > 0, "x is smaller than the kernel");
  if (!problem.residual) return;
  Pool& pool = problem.pool;
  int64_t height = x.height;
  int64_t width = x.width;
  if (pool.kind != PoolKind::none) {
    const Padding& around = border.pool_padding;
    set_padding(around, pool);
    height = output_size(height, around.top, around.bottom, pool.size, pool.stride);
    width = output_size(width, around.left, around.right, pool.size, pool.stride);
  }
  STD_TORCH_CHECK(height == problem.out_height && width == problem.out_width &&
                      (problem.projects_shortcut || problem.in_channels == problem.out_channels),
                  "the shortcut does not have the shape of the bottleneck");
}

}  // namespace moat_kernels::cpu
