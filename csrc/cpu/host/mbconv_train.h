#pragma once

// What the ops of training share: their arguments, and the forward passes with the folding between
// them. All divisions of work depend on the shape only, and partial sums are added in the order of
// their index, so results do not depend on the number of threads.

#include <algorithm>
#include <memory>

#include "cpu/common/mbconv_train_kernels.h"
#include "cpu/common/pack_kernels.h"
#include "cpu/host/batch_norm.h"
#include "cpu/host/dispatch.h"
#include "cpu/host/parallel.h"
#include "cpu/host/recycled_memory.h"
#include "cpu/host/tensors.h"

namespace moat_kernels::cpu {

using Geometry = std::vector<int64_t>;
using Names = std::vector<std::string>;

// The last arguments of every op of training.
//   weights      expand [E, C_in], depthwise [E, 9], project [C_out, E], and their biases
//   norms        weight, bias, running mean and variance of the pre, expand and depthwise norm
//   eps, modes   of each norm; see NormMode
//   geometry     batch, height, width, out height, out width, stride, top, left, C_in, E, C_out
//   activations  expand, depthwise
struct TrainSettings {
  const OptionalTensors& weights;
  const OptionalTensors& norms;
  const std::vector<double>& eps;
  const std::vector<int64_t>& modes;
  const Geometry& geometry;
  const Names& activations;
};

enum TrainWeight {
  kTrainExpand,
  kTrainDepthwise,
  kTrainProject,
  kTrainExpandBias,
  kTrainDepthwiseBias,
  kTrainProjectBias,
  kTrainWeights
};
enum TrainNorm { kPreNorm, kExpandNorm, kDepthwiseNorm, kTrainNorms };

inline TrainShape read_shape(const Geometry& geometry, const Names& activations) {
  STD_TORCH_CHECK(geometry.size() == 11 && activations.size() == 2,
                  "geometry must be 11 numbers and activations 2 names, got ", geometry.size(),
                  " and ", activations.size());
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
  STD_TORCH_CHECK(shape.stride == 1 || shape.stride == 2, "stride must be 1 or 2, got ",
                  shape.stride);
  STD_TORCH_CHECK(shape.images > 0, "mbconv: training needs at least one image");
  constexpr int64_t kMost = int64_t{1} << 31;
  for (const int64_t size :
       {shape.images, shape.height, shape.width, shape.out_height, shape.out_width, shape.top + 1,
        shape.left + 1, shape.in_channels, shape.wide_channels, shape.out_channels}) {
    STD_TORCH_CHECK(size > 0 && size < kMost, "geometry must be of maps that are not empty, got ",
                    text_of(geometry.data(), geometry.size()));
  }
  // No product of sizes overflows.
  const double pixels = std::max(static_cast<double>(shape.height) * shape.width,
                                 static_cast<double>(shape.out_height) * shape.out_width);
  const double channels = static_cast<double>(std::max(shape.in_channels, shape.out_channels)) +
                          static_cast<double>(shape.padded_wide());
  STD_TORCH_CHECK(
      shape.images * pixels * channels < 0x1p50 && channels * shape.padded_wide() < 0x1p50,
      "geometry is of maps larger than any memory, got ",
      text_of(geometry.data(), geometry.size()));
  return shape;
}

inline int64_t panelled(int64_t columns) {
  return MOAT_KERNELS_DISPATCH(panelled_columns)(columns);
}

// Strips of each image: enough of them for threads to finish together, and none so short that
// reading the weights takes longer than using them.
inline int64_t strip_count(int64_t images, int64_t pixels) {
  constexpr int64_t kTasks = 32;
  constexpr int64_t kFewestPixels = 24;
  const int64_t fitting = (pixels + kTrainStripPixels - 1) / kTrainStripPixels;
  const int64_t wanted = std::min((kTasks + images - 1) / images, pixels / kFewestPixels);
  return std::max(fitting, wanted);
}

// Strips of all images in order.
inline PixelRange strip_at(int64_t index, int64_t strips, int64_t pixels) {
  const int64_t strip = index % strips;
  return {index / strips, pixels * strip / strips, pixels * (strip + 1) / strips};
}

// Blocks of E channels go through the passes in waves, so that the wide tensors between the passes
// of one wave stay in the last level of cache, and those that are not kept need no more memory.
inline int64_t wave_count(const TrainShape& shape) {
  constexpr int64_t kBytes = int64_t{8} << 20;
  const int64_t pixels = std::max(shape.in_pixels(), shape.out_pixels());
  const int64_t block = shape.images * pixels * kWideChannels * int64_t{sizeof(float)};
  const int64_t fitting = std::clamp<int64_t>(kBytes / block, 1, shape.blocks());
  return (shape.blocks() + fitting - 1) / fitting;
}

inline Blocks wave_at(const TrainShape& shape, int64_t index, int64_t waves) {
  return {shape.blocks() * index / waves, shape.blocks() * (index + 1) / waves};
}

inline int64_t widest_wave(const TrainShape& shape, int64_t waves) {
  return (shape.blocks() + waves - 1) / waves;
}

// One call: what is computed once, and scratch memory.
class TrainCall {
 public:
  TrainCall(const Tensor& like, const TrainSettings& settings);

