// Training: what the ops share, and the ops of the forward pass.

#include "cpu/host/mbconv_train.h"

#include <torch/csrc/stable/library.h>

#include <iterator>
#include <tuple>

#include "cpu/host/dispatch.h"
#include "cpu/host/moments.h"
#include "cpu/host/products.h"

namespace moat_kernels::cpu {

namespace {

// Statistics of x and z1 are summed in at most so many parts, and the work is divided into about so
// many tasks, for threads to finish together.
constexpr int64_t kParts = 16;
constexpr int64_t kTasks = 64;

NormMode parse_mode(const char* name, const std::string& mode) {
  if (mode == "absent") return NormMode::absent;
  if (mode == "frozen") return NormMode::frozen;
  STD_TORCH_CHECK(mode == "measured", name, "_mode must be absent, frozen or measured, got ", mode);
  return NormMode::measured;
}

TrainNorm read_train_norm(const char* name, const NormTensors& tensors, double eps,
                          const std::string& mode, int64_t channels) {
  TrainNorm norm;
  norm.mode = parse_mode(name, mode);
  norm.weight = float_data(name, tensors.weight, {channels}, "_weight");
  norm.bias = float_data(name, tensors.bias, {channels}, "_bias");
  norm.mean = float_data(name, tensors.running_mean, {channels}, "_running_mean");
  norm.variance = float_data(name, tensors.running_var, {channels}, "_running_var");
  norm.eps = eps;
  STD_TORCH_CHECK(norm.mode != NormMode::frozen || (norm.mean && norm.variance), name,
                  " is frozen but has no running statistics");
  return norm;
}

TrainShape read_shape(const TrainSettings& settings) {
  TrainShape shape;
  shape.batch = settings.batch;
  shape.height = settings.height;
  shape.width = settings.width;
  shape.out_height = settings.out_height;
  shape.out_width = settings.out_width;
  shape.stride = settings.stride;
  shape.top = settings.padding_top;
  shape.left = settings.padding_left;
  shape.in_channels = settings.in_channels;
  shape.wide_channels = settings.wide_channels;
  shape.out_channels = settings.out_channels;
  shape.expand_activation = parse_activation(settings.expand_activation);
  shape.depthwise_activation = parse_activation(settings.depthwise_activation);
  element_type("wide_dtype", settings.wide_dtype);
  shape.product = product_of(settings.wide_dtype);
  STD_TORCH_CHECK(shape.stride == 1 || shape.stride == 2, "stride must be 1 or 2, got ",
                  shape.stride);
  STD_TORCH_CHECK(shape.batch > 0, "mbconv: training needs at least one image");
  constexpr int64_t kMost = int64_t{1} << 31;
  const auto check_size = [](const char* name, int64_t size, int64_t least) {
    STD_TORCH_CHECK(size >= least && size < kMost, name, " must be from ", least,
                    " to 2^31 - 1, got ", size);
  };
  check_size("batch", shape.batch, 1);
  check_size("height", shape.height, 1);
  check_size("width", shape.width, 1);
  check_size("out_height", shape.out_height, 1);
  check_size("out_width", shape.out_width, 1);
  check_size("padding_top", shape.top, 0);
  check_size("padding_left", shape.left, 0);
  check_size("in_channels", shape.in_channels, 1);
  check_size("wide_channels", shape.wide_channels, 1);
  check_size("out_channels", shape.out_channels, 1);
  // No product of sizes overflows.
  const double pixels = std::max(static_cast<double>(shape.height) * shape.width,
                                 static_cast<double>(shape.out_height) * shape.out_width);
  const double channels = static_cast<double>(std::max(shape.in_channels, shape.out_channels)) +
                          static_cast<double>(shape.padded_wide());
  STD_TORCH_CHECK(
      shape.batch * pixels * channels < 0x1p50 && channels * shape.padded_wide() < 0x1p50,
      "maps are larger than any memory: ", shape.batch, " images of ", pixels, " pixels with ",
      channels, " channels");
  return shape;
}

// Here, before memory of these sizes is taken.
void check_channels(const char* name, const std::optional<Tensor>& weight, int64_t axis,
                    const char* size_name, int64_t size) {
  const int64_t length = axis_of(name, weight, axis);
  STD_TORCH_CHECK(length == size, "axis ", axis, " of ", name, " must be ", size, " as ", size_name,
                  " says, got ", length);
}

TrainShape checked_shape(const BottleneckTensors& tensors, const TrainSettings& settings) {
  const TrainShape shape = read_shape(settings);
  check_channels("expand_weight", tensors.expand_weight, 0, "wide_channels", shape.wide_channels);
  check_channels("expand_weight", tensors.expand_weight, 1, "in_channels", shape.in_channels);
  check_channels("depthwise_weight", tensors.depthwise_weight, 0, "wide_channels",
                 shape.wide_channels);
  check_channels("project_weight", tensors.project_weight, 0, "out_channels", shape.out_channels);
  return shape;
}

TrainWeights read_weights(const BottleneckTensors& tensors, const TrainShape& shape) {
  const int64_t in = shape.in_channels;
  const int64_t wide = shape.wide_channels;
  const int64_t out = shape.out_channels;
  TrainWeights weights;
  weights.expand = pointwise_data("expand_weight", tensors.expand_weight, wide, in);
  weights.depthwise = float_data("depthwise_weight", tensors.depthwise_weight, {wide, 1, 3, 3});
  weights.project = pointwise_data("project_weight", tensors.project_weight, out, wide);
  weights.expand_bias = float_data("expand_bias", tensors.expand_bias, {wide});
  weights.depthwise_bias = float_data("depthwise_bias", tensors.depthwise_bias, {wide});
  weights.project_bias = float_data("project_bias", tensors.project_bias, {out});
  return weights;
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

TrainCall::TrainCall(const Tensor& like, const BottleneckTensors& tensors,
                     const TrainSettings& settings)
    : like(like),
      shape(checked_shape(tensors, settings)),
      wide_type(settings.wide_dtype),
      workers(thread_count()),
      waves(wave_count(shape, workers)),
      weights(read_weights(tensors, shape)),
      pre(read_train_norm("pre_norm", tensors.pre_norm, settings.pre_norm_eps,
                          settings.pre_norm_mode, shape.in_channels),
          shape.in_channels),
      expand_affine(read_train_norm("expand_norm", tensors.expand_norm, settings.expand_norm_eps,
                                    settings.expand_norm_mode, shape.wide_channels),
                    shape.wide_channels),
      depthwise_affine(
          read_train_norm("depthwise_norm", tensors.depthwise_norm, settings.depthwise_norm_eps,
                          settings.depthwise_norm_mode, shape.wide_channels),
          shape.wide_channels),
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
  for (int64_t channel = 0; channel < shape.wide_channels; ++channel) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      taps[tap * shape.padded_wide() + channel] = weights.depthwise[channel * 9 + tap];
    }
  }
}

