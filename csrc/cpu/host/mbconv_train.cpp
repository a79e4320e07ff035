// Training: what the ops share, and the ops of the forward pass.

#include "cpu/host/mbconv_train.h"

#include <torch/csrc/stable/library.h>

#include <iterator>
#include <tuple>

#include "cpu/host/dispatch.h"
#include "cpu/host/moments.h"

namespace moat_kernels::cpu {

namespace {

// Statistics of x and z1 are summed in at most so many parts, and the work is divided into about so
// many tasks, for threads to finish together.
constexpr int64_t kParts = 16;
constexpr int64_t kTasks = 64;

NormTensors read_train_norm(const char* name, const TrainSettings& settings, int64_t index,
                            int64_t channels) {
  NormTensors norm;
  STD_TORCH_CHECK(settings.modes[index] >= 0 && settings.modes[index] <= 2, name, ": unknown mode ",
                  settings.modes[index]);
  norm.mode = static_cast<NormMode>(settings.modes[index]);
  norm.weight = float_data(name, settings.norms[4 * index], {channels}, ".weight");
  norm.bias = float_data(name, settings.norms[4 * index + 1], {channels}, ".bias");
  norm.mean = float_data(name, settings.norms[4 * index + 2], {channels}, ".running_mean");
  norm.variance = float_data(name, settings.norms[4 * index + 3], {channels}, ".running_var");
  norm.eps = settings.eps[index];
  STD_TORCH_CHECK(norm.mode != NormMode::frozen || (norm.mean && norm.variance), name,
                  " is frozen but has no running statistics");
  return norm;
}

// Here, before memory of these sizes is taken.
void check_channels(const char* name, const std::optional<Tensor>& weight, int64_t axis,
                    int64_t channels) {
  const int64_t length = axis_of(name, weight, axis);
  STD_TORCH_CHECK(length == channels, "axis ", axis, " of ", name, " must be ", channels,
                  " as geometry says, got ", length);
}

TrainShape checked_shape(const TrainSettings& settings) {
  STD_TORCH_CHECK(settings.weights.size() == kTrainWeights &&
                      settings.norms.size() == 4 * kTrainNorms &&
                      settings.eps.size() == kTrainNorms && settings.modes.size() == kTrainNorms,
                  "mbconv: wrong number of tensors or settings");
  const TrainShape shape = read_shape(settings.geometry, settings.activations);
  check_channels("expand_weight", settings.weights[kTrainExpand], 0, shape.wide_channels);
  check_channels("expand_weight", settings.weights[kTrainExpand], 1, shape.in_channels);
  check_channels("depthwise_weight", settings.weights[kTrainDepthwise], 0, shape.wide_channels);
  check_channels("project_weight", settings.weights[kTrainProject], 0, shape.out_channels);
  return shape;
}

void store_scale(const Affine& affine, int64_t channel, std::vector<float>& scale,
                 std::vector<float>& shift) {
  scale[channel] = static_cast<float>(affine.scale(channel));
  shift[channel] = static_cast<float>(affine.shift(channel));
}

Blocks all_blocks(const TrainShape& shape) { return {0, shape.blocks()}; }

int64_t last_channel(const TrainShape& shape, const Blocks& blocks) {
  return std::min(blocks.last * kWideChannels, shape.wide_channels);
}

}  // namespace

TrainCall::TrainCall(const Tensor& like, const TrainSettings& settings)
    : like(like),
      shape(checked_shape(settings)),
      workers(thread_count()),
      waves(wave_count(shape)),
      norms{read_train_norm("pre_norm", settings, kPreNorm, shape.in_channels),
            read_train_norm("expand_norm", settings, kExpandNorm, shape.wide_channels),
            read_train_norm("depthwise_norm", settings, kDepthwiseNorm, shape.wide_channels)},
      pre(norms[kPreNorm], shape.in_channels),
      expand_affine(norms[kExpandNorm], shape.wide_channels),
      depthwise_affine(norms[kDepthwiseNorm], shape.wide_channels),
      mean(shape.in_channels),
      pre_scale(shape.in_channels),
      pre_shift(shape.in_channels),
      expand_constant(shape.wide_channels),
      taps(9 * shape.padded_wide()),
      scratch_size_(MOAT_KERNELS_DISPATCH(train_scratch)(shape)),
      scratch_(recycled_floats(like, {workers * scratch_size_})),
      expand_scale_(shape.padded_wide()),
      expand_shift_(shape.padded_wide()),
      depthwise_scale_(shape.padded_wide()),
      depthwise_shift_(shape.padded_wide()) {
  const OptionalTensors& given = settings.weights;
  weights_[kTrainExpand] =
      pointwise_data("expand_weight", given[kTrainExpand], shape.wide_channels, shape.in_channels);
  weights_[kTrainDepthwise] =
      float_data("depthwise_weight", given[kTrainDepthwise], {shape.wide_channels, 1, 3, 3});
  weights_[kTrainProject] = pointwise_data("project_weight", given[kTrainProject],
                                           shape.out_channels, shape.wide_channels);
  weights_[kTrainExpandBias] =
      float_data("expand_bias", given[kTrainExpandBias], {shape.wide_channels});
  weights_[kTrainDepthwiseBias] =
      float_data("depthwise_bias", given[kTrainDepthwiseBias], {shape.wide_channels});
  weights_[kTrainProjectBias] =
      float_data("project_bias", given[kTrainProjectBias], {shape.out_channels});
  for (int64_t channel = 0; channel < shape.wide_channels; ++channel) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      taps[tap * shape.padded_wide() + channel] = weights_[kTrainDepthwise][channel * 9 + tap];
    }
  }
}

