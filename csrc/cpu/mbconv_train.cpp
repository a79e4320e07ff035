// The ops of training: how each pass is divided among threads. All divisions depend on the shape
// only, and partial sums are added in the order of their index, so results do not depend on the
// number of threads.

#include "cpu/kernels/mbconv_train.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace moat_kernels::cpu {
namespace {

using Geometry = std::vector<int64_t>;
using Names = std::vector<std::string>;

// geometry: batch, height, width, out height, out width, stride, top, left, C_in, E, C_out.
// activations: expand, depthwise.
TrainShape read_shape(const Geometry& geometry, const Names& activations) {
  STD_TORCH_CHECK(geometry.size() == 11 && activations.size() == 2,
                  "mbconv: wrong number of settings");
  TrainShape shape;
  shape.images = geometry[0];
  shape.height = geometry[1];
  shape.width = geometry[2];
  shape.out_height = geometry[3];
  shape.out_width = geometry[4];
  shape.stride = geometry[5];
  shape.top = geometry[6];
  shape.left = geometry[7];
  shape.in_channels = geometry[8];
  shape.wide_channels = geometry[9];
  shape.out_channels = geometry[10];
  shape.expand_activation = parse_activation(activations[0]);
  shape.depthwise_activation = parse_activation(activations[1]);
  STD_TORCH_CHECK(shape.stride == 1 || shape.stride == 2, "stride must be 1 or 2");
  return shape;
}

int64_t panelled(int64_t columns) { return MOAT_KERNELS_DISPATCH(train_panelled)(columns); }

Tensor doubles(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_zeros(like, sizes, ScalarType::Double);
}

double* doubles_of(const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

Tensor wide_tensor(const Tensor& like, const TrainShape& shape, int64_t pixels) {
  return float_tensor(like, {shape.images, shape.blocks(), pixels, kWideChannels});
}

const float* wide_data(const char* name, const Tensor& tensor, const TrainShape& shape,
                       int64_t pixels) {
  return float_data(name, tensor, shape.images * shape.padded_wide() * pixels);
}

// Strips of every image, in order.
int64_t strip_count(int64_t pixels) { return (pixels + kTrainStripPixels - 1) / kTrainStripPixels; }

PixelRange strip_at(int64_t index, int64_t pixels) {
  const int64_t strips = strip_count(pixels);
  const int64_t strip = index % strips;
  return {index / strips, pixels * strip / strips, pixels * (strip + 1) / strips};
}

// Passes that sum over all pixels take one block and one group of images at a time.
int64_t group_count(const TrainShape& shape) {
  constexpr int64_t kTasks = 16;
  return std::clamp<int64_t>((kTasks + shape.blocks() - 1) / shape.blocks(), 1, shape.images);
}

// weight [columns][E], packed by blocks of E as panels of columns.
Tensor pack_blocks_of_depth(const Tensor& like, const TrainShape& shape, const float* weight,
                            int64_t columns) {
  const Tensor packed = float_buffer(like, shape.padded_wide() * panelled(columns));
  const auto pack = MOAT_KERNELS_DISPATCH(train_pack);
  for_each_task(shape.blocks(), thread_count(), [&](int64_t block, int64_t) {
    const int64_t first = block * kWideChannels;
    pack(weight + first, shape.wide_channels, columns,
         std::min(kWideChannels, shape.wide_channels - first),
         data_of(packed) + first * panelled(columns));
  });
  return packed;
}

// weight [E][columns], packed likewise.
Tensor pack_transposed_blocks(const Tensor& like, const TrainShape& shape, const float* weight,
                              int64_t columns) {
  const Tensor packed = float_buffer(like, shape.padded_wide() * panelled(columns));
  const auto pack = MOAT_KERNELS_DISPATCH(train_pack_transposed);
  for_each_task(shape.blocks(), thread_count(), [&](int64_t block, int64_t) {
    const int64_t first = block * kWideChannels;
    pack(weight + first * columns, columns, columns,
         std::min(kWideChannels, shape.wide_channels - first),
         data_of(packed) + first * panelled(columns));
  });
  return packed;
}

// -> each image's mean and sum of squared deviations [B, 2, C]
Tensor moments(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [B, H, W, C]");
  const int64_t channels = x.size(3);
  const int64_t pixels = x.size(1) * x.size(2);
  const float* data = float_data("x", x, x.numel());
  const Tensor result = doubles(x, {x.size(0), 2, channels});
  const auto compute = MOAT_KERNELS_DISPATCH(train_moments);
  for_each_task(x.size(0), thread_count(), [&](int64_t image, int64_t) {
    compute(data + image * pixels * channels, pixels, channels,
            doubles_of(result) + image * 2 * channels);
  });
  return result;
}

Tensor rows(const Tensor& x, const std::optional<Tensor>& shift,
            const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [B, H, W, C]");
  const int64_t channels = x.size(3);
  const int64_t pixels = x.size(1) * x.size(2);
  const float* data = float_data("x", x, x.numel());
  const float* shifts = float_data("shift", shift, channels);
  const float* scales = float_data("scale", scale, x.size(0));
  const int64_t columns = panelled(channels);
  const Tensor result = float_tensor(x, {x.size(0) * pixels, columns});
  const auto convert = MOAT_KERNELS_DISPATCH(train_rows);
  for_each_task(x.size(0) * strip_count(pixels), thread_count(), [&](int64_t index, int64_t) {
    const PixelRange range = strip_at(index, pixels);
    const int64_t first = range.image * pixels + range.first;
    convert(data + first * channels, range.last - range.first, channels, shifts,
            scales ? scales[range.image] : 1.0f, data_of(result) + first * columns);
  });
  return result;
}

std::tuple<Tensor, Tensor> expand(const Tensor& rows, const Tensor& weight, bool measures,
                                  const Geometry& geometry, const Names& activations) {
  const TrainShape shape = read_shape(geometry, activations);
  const int64_t depth = shape.in_channels;
  const float* data = float_data("rows", rows, shape.images * shape.in_pixels() * panelled(depth));
  const float* weights = float_data("weight", weight, shape.wide_channels * depth);
  const Tensor packed = float_buffer(rows, shape.padded_wide() * depth);
  const auto pack = MOAT_KERNELS_DISPATCH(train_pack);
  for_each_task(shape.blocks(), thread_count(), [&](int64_t block, int64_t) {
    const int64_t first = block * kWideChannels;
    pack(weights + first * depth, depth, std::min(kWideChannels, shape.wide_channels - first),
         depth, data_of(packed) + first * depth);
  });
  const Tensor z1 = wide_tensor(rows, shape, shape.in_pixels());
  const int64_t tasks = shape.images * strip_count(shape.in_pixels());
  // Few enough partial sums to be cheap, enough of them to keep threads apart.
  const int64_t groups = measures ? std::min<int64_t>(tasks, 16) : tasks;
  const Tensor sums = doubles(rows, {measures ? groups : 0, 2, shape.padded_wide()});
  const auto compute = MOAT_KERNELS_DISPATCH(train_expand);
  for_each_task(groups, thread_count(), [&](int64_t group, int64_t) {
    for (int64_t task = tasks * group / groups; task < tasks * (group + 1) / groups; ++task) {
      compute(shape, strip_at(task, shape.in_pixels()), data, data_of(packed), data_of(z1),
              measures ? doubles_of(sums) + group * 2 * shape.padded_wide() : nullptr);
    }
  });
  return {z1, sums};
}

// Calls compute(image, block, scratch) for every image and block.
template <class Function>
void for_each_plane(const Tensor& like, const TrainShape& shape, const Function& compute) {
  const int64_t workers = thread_count();
  const int64_t size = MOAT_KERNELS_DISPATCH(train_stencil_scratch)(shape);
  const Tensor scratch = float_buffer(like, workers * size);
  for_each_task(shape.images * shape.blocks(), workers, [&](int64_t index, int64_t worker) {
    compute(index / shape.blocks(), index % shape.blocks(), data_of(scratch) + worker * size);
  });
}

std::tuple<Tensor, Tensor> depthwise(const Tensor& z1, const Tensor& coefficients,
                                     const Tensor& weights, bool measures, const Geometry& geometry,
                                     const Names& activations) {
  const TrainShape shape = read_shape(geometry, activations);
  const int64_t wide = shape.padded_wide();
  const float* in = wide_data("z1", z1, shape, shape.in_pixels());
  const float* scale = float_data("coefficients", coefficients, 2 * wide);
  const float* taps = float_data("weights", weights, 9 * wide);
  const Tensor z2 = wide_tensor(z1, shape, shape.out_pixels());
  const Tensor moments = doubles(z1, {measures ? shape.images : 0, 2, wide});
  const auto compute = MOAT_KERNELS_DISPATCH(train_depthwise);
  for_each_plane(z1, shape, [&](int64_t image, int64_t block, float* scratch) {
    compute(shape, image, block, in, scale, scale + wide, taps, scratch, data_of(z2),
            measures ? doubles_of(moments) + image * 2 * wide : nullptr);
  });
  return {z2, moments};
}

Tensor pool(const Tensor& z2, const Tensor& coefficients, const Geometry& geometry,
            const Names& activations) {
  const TrainShape shape = read_shape(geometry, activations);
  const int64_t wide = shape.padded_wide();
  const float* in = wide_data("z2", z2, shape, shape.out_pixels());
  const float* scale = float_data("coefficients", coefficients, 2 * wide);
  const Tensor means = float_tensor(z2, {shape.images, wide});
  const auto compute = MOAT_KERNELS_DISPATCH(train_pool);
  for_each_plane(z2, shape, [&](int64_t image, int64_t block, float*) {
    compute(shape, image, block, in, scale, scale + wide, data_of(means) + image * wide);
  });
  return means;
}

// Calls compute(range, tiles) for every strip of an image of `pixels`; tiles hold a strip of 64 +
// 16 channels twice, or once beside a strip of `columns`.
template <class Function>
void for_each_strip(const Tensor& like, const TrainShape& shape, int64_t pixels, int64_t columns,
                    const Function& compute) {
  const int64_t workers = thread_count();
  const int64_t size = kTrainStripPixels * (2 * kWideChannels + panelled(columns));
  const Tensor scratch = float_buffer(like, workers * size);
  for_each_task(shape.images * strip_count(pixels), workers, [&](int64_t index, int64_t worker) {
    compute(strip_at(index, pixels), data_of(scratch) + worker * size);
  });
}

Tensor project(const Tensor& z2, const Tensor& coefficients, const std::optional<Tensor>& gate,
               const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& drop_path_scale, const std::optional<Tensor>& addend,
               const Geometry& geometry, const Names& activations) {
  const TrainShape shape = read_shape(geometry, activations);
  const int64_t wide = shape.padded_wide();
  const int64_t pixels = shape.out_pixels();
  const int64_t channels = shape.out_channels;
  const float* in = wide_data("z2", z2, shape, pixels);
  const float* scale = float_data("coefficients", coefficients, 2 * wide);
  const float* gates = float_data("gate", gate, shape.images * wide);
  const float* weights = float_data("weight", weight, channels * shape.wide_channels);
  const float* biases = float_data("bias", bias, channels);
  const float* keep = float_data("drop_path_scale", drop_path_scale, shape.images);
  const float* extra = float_data("addend", addend, shape.images * pixels * channels);
  const Tensor packed = pack_blocks_of_depth(z2, shape, weights, channels);
  const Tensor output =
      float_tensor(z2, {shape.images, shape.out_height, shape.out_width, channels});
  const auto compute = MOAT_KERNELS_DISPATCH(train_project);
  for_each_strip(z2, shape, pixels, channels, [&](const PixelRange& range, float* tiles) {
    compute(shape, range, in, scale, scale + wide, gates, data_of(packed), biases, keep, extra,
            tiles, data_of(output));
  });
  return output;
}

// Calls compute(block, first image, last image, group, tiles) for every block and group of images.
template <class Function>
void for_each_group(const Tensor& like, const TrainShape& shape, const Function& compute) {
  const int64_t workers = thread_count();
  const int64_t groups = group_count(shape);
  const int64_t size = kTrainStripPixels * 3 * kWideChannels;
  const Tensor scratch = float_buffer(like, workers * size);
  for_each_task(groups * shape.blocks(), workers, [&](int64_t index, int64_t worker) {
    const int64_t group = index % groups;
    compute(index / groups, shape.images * group / groups, shape.images * (group + 1) / groups,
            group, data_of(scratch) + worker * size);
  });
}

// -> dy2, grad_weight [groups, E, panelled C_out], sums [groups, 2, E], grad_gate [B, E]
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_project(
    const Tensor& grad_rows, const Tensor& z2, const Tensor& coefficients,
    const std::optional<Tensor>& gate, const Tensor& weight, const Geometry& geometry,
    const Names& activations) {
  const TrainShape shape = read_shape(geometry, activations);
  const int64_t wide = shape.padded_wide();
  const int64_t columns = panelled(shape.out_channels);
  const int64_t groups = group_count(shape);
  const float* grad =
      float_data("grad_rows", grad_rows, shape.images * shape.out_pixels() * columns);
  const float* in = wide_data("z2", z2, shape, shape.out_pixels());
  const float* scale = float_data("coefficients", coefficients, 2 * wide);
  const float* gates = float_data("gate", gate, shape.images * wide);
  const float* weights = float_data("weight", weight, shape.out_channels * shape.wide_channels);
  const Tensor packed = float_buffer(z2, wide * shape.out_channels);
  const auto pack = MOAT_KERNELS_DISPATCH(train_pack_transposed);
  for_each_task(shape.blocks(), thread_count(), [&](int64_t block, int64_t) {
    const int64_t first = block * kWideChannels;
    pack(weights + first, shape.wide_channels, std::min(kWideChannels, shape.wide_channels - first),
         shape.out_channels, data_of(packed) + first * shape.out_channels);
  });
  const Tensor dy2 = wide_tensor(z2, shape, shape.out_pixels());
  const Tensor grad_weight = float_tensor(z2, {groups, wide, columns});
  const Tensor sums = doubles(z2, {groups, 2, wide});
  const Tensor grad_gate =
      torch::stable::new_zeros(z2, {gates ? shape.images : 0, wide}, ScalarType::Float);
  const auto compute = MOAT_KERNELS_DISPATCH(train_backward_project);
  for_each_group(
      z2, shape, [&](int64_t block, int64_t first, int64_t last, int64_t group, float* tiles) {
        compute(shape, block, first, last, grad, in, scale, scale + wide, gates,
                data_of(packed) + block * kWideChannels * shape.out_channels, tiles, data_of(dy2),
                data_of(grad_weight) + (group * wide + block * kWideChannels) * columns,
                doubles_of(sums) + group * 2 * wide, data_of(grad_gate));
      });
  return {dy2, grad_weight, sums, grad_gate};
}

// Overwrites dy2. -> sums [B, 2, E]
Tensor backward_gate(const Tensor& dy2, const Tensor& z2, const Tensor& coefficients,
                     const Tensor& gate, const Tensor& grad_mean, const Geometry& geometry,
                     const Names& activations) {
  const TrainShape shape = read_shape(geometry, activations);
  const int64_t wide = shape.padded_wide();
  wide_data("dy2", dy2, shape, shape.out_pixels());
  const float* in = wide_data("z2", z2, shape, shape.out_pixels());
  const float* scale = float_data("coefficients", coefficients, 2 * wide);
  const float* gates = float_data("gate", gate, shape.images * wide);
  const float* means = float_data("grad_mean", grad_mean, shape.images * wide);
  const Tensor sums = doubles(z2, {shape.images, 2, wide});
  const auto compute = MOAT_KERNELS_DISPATCH(train_backward_gate);
  for_each_plane(z2, shape, [&](int64_t image, int64_t block, float*) {
    compute(shape, image, block, in, scale, scale + wide, gates, means, data_of(dy2),
            doubles_of(sums) + image * 2 * wide);
  });
  return sums;
}

// -> dpre, sums [B, 2, E], grad_weights [B, 9, E]
std::tuple<Tensor, Tensor, Tensor> backward_depthwise(const Tensor& dy2, const Tensor& z2,
                                                      const Tensor& z1, const Tensor& coefficients,
                                                      const Tensor& weights,
                                                      const Geometry& geometry,
                                                      const Names& activations) {
  const TrainShape shape = read_shape(geometry, activations);
  const int64_t wide = shape.padded_wide();
  const float* gradient = wide_data("dy2", dy2, shape, shape.out_pixels());
  const float* output = wide_data("z2", z2, shape, shape.out_pixels());
  const float* input = wide_data("z1", z1, shape, shape.in_pixels());
  const float* first = float_data("coefficients", coefficients, 5 * wide);
  const float* const parts[5] = {first, first + wide, first + 2 * wide, first + 3 * wide,
                                 first + 4 * wide};
  const float* taps = float_data("weights", weights, 9 * wide);
  const Tensor dpre = wide_tensor(z1, shape, shape.in_pixels());
  const Tensor sums = doubles(z1, {shape.images, 2, wide});
  const Tensor grad_weights = doubles(z1, {shape.images, 9, wide});
  const auto compute = MOAT_KERNELS_DISPATCH(train_backward_depthwise);
  for_each_plane(z1, shape, [&](int64_t image, int64_t block, float* scratch) {
    compute(shape, image, block, gradient, output, input, parts, taps, scratch, data_of(dpre),
            doubles_of(sums) + image * 2 * wide, doubles_of(grad_weights) + image * 9 * wide);
  });
  return {dpre, sums, grad_weights};
}

// -> grad_weight [groups, E, panelled C_in]
Tensor backward_expand_weight(const Tensor& dpre, const Tensor& z1, const Tensor& coefficients,
                              const Tensor& rows, const Geometry& geometry,
                              const Names& activations) {
  const TrainShape shape = read_shape(geometry, activations);
  const int64_t wide = shape.padded_wide();
  const int64_t columns = panelled(shape.in_channels);
  const float* gradient = wide_data("dpre", dpre, shape, shape.in_pixels());
  const float* input = wide_data("z1", z1, shape, shape.in_pixels());
  const float* first_part = float_data("coefficients", coefficients, 3 * wide);
  const float* const parts[3] = {first_part, first_part + wide, first_part + 2 * wide};
  const float* data = float_data("rows", rows, shape.images * shape.in_pixels() * columns);
  const Tensor grad_weight = float_tensor(z1, {group_count(shape), wide, columns});
  const auto compute = MOAT_KERNELS_DISPATCH(train_backward_expand_weight);
  for_each_group(z1, shape,
                 [&](int64_t block, int64_t first, int64_t last, int64_t group, float* tile) {
                   compute(shape, block, first, last, gradient, input, parts, data, tile,
                           data_of(grad_weight) + (group * wide + block * kWideChannels) * columns);
                 });
  return grad_weight;
}

Tensor backward_expand_input(const Tensor& dpre, const Tensor& z1, const Tensor& coefficients,
                             const Tensor& weight, const Tensor& rows, const Tensor& factor,
                             const Tensor& offset, const std::optional<Tensor>& addend,
                             const Geometry& geometry, const Names& activations) {
  const TrainShape shape = read_shape(geometry, activations);
  const int64_t wide = shape.padded_wide();
  const int64_t channels = shape.in_channels;
  const int64_t pixels = shape.in_pixels();
  const float* gradient = wide_data("dpre", dpre, shape, pixels);
  const float* input = wide_data("z1", z1, shape, pixels);
  const float* first = float_data("coefficients", coefficients, 3 * wide);
  const float* const parts[3] = {first, first + wide, first + 2 * wide};
  const float* weights = float_data("weight", weight, shape.wide_channels * channels);
  const float* data = float_data("rows", rows, shape.images * pixels * panelled(channels));
  const float* factors = float_data("factor", factor, channels);
  const float* offsets = float_data("offset", offset, channels);
  const float* extra = float_data("addend", addend, shape.images * pixels * channels);
  const Tensor packed = pack_transposed_blocks(z1, shape, weights, channels);
  const Tensor dx = float_tensor(z1, {shape.images, shape.height, shape.width, channels});
  const auto compute = MOAT_KERNELS_DISPATCH(train_backward_expand_input);
  for_each_strip(z1, shape, pixels, channels, [&](const PixelRange& range, float* tiles) {
    compute(shape, range, gradient, input, parts, data_of(packed), data, factors, offsets, extra,
            tiles, data_of(dx));
  });
  return dx;
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_mbconv_moments", TORCH_BOX(&moat_kernels::cpu::moments));
  library.impl("cpu_mbconv_rows", TORCH_BOX(&moat_kernels::cpu::rows));
  library.impl("cpu_mbconv_expand", TORCH_BOX(&moat_kernels::cpu::expand));
  library.impl("cpu_mbconv_depthwise", TORCH_BOX(&moat_kernels::cpu::depthwise));
  library.impl("cpu_mbconv_pool", TORCH_BOX(&moat_kernels::cpu::pool));
  library.impl("cpu_mbconv_project", TORCH_BOX(&moat_kernels::cpu::project));
  library.impl("cpu_mbconv_backward_project", TORCH_BOX(&moat_kernels::cpu::backward_project));
  library.impl("cpu_mbconv_backward_gate", TORCH_BOX(&moat_kernels::cpu::backward_gate));
  library.impl("cpu_mbconv_backward_depthwise", TORCH_BOX(&moat_kernels::cpu::backward_depthwise));
  library.impl("cpu_mbconv_backward_expand_weight",
               TORCH_BOX(&moat_kernels::cpu::backward_expand_weight));
  library.impl("cpu_mbconv_backward_expand_input",
               TORCH_BOX(&moat_kernels::cpu::backward_expand_input));
}