Tensor TrainCall::wide_tensor(int64_t pixels, ScalarType type) const {
  return recycled_tensor(like, {shape.batch, shape.blocks(), pixels, kWideChannels}, type);
}

Wide TrainCall::wide_of(const char* name, const Tensor& tensor, int64_t pixels,
                        ScalarType type) const {
  const int64_t sizes[] = {shape.batch, shape.blocks(), pixels, kWideChannels};
  checked_data(name, "", tensor, type, sizes, std::size(sizes));
  return {tensor.mutable_data_ptr(), element_type(name, type), shape.blocks(), 0};
}

double* TrainCall::statistics_of(const Tensor& statistics) const {
  return double_data("statistics", statistics, {statistics_size()});
}

Tensor TrainCall::wave_buffer(int64_t pixels) const {
  const int64_t blocks = widest_wave(shape, waves);
  return recycled_tensor(like, {shape.batch, blocks, pixels, kWideChannels},
                         operand_type(shape.product));
}

Wide TrainCall::wave_of(const Tensor& buffer, const Blocks& blocks) const {
  return {buffer.mutable_data_ptr(), element_type("buffer", operand_type(shape.product)),
          blocks.last - blocks.first, blocks.first};
}

Tensor TrainCall::make_rows(const Map& maps, int64_t pixels, int64_t channels, const float* shift,
                            const float* scales, float* sums) const {
  const int64_t columns = words(panelled(channels));
  const Tensor result = recycled_floats(like, {shape.batch, pixels, columns});
  const int64_t strips = strip_count(shape.batch, pixels);
  std::vector<double> parts(sums ? shape.batch * strips * channels : 0);
  const auto convert = MOAT_KERNELS_DISPATCH(train_rows);
  for_each_task(shape.batch * strips, workers, [&](int64_t index, int64_t) {
    const PixelRange range = strip_at(index, strips, pixels);
    const int64_t first = range.image * pixels + range.first;
    convert(shape.product, maps, first, range.last - range.first, channels, shift,
            scales ? scales[range.image] : 1.0f, data_of(result) + first * columns,
            sums ? parts.data() + index * channels : nullptr);
  });
  for (int64_t channel = 0; sums && channel < channels; ++channel) {
    double total = 0.0;
    for (int64_t index = 0; index < shape.batch * strips; ++index) {
      total += parts[index * channels + channel];
    }
    sums[channel] = static_cast<float>(total);
  }
  return result;
}

