#pragma once

// Launchers of the CUDA kernels: raw device pointers, sizes and a stream, no torch headers. They
// enqueue on `stream` (a cudaStream_t), neither wait nor allocate, and return a cudaError_t.
//
// Maps are NHWC, contiguous and 16-byte aligned; every count of channels is a multiple of
// channel_multiple(type). Vectors of channels and weights of the depthwise convolution ([9][E],
// taps by row) are float32. Null pointers mean what the comments say.

#include <cstdint>

namespace moat_kernels::cuda {

enum class Element { float32, bfloat16, float16 };
enum class Activation { identity, gelu };

struct DepthwiseShape {
  int64_t images;
  int height, width, out_height, out_width;
  int stride;     // 1 or 2
  int top, left;  // zero padding; what is below and to the right follows from the output's size
  int channels;   // E
};

// Channels that 16 bytes hold.
inline int channel_multiple(Element type) { return type == Element::float32 ? 4 : 8; }

// act(scale z + shift) of a stored z; null scale: 1, null shift: 0.
struct Prologue {
  const float* scale;
  const float* shift;
  Activation activation;
};

// act(value + bias) of a result; null bias: 0.
struct Epilogue {
  const float* bias;
  Activation activation;
};

// The most columns of a tile: with the halo's, 16 warps.
constexpr int kMostColumns = 14;

// How a stencil is divided: about so many blocks, of so many columns at most.
struct BlockPlan {
  int target_blocks;
  int columns;  // 1 .. kMostColumns
};

// Statistics leave a kernel as partial results in `partials`, one row per group of tiles, for
// another to add up in order. Which tiles form a group depends on the shape and the plan only, so
// results are the same in every run.
int64_t depthwise_forward_partials(const DepthwiseShape& shape, const BlockPlan& plan);
int64_t depthwise_backward_partials(const DepthwiseShape& shape, const BlockPlan& plan);

// Rows of E floats in one partial result: count, mean, squared deviations; taps' gradients, sums.
constexpr int kMomentRows = 3;
constexpr int kGradientRows = 11;

// z2 = epilogue of depthwise(act(scale z1 + shift)), zero padded after the activation.
// partials: [depthwise_forward_partials][kMomentRows][E] of z2 as stored, or null: not wanted.
int depthwise_forward(const DepthwiseShape& shape, Element type, const void* z1, Prologue prologue,
                      const float* weights, Epilogue epilogue, void* z2, float* partials,
                      const BlockPlan& plan, void* stream);

// dz2 = slope dy2 + z2_slope z2 + constant, three vectors of E; null z2: dz2 = dy2.
struct NormBackward {
  const void* z2;
  const float* slope;
  const float* z2_slope;
  const float* constant;
};

// With y1 = scale z1 + shift: dpre = (transposed depthwise of dz2) act'(y1).
// partials: [depthwise_backward_partials][kGradientRows][E]: the gradient of the weights, then the
// sums of dpre and of dpre z1 over all pixels.
int depthwise_backward(const DepthwiseShape& shape, Element type, const void* dy2,
                       NormBackward norm, const void* z1, Prologue prologue, const float* weights,
                       void* dpre, float* partials, const BlockPlan& plan, void* stream);

// z2 = epilogue of depthwise(act(x weight^T + bias)), `hidden` being act and bias; x
// [B,H,W,in_channels], weight [E][in_channels]; bfloat16 or float16.
int expand_depthwise(const DepthwiseShape& shape, int in_channels, Element type, const void* x,
                     const void* weight, Epilogue hidden, const float* depthwise_weights,
                     Epilogue epilogue, void* z2, void* stream);

// Mean and sum of squared deviations, [2][E], of `count` partial moments.
int finish_moments(const float* partials, int64_t count, int channels, float* moments,
                   void* stream);

}  // namespace moat_kernels::cuda
