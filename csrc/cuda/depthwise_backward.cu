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
//
// A thread owns the stride x stride input pixels that begin at one position of the output's grid:
// together they meet each of the nine taps once, so stride 2 wastes nothing and does not diverge.

#include "cuda/activation.cuh"
#include "cuda/tile.cuh"

namespace moat_kernels::cuda {
namespace {

constexpr int kRun = 8;

// How far above and left of a position its taps reach in the output.
template <int stride>
constexpr int kReach = stride == 1 ? 2 : 1;

template <class T>
struct SharedGradients {
  float values[Layout<T>::kThreads / 32][kGradientRows][Layout<T>::kChunk];
};

template <class T, int stride>
struct alignas(16) BackwardShared {
  union {
    // 16 columns and one run of rows; 8 columns and two are no more.
    T tile[(kRun + kReach<stride>)*(kSlots + kReach<stride>)][Layout<T>::kChunk];
    SharedGradients<T> gradients;
  };
  // Beside 36 gradients, 36 taps would leave too few registers for two blocks to fit.
  float taps[kTaps][Layout<T>::kChunk];
};

struct BackwardArguments {
  DepthwiseShape shape;
  TileGrid grid;
  int first_row, first_column;  // of the grid of positions
  const void* dy2;
  NormBackward norm;
  const void* z1;
  Prologue prologue;
  const float* weights;
  void* dpre;
  float* partials;
};

// Fills the shared tile with dz2 and zeros; a thread always takes the same channels of a pixel.
template <class T, int stride>
__device__ __forceinline__ void load_tile(const BackwardArguments& arguments, const Tile& tile,
                                          int first_channel, BackwardShared<T, stride>& shared) {
  constexpr int kVectors = Layout<T>::kVectors;
  const DepthwiseShape& shape = arguments.shape;
  const NormBackward& norm = arguments.norm;
  const int vector = threadIdx.x % kVectors;
  const int channel = first_channel + vector * kVector<T>;
  float slope[kVector<T>], z2_slope[kVector<T>], constant[kVector<T>];
  if (norm.z2) {
    load_coefficients(norm.slope, channel, shape.channels, 1.0f, slope);
    load_coefficients(norm.z2_slope, channel, shape.channels, 0.0f, z2_slope);
    load_coefficients(norm.constant, channel, shape.channels, 0.0f, constant);
  }
  const int width = tile.columns + kReach<stride>;
  const int pixels = (tile.rows + kReach<stride>)*width;
  const int top = arguments.first_row + tile.row - kReach<stride>;
  const int left = arguments.first_column + tile.column - kReach<stride>;
  const int64_t image = tile.image * shape.out_height * shape.out_width * shape.channels + channel;
#pragma unroll 2
  for (int pixel = threadIdx.x / kVectors; pixel < pixels;
       pixel += Layout<T>::kThreads / kVectors) {
    const int y = top + pixel / width;
    const int x = left + pixel % width;
    auto values = zero_pack<T, kVector<T>>();
    if (y >= 0 && y < shape.out_height && x >= 0 && x < shape.out_width &&
        channel < shape.channels) {
      const int64_t at = image + (int64_t{y} * shape.out_width + x) * shape.channels;
      values = pack_at<T, kVector<T>>(static_cast<const T*>(arguments.dy2) + at);
      if (norm.z2) {
        float gradient[kVector<T>], z2[kVector<T>];
        to_floats(values, gradient);
        to_floats(pack_at<T, kVector<T>>(static_cast<const T*>(norm.z2) + at), z2);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          gradient[i] = fmaf(slope[i], gradient[i], fmaf(z2_slope[i], z2[i], constant[i]));
        }
        values = from_floats<T>(gradient);
      }
    }
    pack_at<T, kVector<T>>(&shared.tile[pixel][vector * kVector<T>]) = values;
  }
}

// What a thread adds up over its input pixels.
struct Gradients {
  float taps[kTaps][kLaneChannels] = {};
  float sum[kLaneChannels] = {};
  float product[kLaneChannels] = {};
};

// One input pixel at offset (py, px) of its position. window(i, j): dz2 i rows above and j columns
// left of the position.
template <class T, int stride, class Window>
__device__ __forceinline__ void input_pixel(int py, int px, const Window& window,
                                            const float (*taps)[Layout<T>::kChunk], int lane,
                                            const float (&scale)[kLaneChannels],
                                            const float (&shift)[kLaneChannels],
                                            Activation activation, const T* z1, T* dpre,
                                            Gradients& gradients) {
  float z[kLaneChannels], h[kLaneChannels], slope[kLaneChannels];
  float gradient[kLaneChannels] = {};
  to_floats(pack_at<T, kLaneChannels>(z1), z);
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) {
    const ValueAndSlope y = activate_and_slope(activation, fmaf(scale[c], z[c], shift[c]));
    h[c] = y.value;
    slope[c] = y.slope;
  }
#pragma unroll
  for (int i = py; i < 3; i += stride) {
#pragma unroll
    for (int j = px; j < 3; j += stride) {
      float dz2[kLaneChannels], tap[kLaneChannels];
      window(i / stride, j / stride, dz2);
      to_floats(pack_at<float, kLaneChannels>(&taps[3 * i + j][lane * kLaneChannels]), tap);
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        gradient[c] = fmaf(tap[c], dz2[c], gradient[c]);
        gradients.taps[3 * i + j][c] = fmaf(h[c], dz2[c], gradients.taps[3 * i + j][c]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) gradient[c] *= slope[c];
  const auto stored = from_floats<T>(gradient);
  pack_at<T, kLaneChannels>(dpre) = stored;
  to_floats(stored, gradient);
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) {
    gradients.sum[c] += gradient[c];
    gradients.product[c] = fmaf(gradient[c], z[c], gradients.product[c]);
  }
}

// Adds up all slots, in an order that is always the same, and writes one row of `partials`.
template <class T>
__device__ __forceinline__ void write_gradients(const Gradients& gradients,
                                                SharedGradients<T>& shared, int first_channel,
                                                int channels, float* partial) {
  constexpr int kLanes = Layout<T>::kLanes;
  constexpr int kChunk = Layout<T>::kChunk;
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int row = 0; row < kGradientRows; ++row) {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      float value = row < kTaps ? gradients.taps[row < kTaps ? row : 0][c]
                                : (row == kTaps ? gradients.sum[c] : gradients.product[c]);
#pragma unroll
      for (int distance = kLanes; distance < 32; distance *= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, distance);
      }
      if (threadIdx.x % 32 < kLanes) {
        shared.values[threadIdx.x / 32][row][lane * kLaneChannels + c] = value;
      }
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < kGradientRows * kChunk; index += Layout<T>::kThreads) {
    const int row = index / kChunk;
    const int channel = index % kChunk;
    if (first_channel + channel >= channels) continue;
    float value = 0.0f;
    for (int warp = 0; warp < Layout<T>::kThreads / 32; ++warp) {
      value += shared.values[warp][row][channel];
    }
    partial[row * channels + first_channel + channel] = value;
  }
}

