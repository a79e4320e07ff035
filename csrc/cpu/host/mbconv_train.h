#pragma once

// What the ops of training share: their arguments, and the forward passes with the folding between
// them. All divisions of work depend on the shape only, and partial sums are added in the order of
// their index, so results do not depend on the number of threads.

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/common/mbconv_train_kernels.h"
#include "cpu/common/pack_kernels.h"
#include "cpu/host/batch_norm.h"
#include "cpu/host/dispatch.h"
#include "cpu/host/mbconv_arguments.h"
#include "cpu/host/parallel.h"
#include "cpu/host/recycled_memory.h"
#include "cpu/host/tensors.h"

namespace moat_kernels::cpu {

// What the ops of training are told beside BottleneckTensors; the border of the depthwise
// convolution at the bottom and on the right follows from the sizes.
struct TrainSettings : Fields {
  int64_t batch = 0, height = 0, width = 0, out_height = 0, out_width = 0;
  int64_t stride = 1, padding_top = 0, padding_left = 0;
  int64_t in_channels = 0, wide_channels = 0, out_channels = 0;
  std::string expand_activation, depthwise_activation;
  double pre_norm_eps = 0, expand_norm_eps = 0, depthwise_norm_eps = 0;
  std::string pre_norm_mode, expand_norm_mode, depthwise_norm_mode;  // see parse_mode
  // Of z1 and z2. In bfloat16, where the CPU multiplies it, so are all that products read and the
  // gradients of wide tensors; else these are in float32.
  ScalarType wide_dtype = ScalarType::Float;

  template <class Self, class Visit>
  static void visit(Self& self, const Visit& field) {
    field("batch", self.batch);
    field("height", self.height);
    field("width", self.width);
    field("out_height", self.out_height);
    field("out_width", self.out_width);
    field("stride", self.stride);
    field("padding_top", self.padding_top);
    field("padding_left", self.padding_left);
    field("in_channels", self.in_channels);
    field("wide_channels", self.wide_channels);
    field("out_channels", self.out_channels);
    field("expand_activation", self.expand_activation);
    field("depthwise_activation", self.depthwise_activation);
    field("pre_norm_eps", self.pre_norm_eps);
    field("expand_norm_eps", self.expand_norm_eps);
    field("depthwise_norm_eps", self.depthwise_norm_eps);
    field("pre_norm_mode", self.pre_norm_mode);
    field("expand_norm_mode", self.expand_norm_mode);
    field("depthwise_norm_mode", self.depthwise_norm_mode);
    field("wide_dtype", self.wide_dtype);
  }
};

// Null for biases that there are not.
struct TrainWeights {
  const float *expand, *depthwise, *project, *expand_bias, *depthwise_bias, *project_bias;
};

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
// of one wave stay in the last level of cache, and those that are not kept need no more memory. But
// every worker has a block of an image of its own, as far as there are any.
inline int64_t wave_count(const TrainShape& shape, int64_t workers) {
  constexpr int64_t kBytes = int64_t{8} << 20;
  const int64_t pixels = std::max(shape.in_pixels(), shape.out_pixels());
  const int64_t block =
      shape.batch * pixels * words_of(shape.product, kWideChannels) * int64_t{sizeof(float)};
  const int64_t busy = (workers + shape.batch - 1) / shape.batch;
  const int64_t fitting = std::clamp<int64_t>(std::max(kBytes / block, busy), 1, shape.blocks());
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
  TrainCall(const Tensor& like, const BottleneckTensors& tensors, const TrainSettings& settings);

  // Folds what `statistics` says, or writes those of x first and leaves room in it for the rest.
  // mean and variance of x, z1 and z2: [2 C_in + 4 E], float64. The mean of x is the batch's if
  // pre_norm or expand_norm measures it, else pre_norm's running one, or 0.
  void prepare_input(const Tensor& x, double* statistics, bool measure);
  void expand(const Blocks& blocks, const Wide& z1, double* statistics, bool measure);
  void fold_expand(const Blocks& blocks, const double* statistics);
  void depthwise(const Blocks& blocks, const Wide& z1, const Wide& z2, double* statistics,
                 bool measure);
  void fold_depthwise(const Blocks& blocks, const double* statistics);

  // Rows of (grad or x - mean) * scale; sums [channels]: of their columns, or null.
  Tensor make_rows(const Map& maps, int64_t pixels, int64_t channels, const float* shift,
                   const float* scales, float* sums) const;
  // Their row pairs, which may be the rows.
  Tensor pairs_of(const Tensor& rows, int64_t pixels, int64_t channels) const;

  template <class Function>
  void for_each_plane(const Blocks& blocks, const Function& compute) const {
    const int64_t count = blocks.last - blocks.first;
    for_each_task(shape.batch * count, workers, [&](int64_t index, int64_t worker) {
      compute(index / count, blocks.first + index % count, scratch_of(worker));
    });
  }
  template <class Function>
  void for_each_strip(int64_t pixels, const Function& compute) const {
    const int64_t strips = strip_count(shape.batch, pixels);
    for_each_task(shape.batch * strips, workers, [&](int64_t index, int64_t worker) {
      compute(strip_at(index, strips, pixels), scratch_of(worker));
    });
  }

  // The memory of a wide tensor of all blocks, and of one that holds the blocks of a wave at a
  // time, which has what products read.
  Tensor wide_tensor(int64_t pixels, ScalarType type) const;
  Wide wide_of(const char* name, const Tensor& tensor, int64_t pixels, ScalarType type) const;
  // Of statistics, [statistics_size()] in float64.
  double* statistics_of(const Tensor& statistics) const;
  Tensor wave_buffer(int64_t pixels) const;
  Wide wave_of(const Tensor& buffer, const Blocks& blocks) const;

  float* scratch_of(int64_t worker) const { return data_of(scratch_) + worker * scratch_size_; }
  bool measures() const {
    return pre.measured() || expand_affine.measured() || depthwise_affine.measured();
  }
  int64_t statistics_size() const { return 2 * shape.in_channels + 4 * shape.wide_channels; }
  ScaleShift expand_norm() const { return {expand_scale_.data(), expand_shift_.data()}; }
  ScaleShift depthwise_norm() const { return {depthwise_scale_.data(), depthwise_shift_.data()}; }

  int64_t words(int64_t elements) const { return words_of(shape.product, elements); }

  const Tensor& like;
  TrainShape shape;
  ScalarType wide_type;  // of z1 and z2
  int64_t workers, waves;
  TrainWeights weights;
  Affine pre, expand_affine, depthwise_affine;
  std::vector<float> mean, pre_scale, pre_shift;  // of x, [C_in]
  std::vector<double> expand_constant;            // what z1 lacks: the convolution at the mean, [E]
  std::vector<float> taps;                        // [9][padded E]
  Tensor rows;                                    // of x - mean

 private:
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