Tensor TrainCall::pairs_of(const Tensor& rows, int64_t pixels, int64_t channels) const {
  if (shape.product == Product::float32) return rows;
  const int64_t columns = panelled(channels);
  const Tensor pairs = recycled_floats(like, {shape.batch, words(pixels), columns});
  constexpr int64_t kPixels = 64;  // of a task: whole words
  const int64_t parts = (pixels + kPixels - 1) / kPixels;
  const auto convert = MOAT_KERNELS_DISPATCH(pair_rows);
  for_each_task(shape.batch * parts, workers, [&](int64_t index, int64_t) {
    const int64_t image = index / parts;
    const int64_t first = index % parts * kPixels;
    convert(data_of(rows) + (image * pixels + first) * words(columns),
            std::min(kPixels, pixels - first), columns,
            data_of(pairs) + (image * words(pixels) + words(first)) * columns);
  });
  return pairs;
}

void TrainCall::prepare_input(const Tensor& x, double* statistics, bool measure) {
  const int64_t channels = shape.in_channels;
  const int64_t pixels = shape.in_pixels();
  const Map data = map_data("x", x, {shape.batch, shape.height, shape.width, channels});
  double* input = input_statistics(shape, statistics);
  if (measure && (pre.measured() || expand_affine.measured())) {
    // All pixels as one row: a few long parts for every thread.
    measure_moments(data.data, data.type, shape.batch * pixels, channels, kParts, workers, input);
  } else if (measure) {
    // With fixed statistics no image may have a part in another's result.
    for (int64_t channel = 0; channel < channels; ++channel) {
      input[channel] = pre.fixed_mean(channel);
    }
  }
  for (int64_t channel = 0; channel < channels; ++channel) {
    // Rows are what a float32 mean leaves, so everything else starts from that, too.
    mean[channel] = static_cast<float>(input[channel]);
    pre.fold(channel, 0.0, input[channels + channel], static_cast<double>(mean[channel]));
    store_scale(pre, channel, pre_scale, pre_shift);
  }
  rows = make_rows(data, pixels, channels, mean.data(), nullptr, nullptr);
  packed_expand_ = recycled_floats(like, {shape.padded_wide() * words(channels)});
  const auto pack = MOAT_KERNELS_DISPATCH(pack_panels);
  const auto multiply = MOAT_KERNELS_DISPATCH(train_constants);
  for_each_task(shape.blocks(), workers, [&](int64_t block, int64_t) {
    const int64_t first = block * kWideChannels;
    const int64_t count = std::min(kWideChannels, shape.wide_channels - first);
    const float* part = weights.expand + first * channels;
    pack(shape.product, part, channels, count, channels, pre_scale.data(),
         data_of(packed_expand_) + first * words(channels));
    multiply(part, count, channels, pre_shift.data(), expand_constant.data() + first);
  });
  const float* bias = weights.expand_bias;
  for (int64_t channel = 0; bias && channel < shape.wide_channels; ++channel) {
    expand_constant[channel] += static_cast<double>(bias[channel]);
  }
}

void TrainCall::expand(const Blocks& blocks, const Wide& z1, double* statistics, bool measure) {
  measure = measure && expand_affine.measured();
  const int64_t wide = shape.padded_wide();
  const int64_t strips = strip_count(shape.batch, shape.in_pixels());
  const int64_t ranges = shape.batch * strips;
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
  const double values = static_cast<double>(shape.batch * shape.in_pixels());
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
  std::vector<double> moments(measure ? shape.batch * 2 * wide : 0);
  const auto compute = MOAT_KERNELS_DISPATCH(train_depthwise);
  for_each_plane(blocks, [&](int64_t image, int64_t block, float* scratch) {
    compute(shape, image, block, z1, expand_norm(), taps.data(), scratch, z2,
            measure ? moments.data() + image * 2 * wide : nullptr);
  });
  if (!measure) return;
  double* results = depthwise_statistics(shape, statistics);
  for (int64_t i = blocks.first * kWideChannels; i < last_channel(shape, blocks); ++i) {
    std::tie(results[i], results[shape.wide_channels + i]) = merge_moments(
        moments.data() + i, shape.batch, wide, [&](int64_t) { return shape.out_pixels(); });
  }
}

void TrainCall::fold_depthwise(const Blocks& blocks, const double* statistics) {
  const double* moments = statistics + 2 * shape.in_channels + 2 * shape.wide_channels;
  const float* bias = weights.depthwise_bias;
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
  const float* bias = call.weights.depthwise_bias;
  for (int64_t i = 0; i < shape.wide_channels; ++i) {
    const int64_t at = 2 * shape.wide_channels + i;
    out[i] = static_cast<float>(wide[i] + call.expand_constant[i]);
    if (bias) out[at] = static_cast<float>(wide[at] + static_cast<double>(bias[i]));
  }
  return result;
}

