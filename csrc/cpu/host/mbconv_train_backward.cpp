// Training: the ops of the backward pass.
//
// Blocks of E channels are independent of each other but for the input's gradient, which adds them
// up. So each wave of blocks goes through all passes, and gradients of wide tensors exist for one
// wave at a time.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/host/dispatch.h"
#include "cpu/host/mbconv_train.h"
#include "cpu/host/products.h"

namespace moat_kernels::cpu {
namespace {

// Weight gradients are summed for one block and one group of images at a time. The groups are the
// same for every number of workers, or sums would depend on it.
int64_t group_count(const TrainShape& shape) {
  constexpr int64_t kTasks = 16;
  const int64_t blocks = widest_wave(shape, wave_count(shape, 1));
  return std::clamp<int64_t>((kTasks + blocks - 1) / blocks, 1, shape.batch);
}

Tensor floats(const TrainCall& call, std::vector<int64_t> sizes) {
  return recycled_floats(call.like, std::move(sizes));
}

Tensor float_zeros(const TrainCall& call, std::vector<int64_t> sizes) {
  return torch::stable::new_zeros(call.like, sizes, ScalarType::Float);
}

Tensor as_floats(const TrainCall& call, const std::vector<double>& values) {
  const Tensor result = floats(call, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), data_of(result));
  return result;
}

// Gradients of one norm's weight and bias, and of the bias of the convolution before it.
struct NormGradients {
  std::vector<double> weight, bias, constant;
  explicit NormGradients(int64_t channels) : weight(channels), bias(channels), constant(channels) {}
};

// The backward pass of a norm: sums of dy and dy z in parts, and from them the coefficients of z's
// gradient.
struct NormBackward {
  int64_t parts, wide;
  std::vector<double> sums;         // [parts][2][padded E]
  std::vector<float> coefficients;  // [3][padded E]: see Combination
  NormGradients gradients;

  NormBackward(const TrainShape& shape, int64_t parts)
      : parts(parts),
        wide(shape.padded_wide()),
        sums(parts * 2 * wide),
        coefficients(3 * wide),
        gradients(shape.wide_channels) {}

  double* part(int64_t index) { return sums.data() + index * 2 * wide; }
  Combination factors() const {
    const float* data = coefficients.data();
    return {data, data + wide, data + 2 * wide};
  }

  void fold(const TrainShape& shape, const Blocks& blocks, const Affine& affine, int64_t count) {
    const int64_t last = std::min(blocks.last * kWideChannels, shape.wide_channels);
    for (int64_t i = blocks.first * kWideChannels; i < last; ++i) {
      double total = 0.0;
      double product = 0.0;
      for (int64_t index = 0; index < parts; ++index) {
        total += part(index)[i];
        product += part(index)[wide + i];
      }
      const NormGradient gradient = affine.gradient(i, total, product, static_cast<double>(count));
      coefficients[i] = static_cast<float>(affine.scale(i));
      coefficients[wide + i] = static_cast<float>(gradient.slope);
      coefficients[2 * wide + i] = static_cast<float>(gradient.constant);
      gradients.weight[i] = gradient.weight;
      gradients.bias[i] = total;
      gradients.constant[i] = gradient.sum;
    }
  }
};

// Gradients of a 1x1 convolution's weight while it is summed: [groups][rows][panelled columns].
struct WeightSums {
  int64_t groups, columns, stride;
  Tensor partial;

  WeightSums(const TrainCall& call, int64_t groups, int64_t channels)
      : groups(groups),
        columns(panelled(channels)),
        stride(widest_wave(call.shape, call.waves) * kWideChannels * columns),
        partial(floats(call, {groups, stride})) {}

  // For the first row of a block of the current wave.
  float* at(int64_t group, int64_t block) const {
    return data_of(partial) + group * stride + block * kWideChannels * columns;
  }
};

// Calls compute(block, first image, last image, group, scratch).
template <class Function>
void for_each_group(const TrainCall& call, const Blocks& blocks, int64_t groups,
                    const Function& compute) {
  const int64_t images = call.shape.batch;
  const int64_t tasks = groups * (blocks.last - blocks.first);
  for_each_task(tasks, call.workers, [&](int64_t index, int64_t worker) {
    const int64_t group = index % groups;
    compute(blocks.first + index / groups, images * group / groups, images * (group + 1) / groups,
            group, call.scratch_of(worker));
  });
}

// The gradient of the output, and by what it is multiplied.
struct OutputGradient {
  Map maps;
  const float* scale;  // [images] or null

