// depthwise_backward without a stored z1: y1 = x W^T + bias is computed again, tile by tile, on
// tensor cores. With dz2 as there (of dy2 and z2) and h1 = act(y1):
//
//   dpre = act'(y1) (transposed depthwise of dz2), dw and the two sums likewise, with y1 for z1
//
// DRAM: reads dy2, z2 and (once; then from L2) x, writes dpre: three crossings by E-wide tensors,
// where a GEMM that stores z1 and depthwise_backward make five. On chip: up to 128 input pixels
// times 64 channels of E. The GEMM (expand_tile.cuh) needs no halo, so nothing is multiplied twice;
// y1, rounded to its type, and then dz2 with its halo take the place of the GEMM's operands in
// shared memory; the gradients of the taps and the sums stay in registers.

#include "cuda/backward_tile.cuh"
#include "cuda/expand_tile.cuh"

namespace moat_kernels::cuda {
namespace {

constexpr int kPixels = 128;

// Positions that a thread walks down: 16 of them beside each other, or two times 8, are 128 pixels.
template <int stride>
constexpr int kRun = stride == 1 ? 8 : 2;

template <class T, int stride>
struct RecomputedTile {
  T y1[kPixels][kPitch];
  // 16 columns and one run of rows, or 8 columns and two.
  T dz2[stride == 1 ? 180 : 51][Layout<T>::kChunk];
};

template <class T, int stride>
struct RecomputeShared {
  union {
    Stage<T, kPixels> stages[2];
    RecomputedTile<T, stride> tile;
    SharedGradients<T> gradients;
  };
  ChannelCoefficients<T> coefficients;
};

template <class T, int stride>
__global__ void __launch_bounds__(kThreads, 2)
    expand_depthwise_backward_kernel(BackwardProblem problem, ExpandProblem expand,
                                     Epilogue hidden) {
  static_assert(Layout<T>::kThreads == kThreads && Layout<T>::kChunk == kChannels);
  auto& shared = shared_memory<RecomputeShared<T, stride>>();
  const DepthwiseShape& shape = problem.shape;
  const TileGrid& grid = problem.grid;
  const int chunks = (shape.channels + kChannels - 1) / kChannels;
  const int first_channel = blockIdx.x % chunks * kChannels;
  const int64_t split = blockIdx.x / chunks;
  const int lane = threadIdx.x % Layout<T>::kLanes;
  const int slot = threadIdx.x / Layout<T>::kLanes;
  const int channel = first_channel + lane * kLaneChannels;
  load_channels<T>(problem, nullptr, nullptr, first_channel, shared.coefficients);

  Gradients gradients;
  const int64_t last = grid.tiles * (split + 1) / grid.splits;
  for (int64_t index = grid.tiles * split / grid.splits; index < last; ++index) {
    const Tile tile = tile_at(grid, index);
    const int64_t image = tile.image * shape.height * shape.width;
    const int width = tile.columns * stride;
    const auto offset_of = [&](int pixel) {
      const int y = (problem.first_row + tile.row) * stride - shape.top + pixel / width;
      const int x = (problem.first_column + tile.column) * stride - shape.left + pixel % width;
      const bool inside = y >= 0 && y < shape.height && x >= 0 && x < shape.width;
      return inside ? (image + int64_t{y} * shape.width + x) * expand.in_channels : int64_t{-1};
    };
    expand_tile(expand, Epilogue{hidden.bias, Activation::identity}, first_channel,
                tile.rows * stride * width, offset_of, shared.stages, shared.tile.y1);
    load_dz2<T, stride>(problem, tile, first_channel, shared.coefficients, shared.tile.dz2);
    __syncthreads();
    if (channel < shape.channels) {
      for_input_pixels<T, stride>(
          problem, tile, column_of(grid, tile, slot), lane, shared.tile.dz2,
          [&](int py, int px, int pixel, int y, int x, const auto& window) {
            const int64_t at = (image + int64_t{y} * shape.width + x) * shape.channels + channel;
            float y1[kLaneChannels];
            to_floats(pack_at<T, kLaneChannels>(&shared.tile.y1[pixel][lane * kLaneChannels]), y1);
            input_pixel<T, stride>(py, px, window, shared.coefficients, lane, hidden.activation, y1,
                                   static_cast<T*>(problem.dpre) + at, gradients);
          });
    }
    __syncthreads();
  }
  write_gradients(gradients, shared.gradients, first_channel, shape.channels,
                  problem.partials + split * kGradientRows * shape.channels);
}

TileGrid recompute_grid(const DepthwiseShape& shape, Element type, int target_blocks) {
  return backward_grid(shape, type, shape.stride == 1 ? kRun<1> : kRun<2>, target_blocks);
}

template <class T>
int launch_recompute(const BackwardProblem& problem, const ExpandProblem& expand, Epilogue hidden,
                     void* stream) {
  const DepthwiseShape& shape = problem.shape;
  const auto kernel = shape.stride == 1 ? &expand_depthwise_backward_kernel<T, 1>
                                        : &expand_depthwise_backward_kernel<T, 2>;
  return launch(kernel, problem.grid.splits * divide_up(shape.channels, kChannels), kThreads,
                stream, problem, expand, hidden);
}

}  // namespace

int64_t expand_depthwise_backward_partials(const DepthwiseShape& shape, Element type,
                                           int target_blocks) {
  return recompute_grid(shape, type, target_blocks).splits;
}

int expand_depthwise_backward(const DepthwiseShape& shape, int in_channels, Element type,
                              const void* dy2, NormBackward norm, const void* x, const void* weight,
                              Epilogue hidden, const float* depthwise_weights, void* dpre,
                              float* partials, int target_blocks, void* stream) {
  const BackwardProblem problem = {shape,
                                   recompute_grid(shape, type, target_blocks),
                                   shape.top / shape.stride,
                                   shape.left / shape.stride,
                                   dy2,
                                   norm,
                                   depthwise_weights,
                                   dpre,
                                   partials};
  const ExpandProblem expand = {x, weight, in_channels, shape.channels};
  if (type == Element::bfloat16) {
    return launch_recompute<__nv_bfloat16>(problem, expand, hidden, stream);
  }
  if (type == Element::float16) return launch_recompute<__half>(problem, expand, hidden, stream);
  return cudaErrorInvalidValue;
}

}  // namespace moat_kernels::cuda