Tensor TrainCall::wide_tensor(int64_t pixels, ScalarType type) const {
  return recycled_tensor(like, {shape.images, shape.blocks(), pixels, kWideChannels}, type);
}

Wide TrainCall::wide_of(const char* name, const Tensor& tensor, int64_t pixels) const {
  const ScalarType type = tensor.scalar_type();
  const ElementType element = element_type(name, type);
  const int64_t sizes[] = {shape.images, shape.blocks(), pixels, kWideChannels};
  checked_data(name, "", tensor, type, sizes, std::size(sizes));
  return {tensor.mutable_data_ptr(), element, shape.blocks(), 0};
}

double* TrainCall::statistics_of(const Tensor& statistics) const {
  return double_data("statistics", statistics, {statistics_size()});
}

Tensor TrainCall::wave_buffer(int64_t pixels) const {
  const int64_t blocks = widest_wave(shape, waves);
  return recycled_floats(like, {shape.images, blocks, pixels, kWideChannels});
}

Wide TrainCall::wave_of(const Tensor& buffer, const Blocks& blocks) const {
  return {data_of(buffer), ElementType::float32, blocks.last - blocks.first, blocks.first};
}

Tensor TrainCall::make_rows(const float* maps, int64_t pixels, int64_t channels, const float* shift,
                            const float* scales, float* sums) const {
  const int64_t columns = panelled(channels);
  const Tensor result = recycled_floats(like, {shape.images, pixels, columns});
  const int64_t strips = strip_count(shape.images, pixels);
  std::vector<double> parts(sums ? shape.images * strips * channels : 0);
  const auto convert = MOAT_KERNELS_DISPATCH(train_rows);
  for_each_task(shape.images * strips, workers, [&](int64_t index, int64_t) {
    const PixelRange range = strip_at(index, strips, pixels);
    const int64_t first = range.image * pixels + range.first;
    convert(maps + first * channels, range.last - range.first, channels, shift,
            scales ? scales[range.image] : 1.0f, data_of(result) + first * columns,
            sums ? parts.data() + index * channels : nullptr);
  });
  for (int64_t channel = 0; sums && channel < channels; ++channel) {
    double total = 0.0;
    for (int64_t index = 0; index < shape.images * strips; ++index) {
      total += parts[index * channels + channel];
    }
    sums[channel] = static_cast<float>(total);
  }
  return result;
}