  // Folds what `statistics` says, or measures x first and leaves room in it for the rest. mean and
  // variance of x, z1 and z2: [2 C_in + 4 E], float64.
  void prepare_input(const Tensor& x, double* statistics, bool measure);
  void expand(const Blocks& blocks, const Wide& z1, double* statistics, bool measure);
  void fold_expand(const Blocks& blocks, const double* statistics);
  void depthwise(const Blocks& blocks, const Wide& z1, const Wide& z2, double* statistics,
                 bool measure);
  void fold_depthwise(const Blocks& blocks, const double* statistics);

  // rows = (grad or x - mean) * scale, [pixels][panelled]; sums [channels]: of its columns, or
  // null.
  Tensor make_rows(const float* maps, int64_t pixels, int64_t channels, const float* shift,
                   const float* scales, float* sums) const;

  template <class Function>
  void for_each_plane(const Blocks& blocks, const Function& compute) const {
    const int64_t count = blocks.last - blocks.first;
    for_each_task(shape.images * count, workers, [&](int64_t index, int64_t worker) {
      compute(index / count, blocks.first + index % count, scratch_of(worker));
    });
  }
  template <class Function>
  void for_each_strip(int64_t pixels, const Function& compute) const {
    const int64_t strips = strip_count(shape.images, pixels);
    for_each_task(shape.images * strips, workers, [&](int64_t index, int64_t worker) {
      compute(strip_at(index, strips, pixels), scratch_of(worker));
    });
  }

  // The memory of a wide tensor of all blocks, and of one that holds the blocks of a wave at a
  // time.
  Tensor wide_tensor(int64_t pixels, ScalarType type) const;
  Wide wide_of(const char* name, const Tensor& tensor, int64_t pixels) const;
  // Of statistics, [statistics_size()] in float64.
  double* statistics_of(const Tensor& statistics) const;
  Tensor wave_buffer(int64_t pixels) const;
  Wide wave_of(const Tensor& buffer, const Blocks& blocks) const;

  float* scratch_of(int64_t worker) const { return data_of(scratch_) + worker * scratch_size_; }
  const float* weight(TrainWeight index) const { return weights_[index]; }
  bool measures() const {
    return pre.measured() || expand_affine.measured() || depthwise_affine.measured();
  }
  int64_t statistics_size() const { return 2 * shape.in_channels + 4 * shape.wide_channels; }
  ScaleShift expand_norm() const { return {expand_scale_.data(), expand_shift_.data()}; }
  ScaleShift depthwise_norm() const { return {depthwise_scale_.data(), depthwise_shift_.data()}; }

  const Tensor& like;
  TrainShape shape;
  int64_t workers, waves;
  NormTensors norms[kTrainNorms];
  Affine pre, expand_affine, depthwise_affine;
  std::vector<float> mean, pre_scale, pre_shift;  // of x, [C_in]
  std::vector<double> expand_constant;            // what z1 lacks: the convolution at the mean, [E]
  std::vector<float> taps;                        // [9][padded E]
  Tensor rows;                                    // x - mean

 private:
  const float* weights_[kTrainWeights];
  int64_t scratch_size_;
  Tensor scratch_, packed_expand_;
  std::vector<float> expand_scale_, expand_shift_, depthwise_scale_, depthwise_shift_;  // padded E
};

// Places in `statistics`.
inline double* input_statistics(const TrainShape&, double* statistics) { return statistics; }
inline double* expand_statistics(const TrainShape& shape, double* statistics) {
  return statistics + 2 * shape.in_channels;
}
inline double* depthwise_statistics(const TrainShape& shape, double* statistics) {
  return statistics + 2 * shape.in_channels + 2 * shape.wide_channels;
}

}  // namespace moat_kernels::cpu
