#pragma once

#include "cpu/common/mbconv_problem.h"
#include "cpu/common/norm_factors.h"
#include "cpu/common/per_isa.h"

namespace moat_kernels::cpu {

// Pixels that a pass of training takes at a time.
constexpr int64_t kTrainStripPixels = 128;

// The passes of training, each over a part of the tensors. Wide tensors and vectors of E
// coefficients are laid out as cpu/isa/wide.h says. Narrow maps are what the modules give, of any
// type, [pixels of all images][channels]; and what products read of them, in words
// (cpu/isa/product.h):
//   rows        [pixels][words of the panelled channels], along the channels
//   row pairs   [images][words of the pixels][panelled channels], along the pixels (pair_rows);
//               rows of float are their own
struct TrainShape {
  int64_t batch, height, width, out_height, out_width, stride, top, left;
  int64_t in_channels, wide_channels, out_channels;
  Activation expand_activation, depthwise_activation;
  Product product;  // float32 or bfloat16

  // Inlined always: one copy for all instruction sets would not do.
  [[gnu::always_inline]] int64_t in_pixels() const { return height * width; }
  [[gnu::always_inline]] int64_t out_pixels() const { return out_height * out_width; }
  [[gnu::always_inline]] int64_t blocks() const {
    return (wide_channels + kWideChannels - 1) / kWideChannels;
  }
  [[gnu::always_inline]] int64_t padded_wide() const { return blocks() * kWideChannels; }
};

// Pixels [first, last) of one image, at most kTrainStripPixels.
struct PixelRange {
  int64_t image, first, last;
};

// Blocks [first, last) of E channels.
struct Blocks {
  int64_t first, last;
};

// The memory of a wide tensor, or of some of its blocks: `blocks` of each image, from `first` on.
struct Wide {
  void* data;
  ElementType type;
  int64_t blocks, first;
};

// How dx is completed; see train_backward_expand_input.
struct InputEnd {
  const float* rows;
  const float* factor;
  const float* offset;
  Map addend;
  Map dx;
};

}  // namespace moat_kernels::cpu

MOAT_KERNELS_DECLARE_PER_ISA(
    // rows of `pixels` pixels of (x - shift) * scale from `first` on, zeros beyond `channels`;
    // sums[C] += rows. shift, sums may be null.
    void train_rows(Product product, const Map& x, int64_t first, int64_t pixels, int64_t channels,
                    const float* shift, float scale, float* rows, double* sums);
    // constants[i] = sum of weight[i] * shift, over rows of weight [rows][C].
    void train_constants(const float* weight, int64_t rows, int64_t channels, const float* shift,
                         double* constants);

    // z1 = rows W'^T for some blocks; sums[0][E] += z1, sums[1][E] += z1^2 (null: not wanted).
    void train_expand(const TrainShape& shape, const PixelRange& range, const Blocks& blocks,
                      const float* rows, const float* packed, float* scratch, const Wide& z1,
                      double* sums);
    // z2 = dw3x3(act(scale z1 + shift)) of one image and block; moments: mean [E] and sum of
    // squared deviations [E] over the image (null: not wanted).
    void train_depthwise(const TrainShape& shape, int64_t image, int64_t block, const Wide& z1,
                         const ScaleShift& norm, const float* weights, float* scratch,
                         const Wide& z2, double* moments);
    // means[E] of act(scale z2 + shift) over one image, for one block.
    void train_pool(const TrainShape& shape, int64_t image, int64_t block, const Wide& z2,
                    const ScaleShift& norm, float* scratch, float* means);
    // output = scale[image] ((gate * act(scale z2 + shift)) W2^T + bias) + addend; gate, bias,
    // addend and drop_path_scale may be null.
    void train_project(const TrainShape& shape, const PixelRange& range, const Wide& z2,
                       const ScaleShift& norm, const float* gate, const float* packed,
                       const float* bias, const float* drop_path_scale, const Map& addend,
                       float* scratch, const Map& output);

    // One block over the images [first, last): g = grad W2, and with y = scale z2 + shift,
    //   plain: dy2 = g act'(y);  sums: dy2, dy2 * z2;  grad_weight [kWideBlock][panelled C_out] =
    //   act(y)^T grad
    //   gated: dy2 = g;  grad_gate[image] += g act(y);  grad_weight of gate * act(y)
    void train_backward_project(const TrainShape& shape, int64_t block, int64_t first, int64_t last,
                                const float* grad_rows, const float* grad_pairs, const Wide& z2,
                                const ScaleShift& norm, const float* gate, const float* packed,
                                float* scratch, const Wide& dy2, float* grad_weight, double* sums,
                                float* grad_gate);
    // dy2 = (gate dy2 + grad_mean) act'(scale z2 + shift) in place, of one image and block; sums as
    // above, over the image.
    void train_backward_gate(const TrainShape& shape, int64_t image, int64_t block, const Wide& z2,
                             const ScaleShift& norm, const float* gate, const float* grad_mean,
                             float* scratch, const Wide& dy2, double* sums);
    // dz2 = a dy2 + b z2 + c; dpre = (transposed dw3x3 of dz2) act'(scale z1 + shift); sums: dpre,
    // dpre * z1; grad_weights [9][E]. One image and block.
    void train_backward_depthwise(const TrainShape& shape, int64_t image, int64_t block,
                                  const Wide& dy2, const Wide& z2, const Wide& z1,
                                  const Combination& factors, const ScaleShift& norm,
                                  const float* weights, float* scratch, const Wide& dpre,
                                  double* sums, double* grad_weights);
    // dz1 = a dpre + b z1 + c in place of dpre; grad_weight [kWideBlock][panelled C_in] = dz1^T
    // rows, given as pairs. One block over the images [first, last).
    void train_backward_expand_weight(const TrainShape& shape, int64_t block, int64_t first,
                                      int64_t last, const Wide& dpre, const Wide& z1,
                                      const Combination& factors, const float* pairs,
                                      float* scratch, float* grad_weight);
    // sums [panelled C_in] (+)= dz1 W' over some blocks and, if `end` is given,
    // dx = sums + factor * rows + offset + addend (may be null).
    void train_backward_expand_input(const TrainShape& shape, const PixelRange& range,
                                     const Blocks& blocks, const Wide& dz1, const float* packed,
                                     bool accumulate, float* sums, const InputEnd* end);

    // Partial sums [groups][columns], `stride` floats from one group to the next, added up for
    // `rows` rows of a weight's gradient.
    //   expand: p = sum; gradient [rows][C] = p * scale + constants * shift (null: 0);
    //   products[C] += p * weight;  totals[C] += constants * weight (constants null: not)
    void train_finish_expand_weight(const float* partial, int64_t groups, int64_t stride,
                                    int64_t rows, int64_t channels, const float* weight,
                                    const float* scale, const double* constants, const float* shift,
                                    float* gradient, double* products, double* totals);
    //   project: gradient [C][E] = sum transposed
    void train_finish_project_weight(const float* partial, int64_t groups, int64_t stride,
                                     int64_t rows, int64_t channels, float* gradient,
                                     int64_t gradient_stride);
    // Floats of scratch that any of the passes needs.
    int64_t train_scratch(const TrainShape& shape);)