void TrainCall::prepare_input(const Tensor& x, double* statistics, bool measure) {
  const int64_t channels = shape.in_channels;
  const int64_t pixels = shape.in_pixels();
  const float* data = float_data("x", x, {shape.images, shape.height, shape.width, channels});
  double* input = input_statistics(shape, statistics);
  // All pixels as one row: a few long parts for every thread.
  if (measure) measure_moments(data, shape.images * pixels, channels, kParts, workers, input);
  for (int64_t channel = 0; channel < channels; ++channel) {
    // Rows are what a float32 mean leaves, so everything else starts from that, too.
    mean[channel] = static_cast<float>(input[channel]);
    pre.fold(channel, 0.0, input[channels + channel], static_cast<double>(mean[channel]));
    store_scale(pre, channel, pre_scale, pre_shift);
  }
  rows = make_rows(data, pixels, channels, mean.data(), nullptr, nullptr);
  packed_expand_ = recycled_floats(like, {shape.padded_wide() * channels});
  const auto pack = MOAT_KERNELS_DISPATCH(pack_panels);
  const auto multiply = MOAT_KERNELS_DISPATCH(train_constants);
  for_each_task(shape.blocks(), workers, [&](int64_t block, int64_t) {
    const int64_t first = block * kWideChannels;
    const int64_t count = std::min(kWideChannels, shape.wide_channels - first);
    const float* part = weight(kTrainExpand) + first * channels;
    pack(part, channels, count, channels, pre_scale.data(),
         data_of(packed_expand_) + first * channels);
    multiply(part, count, channels, pre_shift.data(), expand_constant.data() + first);
  });
  const float* bias = weight(kTrainExpandBias);
  for (int64_t channel = 0; bias && channel < shape.wide_channels; ++channel) {
    expand_constant[channel] += static_cast<double>(bias[channel]);
  }
}

void TrainCall::expand(const Blocks& blocks, const Wide& z1, double* statistics, bool measure) {
  measure = measure && expand_affine.measured();
  const int64_t wide = shape.padded_wide();
  const int64_t strips = strip_count(shape.images, shape.in_pixels());
  const int64_t ranges = shape.images * strips;
  const int64_t parts = std::min(ranges, kParts);
  const int64_t count = blocks.last - blocks.first;
  const int64_t chunks = std::min((kTasks + parts - 1) / parts, count);
  std::vector<double> sums(measure ? parts * 2 * wide : 0);
  const auto compute = MOAT_KERNELS_DISPATCH(train_expand);
  for_each_task(parts * chunks, workers, [&](int64_t task, int64_t worker) {
    const int64_t part = task / chunks;
    const int64_t chunk = task % chunks;
    const Blocks some = {blocks.first + count * chunk / chunks,
                         blocks.first + count * (chunk + 1) / chunks};
    for (int64_t i = ranges * part / parts; i < ranges * (part + 1) / parts; ++i) {
      compute(shape, strip_at(i, strips, shape.in_pixels()), some, data_of(rows),
              data_of(packed_expand_), scratch_of(worker), z1,
              measure ? sums.data() + part * 2 * wide : nullptr);
    }
  });
  if (!measure) return;
  double* results = expand_statistics(shape, statistics);
  const double values = static_cast<double>(shape.images * shape.in_pixels());
  for (int64_t part = 1; part < parts; ++part) {
    const double* other = sums.data() + part * 2 * wide;
    for (int64_t i = 0; i < 2 * wide; ++i) sums[i] += other[i];
  }
  for (int64_t i = blocks.first * kWideChannels; i < last_channel(shape, blocks); ++i) {
    const double center = sums[i] / values;
    results[i] = center;
    results[shape.wide_channels + i] = std::max(sums[wide + i] / values - center * center, 0.0);
  }
}

void TrainCall::fold_expand(const Blocks& blocks, const double* statistics) {
  const double* moments = statistics + 2 * shape.in_channels;
  for (int64_t i = blocks.first * kWideChannels; i < last_channel(shape, blocks); ++i) {
    expand_affine.fold(i, moments[i], moments[shape.wide_channels + i], expand_constant[i]);
    store_scale(expand_affine, i, expand_scale_, expand_shift_);
  }
}