  OutputGradient(const TrainShape& shape, const Tensor& grad,
                 const std::optional<Tensor>& drop_path_scale)
      : maps(map_data("grad", grad,
                      {shape.batch, shape.out_height, shape.out_width, shape.out_channels})),
        scale(float_data("drop_path_scale", drop_path_scale, {shape.batch})) {}
};

// The project convolution's backward.
class ProjectBackward {
 public:
  ProjectBackward(const TrainCall& call, const OutputGradient& grad)
      : call_(call),
        sums_(call, group_count(call.shape), call.shape.out_channels),
        grad_weight(floats(call, {call.shape.out_channels, call.shape.wide_channels})),
        grad_bias(floats(call, {call.shape.out_channels})) {
    const TrainShape& shape = call.shape;
    rows_ = call.make_rows(grad.maps, shape.out_pixels(), shape.out_channels, nullptr, grad.scale,
                           data_of(grad_bias));
    pairs_ = call.pairs_of(rows_, shape.out_pixels(), shape.out_channels);
    const int64_t depth = call.words(shape.out_channels);
    packed_ = recycled_floats(call.like, {shape.padded_wide() * depth});
    const auto pack = MOAT_KERNELS_DISPATCH(pack_panels_transposed);
    for_each_task(shape.blocks(), call.workers, [&](int64_t block, int64_t) {
      const int64_t first = block * kWideChannels;
      pack(shape.product, call.weights.project + first, shape.wide_channels,
           std::min(kWideChannels, shape.wide_channels - first), shape.out_channels, nullptr,
           data_of(packed_) + first * depth);
    });
  }

  // dy2 of some blocks, and their part of the weight's gradient. gate, grad_gate: both or none.
  void run(const Blocks& blocks, const Wide& z2, const float* gate, const Wide& dy2,
           NormBackward& norm, float* grad_gate) {
    const TrainShape& shape = call_.shape;
    const auto compute = MOAT_KERNELS_DISPATCH(train_backward_project);
    for_each_group(
        call_, blocks, sums_.groups,
        [&](int64_t block, int64_t first, int64_t last, int64_t group, float* scratch) {
          compute(shape, block, first, last, data_of(rows_), data_of(pairs_), z2,
                  call_.depthwise_norm(), gate,
                  data_of(packed_) + block * kWideChannels * call_.words(shape.out_channels),
                  scratch, dy2, sums_.at(group, block - blocks.first), norm.part(group), grad_gate);
        });
    const auto finish = MOAT_KERNELS_DISPATCH(train_finish_project_weight);
    for_each_task(blocks.last - blocks.first, call_.workers, [&](int64_t index, int64_t) {
      const int64_t channel = (blocks.first + index) * kWideChannels;
      finish(sums_.at(0, index), sums_.groups, sums_.stride,
             std::min(kWideChannels, shape.wide_channels - channel), shape.out_channels,
             data_of(grad_weight) + channel, shape.wide_channels);
    });
  }

  int64_t groups() const { return sums_.groups; }

 private:
  const TrainCall& call_;
  WeightSums sums_;
  Tensor rows_, pairs_, packed_;

 public:
  Tensor grad_weight, grad_bias;
};

// The expand convolution's and pre_norm's backward, from the gradient of z1.
class ExpandBackward {
 public:
  // input: x, for what its gradient is like.
  ExpandBackward(const TrainCall& call, const Tensor& input, bool needs_input)
      : call_(call),
        sums_(call, group_count(call.shape), call.shape.in_channels),
        pairs_(call.pairs_of(call.rows, call.shape.in_pixels(), call.shape.in_channels)),
        products_(call.shape.blocks() * 2 * call.shape.in_channels),
        pre_weight_(call.shape.in_channels),
        pre_bias_(call.shape.in_channels),
        slope_(call.shape.in_channels),
        constant_(call.shape.in_channels),
        grad_weight(floats(call, {call.shape.wide_channels, call.shape.in_channels})) {
    if (!needs_input) return;
    const TrainShape& shape = call.shape;
    packed_ = recycled_floats(call.like, {call.words(shape.padded_wide()) * sums_.columns});
    const auto pack = MOAT_KERNELS_DISPATCH(pack_panels_transposed);
    for_each_task(shape.blocks(), call.workers, [&](int64_t block, int64_t) {
      const int64_t first = block * kWideChannels;
      pack(shape.product, call.weights.expand + first * shape.in_channels, shape.in_channels,
           shape.in_channels, std::min(kWideChannels, shape.wide_channels - first),
           call.pre_scale.data(), data_of(*packed_) + call.words(first) * sums_.columns);
    });
    const ScalarType type = input.scalar_type();
    dx = recycled_tensor(call.like, {shape.batch, shape.height, shape.width, shape.in_channels},
                         type);
    const bool in_place = type == ScalarType::Float && sums_.columns == shape.in_channels;
    sums_of_input_ =
        in_place ? dx
                 : recycled_floats(call.like, {shape.batch * shape.in_pixels() * sums_.columns});
  }