// From x to z2. -> z1 (empty unless kept), z2, statistics, batch_moments. With the statistics of an
// earlier call nothing is measured, and the last two are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> train_front(const Tensor& x,
                                                       const std::optional<Tensor>& given,
                                                       bool keep_z1,
                                                       const BottleneckTensors& tensors,
                                                       const TrainSettings& settings) {
  TrainCall call(x, tensors, settings);
  const TrainShape& shape = call.shape;
  const Tensor statistics = given ? *given : doubles(x, call.statistics_size());
  double* values = call.statistics_of(statistics);
  const bool measure = !given;
  call.prepare_input(x, values, measure);
  const int64_t waves = call.waves;
  const Tensor z1 = keep_z1 ? call.wide_tensor(shape.in_pixels(), call.wide_type)
                            : call.wave_buffer(shape.in_pixels());
  const Tensor z2 = call.wide_tensor(shape.out_pixels(), call.wide_type);
  const Wide output = call.wide_of("z2", z2, shape.out_pixels(), call.wide_type);
  for (int64_t wave = 0; wave < waves; ++wave) {
    const Blocks blocks = wave_at(shape, wave, waves);
    const Wide middle = keep_z1 ? call.wide_of("z1", z1, shape.in_pixels(), call.wide_type)
                                : call.wave_of(z1, blocks);
    call.expand(blocks, middle, values, measure);
    call.fold_expand(blocks, values);
    call.depthwise(blocks, middle, output, values, measure);
  }
  const Tensor nothing = recycled_floats(x, {0});
  if (given) return {keep_z1 ? z1 : nothing, z2, doubles(x, 0), nothing};
  return {keep_z1 ? z1 : nothing, z2, statistics, batch_moments(call, values)};
}

Tensor train_pool(const Tensor& z2, const Tensor& statistics, const BottleneckTensors& tensors,
                  const TrainSettings& settings) {
  TrainCall call(z2, tensors, settings);
  const TrainShape& shape = call.shape;
  const Wide in = call.wide_of("z2", z2, shape.out_pixels(), call.wide_type);
  call.fold_depthwise(all_blocks(shape), call.statistics_of(statistics));
  const int64_t wide = shape.padded_wide();
  const Tensor means = recycled_floats(z2, {shape.batch, wide});
  const auto compute = MOAT_KERNELS_DISPATCH(train_pool);
  call.for_each_plane(all_blocks(shape), [&](int64_t image, int64_t block, float* scratch) {
    compute(shape, image, block, in, call.depthwise_norm(), scratch, data_of(means) + image * wide);
  });
  return means;
}

Tensor train_project(const Tensor& z2, const Tensor& statistics, const std::optional<Tensor>& gate,
                     const std::optional<Tensor>& drop_path_scale,
                     const std::optional<Tensor>& addend, ScalarType dtype,
                     const BottleneckTensors& tensors, const TrainSettings& settings) {
  const ElementType type = element_type("dtype", dtype);
  TrainCall call(z2, tensors, settings);
  const TrainShape& shape = call.shape;
  const int64_t pixels = shape.out_pixels();
  const int64_t channels = shape.out_channels;
  const Wide in = call.wide_of("z2", z2, pixels, call.wide_type);
  call.fold_depthwise(all_blocks(shape), call.statistics_of(statistics));
  const float* gates = float_data("gate", gate, {shape.batch, shape.padded_wide()});
  const float* keep = float_data("drop_path_scale", drop_path_scale, {shape.batch});
  const std::vector<int64_t> sizes = {shape.batch, shape.out_height, shape.out_width, channels};
  const Map extra = map_data("addend", addend, sizes);
  const Tensor packed = recycled_floats(z2, {call.words(shape.padded_wide()) * panelled(channels)});
  const auto pack = MOAT_KERNELS_DISPATCH(pack_panels);
  for_each_task(shape.blocks(), call.workers, [&](int64_t block, int64_t) {
    const int64_t first = block * kWideChannels;
    pack(shape.product, call.weights.project + first, shape.wide_channels, channels,
         std::min(kWideChannels, shape.wide_channels - first), nullptr,
         data_of(packed) + call.words(first) * panelled(channels));
  });
  const Tensor output = recycled_tensor(z2, sizes, dtype);
  const Map out = {output.mutable_data_ptr(), type};
  const auto compute = MOAT_KERNELS_DISPATCH(train_project);
  call.for_each_strip(pixels, [&](const PixelRange& range, float* scratch) {
    compute(shape, range, in, call.depthwise_norm(), gates, data_of(packed),
            call.weights.project_bias, keep, extra, scratch, out);
  });
  return output;
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_mbconv_train_front", moat_kernels::boxed<&moat_kernels::cpu::train_front>);
  library.impl("cpu_mbconv_train_pool", moat_kernels::boxed<&moat_kernels::cpu::train_pool>);
  library.impl("cpu_mbconv_train_project", moat_kernels::boxed<&moat_kernels::cpu::train_project>);
}
