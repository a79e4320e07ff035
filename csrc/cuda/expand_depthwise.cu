// z2 = depthwise(h1), h1[p, e] = act(sum over c of x[p, c] W[e, c] + bias[e]), 0 outside the map:
// 1x1 expand convolution (norms folded into W and bias), activation and 3x3 depthwise in one
// kernel.
//
// DRAM: reads x once (for the first block of E; the others find it in L2) and W, writes z2: one
// crossing by an E-wide tensor, where two kernels make three. z1 and h1 never leave the chip.
// On chip: up to 256 pixels of a tile with its halo, times 64 channels of E. The GEMM streams C in
// steps of 32 through two stages of shared memory (cp.async, ldmatrix, mma.sync; float32
// accumulators in registers); then h1, rounded to its type, takes the stages' place in shared
// memory, and the depthwise convolution reads it from there.
// Price: pixels of a halo are multiplied more than once. `plan_tiles` chooses the tile that
// multiplies least: maps of 14 x 14 or 16 x 16 are one tile without a halo; at stride 1, 28 x 28
// multiplies 1.15 times its pixels and 112 x 112 1.27 times.
//
// x is not centred: with bfloat16 weights, `bias` must hold -W mean(x) for W as rounded.

#include "cuda/tile.cuh"

namespace moat_kernels::cuda {
namespace {

constexpr int kPixels = 256;
constexpr int kChannels = 64;  // of E
constexpr int kDepth = 32;     // of C, in one step
constexpr int kThreads = 256;
constexpr int kWarpPixels = kPixels / (kThreads / 32);
constexpr int kMatrix = 8;  // rows, and 16-bit columns, of what ldmatrix loads
// Elements from one pixel of h1 to the next: the extra ones spread a column over all banks.
constexpr int kHiddenPitch = kChannels + 8;

template <int stride>
constexpr int kExpandRun = stride == 1 ? 16 : 8;

// A tile is `images` whole maps, or a part of one.
struct ExpandGrid {
  int images, rows, columns;  // of the output
  int groups, run;            // of rows in a column, positions in a group
  int tiles_y, tiles_x;
  int64_t tiles;
};

template <class T>
struct Stage {
  T x[kPixels][kDepth];
  T weight[kChannels][kDepth];
};

template <class T>
union alignas(16) ExpandShared {
  Stage<T> stages[2];
  T hidden[kPixels][kHiddenPitch];
  SharedMoments<T> moments;
};

struct ExpandArguments {
  DepthwiseShape shape;
  ExpandGrid grid;
  int in_channels;
  const void* x;
  const void* weight;
  Epilogue hidden;
  const float* depthwise_weights;
  Epilogue epilogue;
  void* z2;
  float* partials;
};

// Output positions of a tile, and the part of the input map that they see.
struct ExpandTile {
  int64_t image;
  int images, row, column, rows, columns;
  int first_y, first_x, height, width;