void TrainCall::depthwise(const Blocks& blocks, const Wide& z1, const Wide& z2, double* statistics,
                          bool measure) {
  measure = measure && depthwise_affine.measured();
  const int64_t wide = shape.padded_wide();
  std::vector<double> moments(measure ? shape.images * 2 * wide : 0);
  const auto compute = MOAT_KERNELS_DISPATCH(train_depthwise);
  for_each_plane(blocks, [&](int64_t image, int64_t block, float* scratch) {
    compute(shape, image, block, z1, expand_norm(), taps.data(), scratch, z2,
            measure ? moments.data() + image * 2 * wide : nullptr);
  });
  if (!measure) return;
  double* results = depthwise_statistics(shape, statistics);
  for (int64_t i = blocks.first * kWideChannels; i < last_channel(shape, blocks); ++i) {
    std::tie(results[i], results[shape.wide_channels + i]) = merge_moments(
        moments.data() + i, shape.images, wide, [&](int64_t) { return shape.out_pixels(); });
  }
}

void TrainCall::fold_depthwise(const Blocks& blocks, const double* statistics) {
  const double* moments = statistics + 2 * shape.in_channels + 2 * shape.wide_channels;
  const float* bias = weight(kTrainDepthwiseBias);
  for (int64_t i = blocks.first * kWideChannels; i < last_channel(shape, blocks); ++i) {
    depthwise_affine.fold(i, moments[i], moments[shape.wide_channels + i],
                          bias ? static_cast<double>(bias[i]) : 0.0);
    store_scale(depthwise_affine, i, depthwise_scale_, depthwise_shift_);
  }
}

namespace {

Tensor doubles(const Tensor& like, int64_t count) {
  return torch::stable::new_zeros(like, {count}, ScalarType::Double);
}

// What the running statistics take: `statistics` with the constants that z1 and z2 lack.
Tensor batch_moments(const TrainCall& call, const double* statistics) {
  const TrainShape& shape = call.shape;
  const Tensor result = recycled_floats(call.like, {call.statistics_size()});
  const double* wide = statistics + 2 * shape.in_channels;
  float* out = data_of(result);
  std::copy(statistics, statistics + call.statistics_size(), out);
  out += 2 * shape.in_channels;
  const float* bias = call.weight(kTrainDepthwiseBias);
  for (int64_t i = 0; i < shape.wide_channels; ++i) {
    const int64_t at = 2 * shape.wide_channels + i;
    out[i] = static_cast<float>(wide[i] + call.expand_constant[i]);
    if (bias) out[at] = static_cast<float>(wide[at] + static_cast<double>(bias[i]));
  }
  return result;
}

// From x to z2. -> z1 (empty unless kept), z2, statistics, batch_moments. With the statistics of an
// earlier call nothing is measured, and the last two are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> train_front(
    const Tensor& x, const std::optional<Tensor>& given, bool keep_z1, ScalarType type,
    const OptionalTensors& weights, const OptionalTensors& norms, const std::vector<double>& eps,
    const std::vector<int64_t>& modes, const Geometry& geometry, const Names& activations) {
  element_type("dtype", type);
  TrainCall call(x, {weights, norms, eps, modes, geometry, activations});
  const TrainShape& shape = call.shape;
  const Tensor statistics = given ? *given : doubles(x, call.statistics_size());
  double* values = call.statistics_of(statistics);
  const bool measure = !given;
  call.prepare_input(x, values, measure);
  const int64_t waves = call.waves;
  const Tensor z1 =
      keep_z1 ? call.wide_tensor(shape.in_pixels(), type) : call.wave_buffer(shape.in_pixels());
  const Tensor z2 = call.wide_tensor(shape.out_pixels(), type);
  const Wide output = call.wide_of("z2", z2, shape.out_pixels());
  for (int64_t wave = 0; wave < waves; ++wave) {
    const Blocks blocks = wave_at(shape, wave, waves);
    const Wide middle =
        keep_z1 ? call.wide_of("z1", z1, shape.in_pixels()) : call.wave_of(z1, blocks);
    call.expand(blocks, middle, values, measure);
    call.fold_expand(blocks, values);
    call.depthwise(blocks, middle, output, values, measure);
  }
  const Tensor nothing = recycled_floats(x, {0});
  if (given) return {keep_z1 ? z1 : nothing, z2, doubles(x, 0), nothing};
  return {keep_z1 ? z1 : nothing, z2, statistics, batch_moments(call, values)};
}