  // dpre becomes the gradient of z1.
  void add_weight(const Blocks& blocks, const Wide& dpre, const Wide& z1,
                  const NormBackward& norm) {
    const TrainShape& shape = call_.shape;
    const auto compute = MOAT_KERNELS_DISPATCH(train_backward_expand_weight);
    for_each_group(call_, blocks, sums_.groups,
                   [&](int64_t block, int64_t first, int64_t last, int64_t group, float* scratch) {
                     compute(shape, block, first, last, dpre, z1, norm.factors(), data_of(pairs_),
                             scratch, sums_.at(group, block - blocks.first));
                   });
    const bool measured = call_.expand_affine.measured();
    const auto finish = MOAT_KERNELS_DISPATCH(train_finish_expand_weight);
    for_each_task(blocks.last - blocks.first, call_.workers, [&](int64_t index, int64_t) {
      const int64_t block = blocks.first + index;
      const int64_t channel = block * kWideChannels;
      double* products = products_.data() + block * 2 * shape.in_channels;
      finish(sums_.at(0, index), sums_.groups, sums_.stride,
             std::min(kWideChannels, shape.wide_channels - channel), shape.in_channels,
             call_.weights.expand + channel * shape.in_channels, call_.pre_scale.data(),
             measured ? nullptr : norm.gradients.constant.data() + channel, call_.pre_shift.data(),
             data_of(grad_weight) + channel * shape.in_channels, products,
             products + shape.in_channels);
    });
  }

  // pre_norm's backward, when all blocks have added their weights' gradient.
  void finish_weight() {
    const TrainShape& shape = call_.shape;
    const double count = static_cast<double>(shape.batch * shape.in_pixels());
    std::vector<double> products(2 * shape.in_channels);
    for (int64_t block = 0; block < shape.blocks(); ++block) {
      const double* part = products_.data() + block * 2 * shape.in_channels;
      for (int64_t i = 0; i < 2 * shape.in_channels; ++i) products[i] += part[i];
    }
    for (int64_t i = 0; i < shape.in_channels; ++i) {
      const double total = products[shape.in_channels + i];
      const NormGradient gradient = call_.pre.gradient(i, total, products[i], count);
      pre_weight_[i] = gradient.weight;
      pre_bias_[i] = total;
      slope_[i] = static_cast<float>(gradient.slope);
      constant_[i] = static_cast<float>(gradient.constant);
    }
  }

  void add_input(const Blocks& blocks, const Wide& dz1, bool last, const Map& addend) {
    const InputEnd end = {data_of(call_.rows), slope_.data(), constant_.data(), addend,
                          map_data("dx", dx,
                                   {call_.shape.batch, call_.shape.height, call_.shape.width,
                                    call_.shape.in_channels})};
    const auto compute = MOAT_KERNELS_DISPATCH(train_backward_expand_input);
    call_.for_each_strip(call_.shape.in_pixels(), [&](const PixelRange& range, float*) {
      compute(call_.shape, range, blocks, dz1, data_of(*packed_), blocks.first > 0,
              data_of(*sums_of_input_), last ? &end : nullptr);
    });
  }

  const std::vector<double>& pre_weight() const { return pre_weight_; }
  const std::vector<double>& pre_bias() const { return pre_bias_; }

 private:
  const TrainCall& call_;
  WeightSums sums_;
  Tensor pairs_;
  std::vector<double> products_;  // [blocks][2][C_in]
  std::vector<double> pre_weight_, pre_bias_;
  std::vector<float> slope_, constant_;
  std::optional<Tensor> packed_, sums_of_input_;