  __device__ __forceinline__ int pixels() const { return images * height * width; }
};

template <int stride>
__device__ __forceinline__ ExpandTile expand_tile_at(const DepthwiseShape& shape,
                                                     const ExpandGrid& grid, int64_t index) {
  const int within = static_cast<int>(index % (grid.tiles_y * grid.tiles_x));
  ExpandTile tile;
  tile.image = index / (grid.tiles_y * grid.tiles_x) * grid.images;
  tile.images = static_cast<int>(min(int64_t{grid.images}, shape.images - tile.image));
  tile.row = within / grid.tiles_x * grid.rows;
  tile.column = within % grid.tiles_x * grid.columns;
  tile.rows = min(grid.rows, shape.out_height - tile.row);
  tile.columns = min(grid.columns, shape.out_width - tile.column);
  const int y = tile.row * stride - shape.top;
  const int x = tile.column * stride - shape.left;
  tile.first_y = max(0, y);
  tile.first_x = max(0, x);
  tile.height = max(0, min(shape.height, y + (tile.rows - 1) * stride + 3) - tile.first_y);
  tile.width = max(0, min(shape.width, x + (tile.columns - 1) * stride + 3) - tile.first_x);
  return tile;
}

// Where the 16 bytes `vector` of a stage's row lie: eight rows that ldmatrix reads at once, 64
// bytes apart, touch every bank once.
__device__ __forceinline__ int swizzled(int row, int vector) {
  return (vector ^ (row / 2 % 4)) * kMatrix;
}

// Begins to copy channels depth .. depth + kDepth of the tile's pixels and of the weights. Each
// thread copies the same 16 bytes of four pixels, whose places in x (-1: none) are `offsets`.
template <class T>
__device__ __forceinline__ void load_stage(const ExpandArguments& arguments,
                                           const int64_t (&offsets)[4], int first_channel,
                                           int depth, Stage<T>& stage) {
  constexpr int kVectors = kDepth / kMatrix;
  const int vector = threadIdx.x % kVectors;
  const int row = threadIdx.x / kVectors;
  const int channel = depth + vector * kMatrix;
  const T* x = static_cast<const T*>(arguments.x);
  const T* weight = static_cast<const T*>(arguments.weight);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pixel = row + i * (kPixels / 4);
    const bool valid = offsets[i] >= 0 && channel < arguments.in_channels;
    copy_async(&stage.x[pixel][swizzled(pixel, vector)], valid ? x + offsets[i] + channel : x,
               valid);
  }
  const bool valid =
      first_channel + row < arguments.shape.channels && channel < arguments.in_channels;
  const int64_t at = (int64_t{first_channel} + row) * arguments.in_channels + channel;
  copy_async(&stage.weight[row][swizzled(row, vector)], valid ? weight + at : weight, valid);
}

// sums += x W^T of a stage, for the warp's 32 pixels.
template <class T>
__device__ __forceinline__ void multiply_stage(const Stage<T>& stage, int first_pixel,
                                               float (&sums)[2][kChannels / kMatrix][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int row = first_pixel + m * 16 + lane % 16;
      load_matrices(a[m], &stage.x[row][swizzled(row, 2 * step + lane / 16)]);
    }
#pragma unroll
    for (int pair = 0; pair < kChannels / 16; ++pair) {
      uint32_t b[4];
      const int row = pair * 16 + lane / 16 * 8 + lane % 8;
      load_matrices(b, &stage.weight[row][swizzled(row, 2 * step + lane / 8 % 2)]);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply<T>(sums[m][2 * pair], a[m], b[0], b[1]);
        multiply<T>(sums[m][2 * pair + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// h1 = act(sums + bias), from the accumulators' layout to rows of pixels.
template <class T>
__device__ __forceinline__ void store_hidden(const ExpandArguments& arguments, int first_channel,
                                             int first_pixel,
                                             const float (&sums)[2][kChannels / kMatrix][4],
                                             T (&hidden)[kPixels][kHiddenPitch]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kChannels / kMatrix; ++n) {
    const int channel = n * kMatrix + lane % 4 * 2;
    float bias[2];
    load_coefficients(arguments.hidden.bias, first_channel + channel, arguments.shape.channels,
                      0.0f, bias);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = first_pixel + m * 16 + half * 8 + lane / 4;
        const float values[2] = {
            activate(arguments.hidden.activation, sums[m][n][2 * half] + bias[0]),
            activate(arguments.hidden.activation, sums[m][n][2 * half + 1] + bias[1])};
        pack_at<T, 2>(&hidden[pixel][channel]) = from_floats<T>(values);
      }
    }
  }
}

// Channels first_channel.. of h1 for every pixel of the tile; the stages are free when it returns,
// and every thread sees h1.
template <class T>
__device__ __forceinline__ void expand_tile(const ExpandArguments& arguments,
                                            const ExpandTile& tile, int first_channel,
                                            ExpandShared<T>& shared) {
  const DepthwiseShape& shape = arguments.shape;
  int64_t offsets[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pixel = threadIdx.x / (kDepth / kMatrix) + i * (kPixels / 4);
    offsets[i] = -1;
    if (pixel < tile.pixels()) {
      const int64_t image = tile.image + pixel / (tile.height * tile.width);
      const int y = tile.first_y + pixel / tile.width % tile.height;
      const int x = tile.first_x + pixel % tile.width;
      offsets[i] = ((image * shape.height + y) * shape.width + x) * arguments.in_channels;
    }
  }
  const int first_pixel = threadIdx.x / 32 * kWarpPixels;
  const bool works = first_pixel < tile.pixels();
  float sums[2][kChannels / kMatrix][4] = {};
  load_stage(arguments, offsets, first_channel, 0, shared.stages[0]);
  for (int depth = 0; depth < arguments.in_channels; depth += kDepth) {
    const int current = depth / kDepth % 2;
    wait_for_copies();
    __syncthreads();
    if (depth + kDepth < arguments.in_channels) {
      load_stage(arguments, offsets, first_channel, depth + kDepth, shared.stages[1 - current]);
    }
    if (works) multiply_stage(shared.stages[current], first_pixel, sums);
  }
  __syncthreads();
  if (works) store_hidden(arguments, first_channel, first_pixel, sums, shared.hidden);
  __syncthreads();
}

template <class T, int stride>
__global__ void __launch_bounds__(kThreads, 2) expand_depthwise_kernel(ExpandArguments arguments) {
  auto& shared = shared_memory<ExpandShared<T>>();
  const DepthwiseShape& shape = arguments.shape;
  const ExpandGrid& grid = arguments.grid;
  const int chunks = (shape.channels + kChannels - 1) / kChannels;
  const int first_channel = blockIdx.x % chunks * kChannels;
  const int64_t index = blockIdx.x / chunks;
  const ExpandTile tile = expand_tile_at<stride>(shape, grid, index);
  expand_tile(arguments, tile, first_channel, shared);

  const int lane = threadIdx.x % Layout<T>::kLanes;
  const int slot = threadIdx.x / Layout<T>::kLanes;
  const int channel = first_channel + lane * kLaneChannels;
  float taps[kTaps][kLaneChannels], bias[kLaneChannels];
  load_coefficients(arguments.epilogue.bias, channel, shape.channels, 0.0f, bias);
  load_taps(arguments.depthwise_weights, channel, shape.channels, taps);
  Moments moments;
  const int columns = tile.columns * grid.groups;
  for (int part = slot; part < tile.images * columns && channel < shape.channels; part += kSlots) {
    const int image = part / columns;
    const int column = part % tile.columns;
    const int first_row = part % columns / tile.columns * grid.run;
    const int top = (tile.row + first_row) * stride - shape.top;
    const int left = (tile.column + column) * stride - shape.left;
    T* out = static_cast<T*>(arguments.z2) + channel +
             (((tile.image + image) * shape.out_height + tile.row + first_row) * shape.out_width +
              tile.column + column) *
                 shape.channels;
    walk_down<stride, kExpandRun<stride>>(
        taps, min(grid.run, tile.rows - first_row),
        [&](int i, int j, float (&values)[kLaneChannels]) {
          const int y = top + i;
          const int x = left + j;
          if (y < 0 || y >= shape.height || x < 0 || x >= shape.width) {
#pragma unroll
            for (int c = 0; c < kLaneChannels; ++c) values[c] = 0.0f;
            return;
          }
          const int pixel =
              (image * tile.height + y - tile.first_y) * tile.width + x - tile.first_x;
          to_floats(pack_at<T, kLaneChannels>(&shared.hidden[pixel][lane * kLaneChannels]), values);
        },
        [&](int row, const float (&sums)[kLaneChannels]) {
          finish_output(sums, bias, arguments.epilogue.activation,
                        out + int64_t{row} * shape.out_width * shape.channels, moments);
        });
  }
  if (arguments.partials) {
    __syncthreads();
    write_moments(moments, shared.moments, first_channel, shape.channels,
                  arguments.partials + index * kMomentRows * shape.channels);
  }
}

// The tile whose GEMM has the fewest rows in all, counted in warps' parts.
ExpandGrid plan_tiles(const DepthwiseShape& shape) {
  const int stride = shape.stride;
  const int most_rows = stride == 1 ? kExpandRun<1> : kExpandRun<2>;
  ExpandGrid best = {};
  int64_t best_cost = 0;
  for (int rows = 1; rows <= most_rows && rows <= shape.out_height; ++rows) {
    for (int columns = 1; columns <= kSlots && columns <= shape.out_width; ++columns) {
      const int height = (rows - 1) * stride + 3;
      const int width = (columns - 1) * stride + 3;
      const int pixels = (height < shape.height ? height : shape.height) *
                         (width < shape.width ? width : shape.width);
      if (pixels > kPixels) continue;
      const int tiles_y = divide_up(shape.out_height, rows);
      const int tiles_x = divide_up(shape.out_width, columns);
      const int64_t cost = int64_t{tiles_y} * tiles_x * divide_up(pixels, kWarpPixels);
      if (best_cost && cost > best_cost) continue;
      best_cost = cost;
      best.images = tiles_y * tiles_x == 1 ? kPixels / pixels : 1;
      best.rows = divide_up(shape.out_height, tiles_y);
      best.columns = divide_up(shape.out_width, tiles_x);
      best.tiles_y = tiles_y;
      best.tiles_x = tiles_x;
    }
  }
  const int groups = kSlots / (best.images * best.columns);
  best.groups = groups < 1 ? 1 : (groups < best.rows ? groups : best.rows);
  best.run = divide_up(best.rows, best.groups);
  best.tiles = (shape.images + best.images - 1) / best.images * best.tiles_y * best.tiles_x;
  return best;
}

template <class T>
int launch_expand_depthwise(const ExpandArguments& arguments, void* stream) {
  static_assert(Layout<T>::kThreads == kThreads && Layout<T>::kChunk == kChannels);
  const DepthwiseShape& shape = arguments.shape;
  const auto kernel =
      shape.stride == 1 ? &expand_depthwise_kernel<T, 1> : &expand_depthwise_kernel<T, 2>;
  return launch(kernel, arguments.grid.tiles * divide_up(shape.channels, kChannels), kThreads,
                stream, arguments);
}

}  // namespace

int64_t expand_depthwise_partials(const DepthwiseShape& shape) { return plan_tiles(shape).tiles; }

int expand_depthwise(const DepthwiseShape& shape, int in_channels, Element type, const void* x,
                     const void* weight, Epilogue hidden, const float* depthwise_weights,
                     Epilogue epilogue, void* z2, float* partials, void* stream) {
  const ExpandArguments arguments = {shape,  plan_tiles(shape), in_channels, x,  weight,
                                     hidden, depthwise_weights, epilogue,    z2, partials};
  if (type == Element::bfloat16) return launch_expand_depthwise<__nv_bfloat16>(arguments, stream);
  if (type == Element::float16) return launch_expand_depthwise<__half>(arguments, stream);
  return cudaErrorInvalidValue;
}

}  // namespace moat_kernels::cuda