template <class T, int stride>
__global__ void __launch_bounds__(Layout<T>::kThreads, 512 / Layout<T>::kThreads)
    depthwise_backward_kernel(BackwardArguments arguments) {
  using Tiles = Layout<T>;
  auto& shared = shared_memory<BackwardShared<T, stride>>();
  const DepthwiseShape& shape = arguments.shape;
  const TileGrid& grid = arguments.grid;
  const int chunks = (shape.channels + Tiles::kChunk - 1) / Tiles::kChunk;
  const int first_channel = blockIdx.x % chunks * Tiles::kChunk;
  const int64_t split = blockIdx.x / chunks;
  const int lane = threadIdx.x % Tiles::kLanes;
  const int slot = threadIdx.x / Tiles::kLanes;
  const int channel = first_channel + lane * kLaneChannels;
  const Activation activation = arguments.prologue.activation;

  for (int index = threadIdx.x; index < kTaps * Tiles::kChunk; index += Tiles::kThreads) {
    const int at = first_channel + index % Tiles::kChunk;
    shared.taps[index / Tiles::kChunk][index % Tiles::kChunk] =
        at < shape.channels ? arguments.weights[index / Tiles::kChunk * shape.channels + at] : 0.0f;
  }
  float scale[kLaneChannels], shift[kLaneChannels];
  load_coefficients(arguments.prologue.scale, channel, shape.channels, 1.0f, scale);
  load_coefficients(arguments.prologue.shift, channel, shape.channels, 0.0f, shift);

  Gradients gradients;
  const int64_t last = grid.tiles * (split + 1) / grid.splits;
  for (int64_t index = grid.tiles * split / grid.splits; index < last; ++index) {
    const Tile tile = tile_at(grid, index);
    load_tile<T, stride>(arguments, tile, first_channel, shared);
    __syncthreads();
    const Column part = column_of(grid, tile, slot);
    const int width = tile.columns + kReach<stride>;
    const int64_t image = tile.image * shape.height * shape.width;
    for (int r = 0; r < part.count && channel < shape.channels; ++r) {
      const int corner = (part.row + r + kReach<stride>)*width + part.column + kReach<stride>;
      const auto window = [&](int i, int j, float (&dz2)[kLaneChannels]) {
        to_floats(
            pack_at<T, kLaneChannels>(&shared.tile[corner - i * width - j][lane * kLaneChannels]),
            dz2);
      };
      const int y = (arguments.first_row + tile.row + part.row + r) * stride - shape.top;
      const int x = (arguments.first_column + tile.column + part.column) * stride - shape.left;
#pragma unroll
      for (int py = 0; py < stride; ++py) {
#pragma unroll
        for (int px = 0; px < stride; ++px) {
          if (y + py < 0 || y + py >= shape.height) continue;
          if (x + px < 0 || x + px >= shape.width) continue;
          const int64_t at =
              (image + int64_t{y + py} * shape.width + x + px) * shape.channels + channel;
          input_pixel<T, stride>(py, px, window, shared.taps, lane, scale, shift, activation,
                                 static_cast<const T*>(arguments.z1) + at,
                                 static_cast<T*>(arguments.dpre) + at, gradients);
        }
      }
    }
    __syncthreads();
  }
  write_gradients(gradients, shared.gradients, first_channel, shape.channels,
                  arguments.partials + split * kGradientRows * shape.channels);
}