Tensor train_pool(const Tensor& z2, const Tensor& statistics, const OptionalTensors& weights,
                  const OptionalTensors& norms, const std::vector<double>& eps,
                  const std::vector<int64_t>& modes, const Geometry& geometry,
                  const Names& activations) {
  TrainCall call(z2, {weights, norms, eps, modes, geometry, activations});
  const TrainShape& shape = call.shape;
  const Wide in = call.wide_of("z2", z2, shape.out_pixels());
  call.fold_depthwise(all_blocks(shape), call.statistics_of(statistics));
  const int64_t wide = shape.padded_wide();
  const Tensor means = recycled_floats(z2, {shape.images, wide});
  const auto compute = MOAT_KERNELS_DISPATCH(train_pool);
  call.for_each_plane(all_blocks(shape), [&](int64_t image, int64_t block, float* scratch) {
    compute(shape, image, block, in, call.depthwise_norm(), scratch, data_of(means) + image * wide);
  });
  return means;
}

Tensor train_project(const Tensor& z2, const Tensor& statistics, const std::optional<Tensor>& gate,
                     const std::optional<Tensor>& drop_path_scale,
                     const std::optional<Tensor>& addend, const OptionalTensors& weights,
                     const OptionalTensors& norms, const std::vector<double>& eps,
                     const std::vector<int64_t>& modes, const Geometry& geometry,
                     const Names& activations) {
  TrainCall call(z2, {weights, norms, eps, modes, geometry, activations});
  const TrainShape& shape = call.shape;
  const int64_t pixels = shape.out_pixels();
  const int64_t channels = shape.out_channels;
  const Wide in = call.wide_of("z2", z2, pixels);
  call.fold_depthwise(all_blocks(shape), call.statistics_of(statistics));
  const float* gates = float_data("gate", gate, {shape.images, shape.padded_wide()});
  const float* keep = float_data("drop_path_scale", drop_path_scale, {shape.images});
  const float* extra =
      float_data("addend", addend, {shape.images, shape.out_height, shape.out_width, channels});
  const Tensor packed = recycled_floats(z2, {shape.padded_wide() * panelled(channels)});
  const auto pack = MOAT_KERNELS_DISPATCH(pack_panels);
  for_each_task(shape.blocks(), call.workers, [&](int64_t block, int64_t) {
    const int64_t first = block * kWideChannels;
    pack(call.weight(kTrainProject) + first, shape.wide_channels, channels,
         std::min(kWideChannels, shape.wide_channels - first), nullptr,
         data_of(packed) + first * panelled(channels));
  });
  const Tensor output =
      recycled_floats(z2, {shape.images, shape.out_height, shape.out_width, channels});
  const auto compute = MOAT_KERNELS_DISPATCH(train_project);
  call.for_each_strip(pixels, [&](const PixelRange& range, float* scratch) {
    compute(shape, range, in, call.depthwise_norm(), gates, data_of(packed),
            call.weight(kTrainProjectBias), keep, extra, scratch, data_of(output));
  });
  return output;
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_mbconv_train_front", TORCH_BOX(&moat_kernels::cpu::train_front));
  library.impl("cpu_mbconv_train_pool", TORCH_BOX(&moat_kernels::cpu::train_pool));
  library.impl("cpu_mbconv_train_project", TORCH_BOX(&moat_kernels::cpu::train_project));
}
