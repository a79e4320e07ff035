#pragma once

#include "cpu/isa.h"
#include "cpu/mbconv_problem.h"

namespace moat_kernels::cpu {

// The passes of training, each over a part of the tensors. Wide tensors and vectors of E
// coefficients are laid out as cpu/wide.h says; rows are [pixels of all images][panelled channels].
struct TrainShape {
  int64_t images, height, width, out_height, out_width, stride, top, left;
  int64_t in_channels, wide_channels, out_channels;
  Activation expand_activation, depthwise_activation;

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

}  // namespace moat_kernels::cpu

MOAT_KERNELS_DECLARE_PER_ISA(
    int64_t train_panelled(int64_t columns);
    // Mean [C] and sum of squared deviations [C] of x [pixels][C].
    void train_moments(const float* x, int64_t pixels, int64_t channels, double* moments);
    // rows = (x - shift) * scale, zeros beyond `channels`; shift may be null.
    void train_rows(const float* x, int64_t pixels, int64_t channels, const float* shift,
                    float scale, float* rows);
    // weight [columns][depth] or, transposed, [depth][columns] -> panels of [depth][kPanel].
    void train_pack(const float* weight, int64_t stride, int64_t columns, int64_t depth,
                    float* packed);
    void train_pack_transposed(const float* weight, int64_t stride, int64_t columns, int64_t depth,
                               float* packed);

    // z1 = rows W'^T; sums[0][E] += z1, sums[1][E] += z1^2 (null: not wanted).
    void train_expand(const TrainShape& shape, const PixelRange& range, const float* rows,
                      const float* packed, float* z1, double* sums);
    // z2 = dw3x3(act(scale z1 + shift)) of one image and block; moments: mean [E] and sum of
    // squared deviations [E] over the image.
    int64_t train_stencil_scratch(const TrainShape& shape);
    void train_depthwise(const TrainShape& shape, int64_t image, int64_t block, const float* z1,
                         const float* scale, const float* shift, const float* weights,
                         float* scratch, float* z2, double* moments);
    // means[E] of act(scale z2 + shift) over one image, for one block.
    void train_pool(const TrainShape& shape, int64_t image, int64_t block, const float* z2,
                    const float* scale, const float* shift, float* means);
    // output = scale[image] ((gate * act(scale z2 + shift)) W2^T + bias) + addend; gate, bias,
    // addend and drop_path_scale may be null. tiles: two of kTrainStripPixels.
    void train_project(const TrainShape& shape, const PixelRange& range, const float* z2,
                       const float* scale, const float* shift, const float* gate,
                       const float* packed, const float* bias, const float* drop_path_scale,
                       const float* addend, float* tiles, float* output);

    // One block over the images [first, last): g = grad W2, and with y = scale z2 + shift,
    //   plain: dy2 = g act'(y);  sums: dy2, dy2 * z2;  grad_weight [kWideBlock][panelled C_out] =
    //   act(y)^T grad
    //   gated: dy2 = g;  grad_gate[image] = sum of g act(y);  grad_weight of gate * act(y)
    void train_backward_project(const TrainShape& shape, int64_t block, int64_t first, int64_t last,
                                const float* grad_rows, const float* z2, const float* scale,
                                const float* shift, const float* gate, const float* packed,
                                float* tiles, float* dy2, float* grad_weight, double* sums,
                                float* grad_gate);
    // dy2 = (gate dy2 + grad_mean) act'(scale z2 + shift) in place, of one image and block; sums as
    // above, over the image.
    void train_backward_gate(const TrainShape& shape, int64_t image, int64_t block, const float* z2,
                             const float* scale, const float* shift, const float* gate,
                             const float* grad_mean, float* dy2, double* sums);
    // dz2 = a dy2 + b z2 + c; dpre = (transposed dw3x3 of dz2) act'(scale z1 + shift); sums: dpre,
    // dpre * z1; grad_weights [9][E]. One image and block. coefficients: a, b, c, scale, shift.
    void train_backward_depthwise(const TrainShape& shape, int64_t image, int64_t block,
                                  const float* dy2, const float* z2, const float* z1,
                                  const float* const coefficients[5], const float* weights,
                                  float* scratch, float* dpre, double* sums, double* grad_weights);
    // grad_weight [kWideBlock][panelled C_in] = (a dpre + b z1 + c)^T rows, one block over images.
    void train_backward_expand_weight(const TrainShape& shape, int64_t block, int64_t first,
                                      int64_t last, const float* dpre, const float* z1,
                                      const float* const coefficients[3], const float* rows,
                                      float* tile, float* grad_weight);
    // dx = (a dpre + b z1 + c) W' + factor * rows + offset + addend (may be null).
    void train_backward_expand_input(const TrainShape& shape, const PixelRange& range,
                                     const float* dpre, const float* z1,
                                     const float* const coefficients[3], const float* packed,
                                     const float* rows, const float* factor, const float* offset,
                                     const float* addend, float* tile, float* dx);)