// The positions whose input pixels lie in the map: rows first_row.. of the output's grid.
TileGrid backward_grid(const DepthwiseShape& shape, Element type, int target_blocks) {
  const int rows = (shape.top + shape.height - 1) / shape.stride - shape.top / shape.stride + 1;
  const int columns = (shape.left + shape.width - 1) / shape.stride - shape.left / shape.stride + 1;
  return divide_map(shape.images, rows, columns, kRun, channel_chunks(shape.channels, type),
                    target_blocks);
}

}  // namespace

int64_t depthwise_backward_partials(const DepthwiseShape& shape, Element type, int target_blocks) {
  return backward_grid(shape, type, target_blocks).splits;
}

int depthwise_backward(const DepthwiseShape& shape, Element type, const void* dy2,
                       NormBackward norm, const void* z1, Prologue prologue, const float* weights,
                       void* dpre, float* partials, int target_blocks, void* stream) {
  const TileGrid grid = backward_grid(shape, type, target_blocks);
  const BackwardArguments arguments = {shape,
                                       grid,
                                       shape.top / shape.stride,
                                       shape.left / shape.stride,
                                       dy2,
                                       norm,
                                       z1,
                                       prologue,
                                       weights,
                                       dpre,
                                       partials};
  return with_element(type, [&](auto element) {
    using T = decltype(element);
    const auto kernel =
        shape.stride == 1 ? &depthwise_backward_kernel<T, 1> : &depthwise_backward_kernel<T, 2>;
    return launch(kernel, grid.splits * channel_chunks(shape.channels, type), Layout<T>::kThreads,
                  stream, arguments);
  });
}

}  // namespace moat_kernels::cuda
