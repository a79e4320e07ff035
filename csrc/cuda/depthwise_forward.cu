// z2[b, y, x, e] = sum over 3x3 taps of w[i, j, e] h1[b, y stride + i - top, x stride + j - left,
// e] with h1 = act(scale z1 + shift) inside the map and 0 outside: the padding follows the
// activation.
//
// DRAM: reads z1, writes z2, each once (a halo is read again, mostly from L2); per group of tiles
// 3 floats per channel of statistics. On chip: a tile of h1 with its halo, in shared memory; taps,
// sums and statistics in registers. Loads of 16 bytes into shared memory, stores of 4 channels.

#include "cuda/tile.cuh"

namespace moat_kernels::cuda {
namespace {

template <int stride>
struct ForwardTile {
  static constexpr int kRun = stride == 1 ? 8 : 4;
  // 16 columns and one run of rows, or 8 columns and two.
  static constexpr int kWide = ((kRun - 1) * stride + 3) * (15 * stride + 3);
  static constexpr int kNarrow = ((2 * kRun - 1) * stride + 3) * (7 * stride + 3);
  static constexpr int kPixels = kWide > kNarrow ? kWide : kNarrow;
};

template <class T, int stride>
union alignas(16) ForwardShared {
  T tile[ForwardTile<stride>::kPixels][Layout<T>::kChunk];
  SharedMoments<T> moments;
};

struct ForwardArguments {
  DepthwiseShape shape;
  TileGrid grid;
  Prologue prologue;
  const void* z1;
  const float* weights;
  Epilogue epilogue;
  void* z2;
  float* partials;
};

// Fills the shared tile with h1 and zeros; a thread always takes the same channels of a pixel.
template <class T, int stride>
__device__ __forceinline__ void load_tile(const ForwardArguments& arguments, const Tile& tile,
                                          int first_channel, ForwardShared<T, stride>& shared) {
  constexpr int kVectors = Layout<T>::kVectors;
  const DepthwiseShape& shape = arguments.shape;
  const int vector = threadIdx.x % kVectors;
  const int channel = first_channel + vector * kVector<T>;
  float scale[kVector<T>], shift[kVector<T>];
  load_coefficients(arguments.prologue.scale, channel, shape.channels, 1.0f, scale);
  load_coefficients(arguments.prologue.shift, channel, shape.channels, 0.0f, shift);
  const int width = (tile.columns - 1) * stride + 3;
  const int pixels = ((tile.rows - 1) * stride + 3) * width;
  const int top = tile.row * stride - shape.top;
  const int left = tile.column * stride - shape.left;
  const T* image = static_cast<const T*>(arguments.z1) +
                   tile.image * shape.height * shape.width * shape.channels + channel;
#pragma unroll 4
  for (int pixel = threadIdx.x / kVectors; pixel < pixels;
       pixel += Layout<T>::kThreads / kVectors) {
    const int y = top + pixel / width;
    const int x = left + pixel % width;
    Vector<T> values = zero_pack<T, kVector<T>>();
    if (y >= 0 && y < shape.height && x >= 0 && x < shape.width && channel < shape.channels) {
      values = pack_at<T, kVector<T>>(image + (int64_t{y} * shape.width + x) * shape.channels);
      float wide[kVector<T>];
      to_floats(values, wide);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        wide[i] = activate(arguments.prologue.activation, fmaf(scale[i], wide[i], shift[i]));
      }
      values = from_floats<T>(wide);
    }
    pack_at<T, kVector<T>>(&shared.tile[pixel][vector * kVector<T>]) = values;
  }
}

template <class T, int stride>
__global__ void __launch_bounds__(Layout<T>::kThreads, 512 / Layout<T>::kThreads)
    depthwise_forward_kernel(ForwardArguments arguments) {
  using Tiles = Layout<T>;
  auto& shared = shared_memory<ForwardShared<T, stride>>();
  const DepthwiseShape& shape = arguments.shape;
  const TileGrid& grid = arguments.grid;
  const int chunks = (shape.channels + Tiles::kChunk - 1) / Tiles::kChunk;
  const int first_channel = blockIdx.x % chunks * Tiles::kChunk;
  const int64_t split = blockIdx.x / chunks;
  const int lane = threadIdx.x % Tiles::kLanes;
  const int slot = threadIdx.x / Tiles::kLanes;
  const int channel = first_channel + lane * kLaneChannels;

  float taps[kTaps][kLaneChannels], bias[kLaneChannels];
  load_coefficients(arguments.epilogue.bias, channel, shape.channels, 0.0f, bias);
  load_taps(arguments.weights, channel, shape.channels, taps);

  Moments moments;
  const int64_t last = grid.tiles * (split + 1) / grid.splits;
  for (int64_t index = grid.tiles * split / grid.splits; index < last; ++index) {
    const Tile tile = tile_at(grid, index);
    load_tile<T, stride>(arguments, tile, first_channel, shared);
    __syncthreads();
    const Column part = column_of(grid, tile, slot);
    const int width = (tile.columns - 1) * stride + 3;
    const int corner = part.row * stride * width + part.column * stride;
    T* out = static_cast<T*>(arguments.z2) +
             ((tile.image * shape.out_height + tile.row + part.row) * shape.out_width +
              tile.column + part.column) *
                 shape.channels +
             channel;
    if (channel < shape.channels) {
      walk_down<stride, ForwardTile<stride>::kRun>(
          taps, part.count,
          [&](int row, int column, float (&values)[kLaneChannels]) {
            const T* input = &shared.tile[corner + row * width + column][lane * kLaneChannels];
            to_floats(pack_at<T, kLaneChannels>(input), values);
          },
          [&](int row, const float (&sums)[kLaneChannels]) {
            finish_output(sums, bias, arguments.epilogue.activation,
                          out + int64_t{row} * shape.out_width * shape.channels, moments);
          });
    }
    __syncthreads();
  }
  if (arguments.partials) {
    write_moments(moments, shared.moments, first_channel, shape.channels,
                  arguments.partials + split * kMomentRows * shape.channels);
  }
}

TileGrid forward_grid(const DepthwiseShape& shape, Element type, int target_blocks) {
  const int run = shape.stride == 1 ? ForwardTile<1>::kRun : ForwardTile<2>::kRun;
  return divide_map(shape.images, shape.out_height, shape.out_width, run,
                    channel_chunks(shape.channels, type), target_blocks);
}

}  // namespace

int64_t depthwise_forward_partials(const DepthwiseShape& shape, Element type, int target_blocks) {
  return forward_grid(shape, type, target_blocks).splits;
}

int depthwise_forward(const DepthwiseShape& shape, Element type, const void* z1, Prologue prologue,
                      const float* weights, Epilogue epilogue, void* z2, float* partials,
                      int target_blocks, void* stream) {
  const TileGrid grid = forward_grid(shape, type, target_blocks);
  const ForwardArguments arguments = {shape, grid, prologue, z1, weights, epilogue, z2, partials};
  return with_element(type, [&](auto element) {
    using T = decltype(element);
    const auto kernel =
        shape.stride == 1 ? &depthwise_forward_kernel<T, 1> : &depthwise_forward_kernel<T, 2>;
    return launch(kernel, grid.splits * channel_chunks(shape.channels, type), Layout<T>::kThreads,
                  stream, arguments);
  });
}

}  // namespace moat_kernels::cuda