 public:
  Tensor grad_weight;
  std::optional<Tensor> dx;
};

// The depthwise weight's gradient [E, 9] from parts [images][9][padded E].
Tensor sum_taps(const TrainCall& call, const std::vector<double>& parts) {
  const TrainShape& shape = call.shape;
  const int64_t wide = shape.padded_wide();
  const Tensor result = floats(call, {shape.wide_channels, 9});
  for_each_task(shape.blocks(), call.workers, [&](int64_t block, int64_t) {
    const int64_t first = block * kWideChannels;
    const int64_t count = std::min(kWideChannels, shape.wide_channels - first);
    for (int64_t tap = 0; tap < 9; ++tap) {
      double totals[kWideChannels] = {};
      for (int64_t image = 0; image < shape.batch; ++image) {
        const double* part = parts.data() + (image * 9 + tap) * wide + first;
        for (int64_t i = 0; i < kWideChannels; ++i) totals[i] += part[i];
      }
      float* column = data_of(result) + first * 9 + tap;
      for (int64_t i = 0; i < count; ++i) column[i * 9] = static_cast<float>(totals[i]);
    }
  });
  return result;
}

// With squeeze-excite, the project convolution first: its input's gradient through the gate is
// needed as a whole. -> gradient of gate * act(y2) (wide), of the weight, the bias and the gate
// [B, padded E]
std::tuple<Tensor, Tensor, Tensor, Tensor> train_backward_gated(
    const Tensor& grad, const Tensor& z2, const Tensor& statistics, const Tensor& gate,
    const std::optional<Tensor>& drop_path_scale, const BottleneckTensors& tensors,
    const TrainSettings& settings) {
  TrainCall call(z2, tensors, settings);
  const TrainShape& shape = call.shape;
  call.waves = 1;
  const Wide kept = call.wide_of("z2", z2, shape.out_pixels(), call.wide_type);
  const Blocks blocks = {0, shape.blocks()};
  call.fold_depthwise(blocks, call.statistics_of(statistics));
  const int64_t wide = shape.padded_wide();
  const float* gates = float_data("gate", gate, {shape.batch, wide});
  const ScalarType type = operand_type(shape.product);
  const Tensor gradient = call.wide_tensor(shape.out_pixels(), type);
  const Tensor grad_gate = float_zeros(call, {shape.batch, wide});
  ProjectBackward project(call, OutputGradient(shape, grad, drop_path_scale));
  NormBackward unused(shape, project.groups());
  project.run(blocks, kept, gates, call.wide_of("gradient", gradient, shape.out_pixels(), type),
              unused, data_of(grad_gate));
  return {gradient, project.grad_weight, project.grad_bias, grad_gate};
}

// z1, z2: as kept by the forward pass; what is missing is computed again. gated_gradient (which is
// overwritten), gate, grad_mean: with squeeze-excite, from train_backward_gated on.
// statistics: none if all norms are frozen.
// -> gradients: x (empty unless needed), weight and bias of expand, depthwise and project (the
// last two empty if gated), weight and bias of pre_norm, expand_norm and depthwise_norm
std::vector<Tensor> train_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& z1,
    const std::optional<Tensor>& z2, const std::optional<Tensor>& gated_gradient,
    const std::optional<Tensor>& gate, const std::optional<Tensor>& grad_mean,
    const std::optional<Tensor>& statistics, const std::optional<Tensor>& drop_path_scale,
    const std::optional<Tensor>& addend, bool needs_input, const BottleneckTensors& tensors,
    const TrainSettings& settings) {
  TrainCall call(x, tensors, settings);
  const TrainShape& shape = call.shape;
  const int64_t in_pixels = shape.in_pixels();
  const int64_t out_pixels = shape.out_pixels();
  STD_TORCH_CHECK(gated_gradient.has_value() == gate.has_value() &&
                      gated_gradient.has_value() == grad_mean.has_value(),
                  "gated_gradient, gate and grad_mean come together");
  STD_TORCH_CHECK(statistics.has_value() || !call.measures(),
                  "statistics must be given: a norm measures its batch");
  std::vector<double> measured(statistics ? 0 : call.statistics_size());
  double* values = statistics ? call.statistics_of(*statistics) : measured.data();
  call.prepare_input(x, values, !statistics);

  std::optional<ProjectBackward> project;
  const OutputGradient output_gradient(shape, grad, drop_path_scale);
  if (!gated_gradient) project.emplace(call, output_gradient);
  const float* gates = float_data("gate", gate, {shape.batch, shape.padded_wide()});
  const float* means = float_data("grad_mean", grad_mean, {shape.batch, shape.padded_wide()});
  const Map extra =
      map_data("addend", addend, {shape.batch, shape.height, shape.width, shape.in_channels});
  ExpandBackward expand(call, x, needs_input);
  NormBackward depthwise_norm(shape, gated_gradient ? shape.batch : project->groups());
  NormBackward expand_norm(shape, shape.batch);
  std::vector<double> grad_taps(shape.batch * 9 * shape.padded_wide());

  std::optional<Tensor> z1_buffer, z2_buffer, dy2_buffer;
  if (!z1) z1_buffer = call.wave_buffer(in_pixels);
  if (!z2) z2_buffer = call.wave_buffer(out_pixels);
  if (!gated_gradient) dy2_buffer = call.wave_buffer(out_pixels);
  const Tensor dpre_buffer = call.wave_buffer(in_pixels);
  for (int64_t wave = 0; wave < call.waves; ++wave) {
    const Blocks blocks = wave_at(shape, wave, call.waves);
    const Wide first =
        z1 ? call.wide_of("z1", *z1, in_pixels, call.wide_type) : call.wave_of(*z1_buffer, blocks);
    const Wide second =
        z2 ? call.wide_of("z2", *z2, out_pixels, call.wide_type) : call.wave_of(*z2_buffer, blocks);
    if (!z1) call.expand(blocks, first, values, false);
    call.fold_expand(blocks, values);
    if (!z2) call.depthwise(blocks, first, second, values, false);
    call.fold_depthwise(blocks, values);

    const Wide dy2 = gated_gradient ? call.wide_of("gated_gradient", *gated_gradient, out_pixels,
                                                   operand_type(shape.product))
                                    : call.wave_of(*dy2_buffer, blocks);
    if (gated_gradient) {
      const auto compute = MOAT_KERNELS_DISPATCH(train_backward_gate);
      call.for_each_plane(blocks, [&](int64_t image, int64_t block, float* scratch) {
        compute(shape, image, block, second, call.depthwise_norm(), gates, means, scratch, dy2,
                depthwise_norm.part(image));
      });
    } else {
      project->run(blocks, second, nullptr, dy2, depthwise_norm, nullptr);
    }
    depthwise_norm.fold(shape, blocks, call.depthwise_affine, shape.batch * out_pixels);

    const Wide dpre = call.wave_of(dpre_buffer, blocks);
    const auto compute = MOAT_KERNELS_DISPATCH(train_backward_depthwise);
    call.for_each_plane(blocks, [&](int64_t image, int64_t block, float* scratch) {
      compute(shape, image, block, dy2, second, first, depthwise_norm.factors(), call.expand_norm(),
              call.taps.data(), scratch, dpre, expand_norm.part(image),
              grad_taps.data() + image * 9 * shape.padded_wide());
    });
    expand_norm.fold(shape, blocks, call.expand_affine, shape.batch * in_pixels);

    expand.add_weight(blocks, dpre, first, expand_norm);
    const bool last = wave + 1 == call.waves;
    if (last) expand.finish_weight();
    if (needs_input) expand.add_input(blocks, dpre, last, extra);
  }

  return {needs_input ? *expand.dx : floats(call, {0}),
          expand.grad_weight,
          as_floats(call, expand_norm.gradients.constant),
          sum_taps(call, grad_taps),
          as_floats(call, depthwise_norm.gradients.constant),
          project ? project->grad_weight : floats(call, {0}),
          project ? project->grad_bias : floats(call, {0}),
          as_floats(call, expand.pre_weight()),
          as_floats(call, expand.pre_bias()),
          as_floats(call, expand_norm.gradients.weight),
          as_floats(call, expand_norm.gradients.bias),
          as_floats(call, depthwise_norm.gradients.weight),
          as_floats(call, depthwise_norm.gradients.bias)};
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_mbconv_train_backward_gated",
               moat_kernels::boxed<&moat_kernels::cpu::train_backward_gated>);
  library.impl("cpu_mbconv_train_backward",
               moat_kernels::boxed<&moat_kernels::cpu::train_backward>);
}
