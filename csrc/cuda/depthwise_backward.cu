// With dz2 = slope dy2 + z2_slope z2 + constant inside the output map and 0 outside (the batch norm
// behind the convolution; without it dz2 = dy2), y1 = scale z1 + shift and h1 = act(y1):
//
//   dpre[b, y, x, e] = act'(y1) sum over taps of w[i, j, e] dz2[b, (y + top - i) / stride,
//                                                                  (x + left - j) / stride, e]
//   dw[i, j, e]      = sum over pixels of dz2[that pixel] h1[b, y, x, e]
//   sums of dpre and of dpre z1 over all pixels, for the norm before the activation
//
// DRAM: reads dy2, z2 (if given) and z1, writes dpre, each once (dy2's and z2's halo again, mostly
// from L2); 11 floats per channel and group of tiles. On chip: dz2 of a tile with its halo and the
// taps, in shared memory; the gradients of the taps and the sums in registers. Both gradients share
// the loads of dz2. dy2 and z2 are loaded 16 bytes at a time, z1 and dpre 4 channels at a time.

#include "cuda/backward_tile.cuh"

namespace moat_kernels::cuda {
namespace {

constexpr int kRun = 8;

template <class T, int stride>
struct BackwardShared {
  union {
    // 16 columns and one run of rows; 8 columns and two are no more.
    T dz2[(kRun + kReach<stride>)*(kSlots + kReach<stride>)][Layout<T>::kChunk];
    SharedGradients<T> gradients;
  };
  ChannelCoefficients<T> coefficients;
};

template <class T, int stride>
__global__ void __launch_bounds__(Layout<T>::kThreads, 512 / Layout<T>::kThreads)
    depthwise_backward_kernel(BackwardProblem problem, const T* z1, Prologue prologue) {
  using Tiles = Layout<T>;
  auto& shared = shared_memory<BackwardShared<T, stride>>();
  const DepthwiseShape& shape = problem.shape;
  const TileGrid& grid = problem.grid;
  const int chunks = (shape.channels + Tiles::kChunk - 1) / Tiles::kChunk;
  const int first_channel = blockIdx.x % chunks * Tiles::kChunk;
  const int64_t split = blockIdx.x / chunks;
  const int lane = threadIdx.x % Tiles::kLanes;
  const int slot = threadIdx.x / Tiles::kLanes;
  const int channel = first_channel + lane * kLaneChannels;
  load_channels(problem, prologue.scale, prologue.shift, first_channel, shared.coefficients);
  __syncthreads();

  Gradients gradients;
  const int64_t last = grid.tiles * (split + 1) / grid.splits;
  for (int64_t index = grid.tiles * split / grid.splits; index < last; ++index) {
    const Tile tile = tile_at(grid, index);
    load_dz2<T, stride>(problem, tile, first_channel, shared.coefficients, shared.dz2);
    __syncthreads();
    if (channel < shape.channels) {
      const int64_t image = tile.image * shape.height * shape.width;
      for_input_pixels<T, stride>(
          problem, tile, column_of(grid, tile, slot), lane, shared.dz2,
          [&](int py, int px, int y, int x, const auto& window) {
            const int64_t at = (image + int64_t{y} * shape.width + x) * shape.channels + channel;
            float z[kLaneChannels];
            to_floats(pack_at<T, kLaneChannels>(z1 + at), z);
            input_pixel<T, stride>(py, px, window, shared.coefficients, lane, prologue.activation,
                                   z, static_cast<T*>(problem.dpre) + at, gradients);
          });
    }
    __syncthreads();
  }
  write_gradients(gradients, shared.gradients, first_channel, shape.channels,
                  problem.partials + split * kGradientRows * shape.channels);
}

}  // namespace

int64_t depthwise_backward_partials(const DepthwiseShape& shape, Element type, int target_blocks) {
  return backward_grid(shape, type, kRun, target_blocks).splits;
}

int depthwise_backward(const DepthwiseShape& shape, Element type, const void* dy2,
                       NormBackward norm, const void* z1, Prologue prologue, const float* weights,
                       void* dpre, float* partials, int target_blocks, void* stream) {
  const BackwardProblem problem = {shape,
                                   backward_grid(shape, type, kRun, target_blocks),
                                   shape.top / shape.stride,
                                   shape.left / shape.stride,
                                   dy2,
                                   norm,
                                   weights,
                                   dpre,
                                   partials};
  return with_element(type, [&](auto element) {
    using T = decltype(element);
    const auto kernel =
        shape.stride == 1 ? &depthwise_backward_kernel<T, 1> : &depthwise_backward_kernel<T, 2>;
    return launch(kernel, problem.grid.splits * channel_chunks(shape.channels, type),
                  Layout<T>::kThreads, stream, problem, static_cast<const T*>(z1), prologue);
  });
}

}  // namespace moat_kernels::cuda
