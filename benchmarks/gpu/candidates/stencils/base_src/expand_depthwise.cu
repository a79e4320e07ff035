// z2 = depthwise(h1), h1[p, e] = act(sum over c of x[p, c] W[e, c] + bias[e]), 0 outside the map:
// 1x1 expand convolution (norms folded into W and bias), activation and 3x3 depthwise in one
// kernel.
//
// DRAM: reads x once (for the first block of E; the others find it in L2) and W, writes z2: one
// crossing by an E-wide tensor, where two kernels make three. z1 and h1 never leave the chip.
// On chip: up to 256 pixels of a tile with its halo, times 64 channels of E. When the GEMM
// (expand_tile.cuh) is done, h1, rounded to its type, takes the place of the GEMM's operands in
// shared memory, and the depthwise convolution reads it from there.
// Price: pixels of a halo are multiplied more than once. `plan_tiles` chooses the tile that
// multiplies least: maps of 14 x 14 or 16 x 16 are one tile without a halo; at stride 1, 28 x 28
// multiplies 1.15 times its pixels and 112 x 112 1.27 times.
//
// x is not centred: with bfloat16 weights, `bias` must hold -W mean(x) for W as rounded.

#include "cuda/expand_tile.cuh"

namespace moat_kernels::cuda {
namespace {

constexpr int kPixels = 256;

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
union alignas(16) ExpandShared {
  Stage<T, kPixels> stages[2];
  T hidden[kPixels][kPitch];
};

struct ExpandArguments {
  DepthwiseShape shape;
  ExpandGrid grid;
  ExpandProblem expand;
  Epilogue hidden;
  const float* depthwise_weights;
  Epilogue epilogue;
  void* z2;
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

template <class T, int stride>
__global__ void __launch_bounds__(kThreads, 2) expand_depthwise_kernel(ExpandArguments arguments) {
  auto& shared = shared_memory<ExpandShared<T>>();
  const DepthwiseShape& shape = arguments.shape;
  const ExpandGrid& grid = arguments.grid;
  const int chunks = (shape.channels + kChannels - 1) / kChannels;
  const int first_channel = blockIdx.x % chunks * kChannels;
  const int64_t index = blockIdx.x / chunks;
  const ExpandTile tile = expand_tile_at<stride>(shape, grid, index);
  const auto offset_of = [&](int pixel) {
    const int64_t image = tile.image + pixel / (tile.height * tile.width);
    const int y = tile.first_y + pixel / tile.width % tile.height;
    const int x = tile.first_x + pixel % tile.width;
    return ((image * shape.height + y) * shape.width + x) * arguments.expand.in_channels;
  };
  expand_tile(arguments.expand, arguments.hidden, first_channel, tile.pixels(), offset_of,
              shared.stages, shared.hidden);

  const int lane = threadIdx.x % Layout<T>::kLanes;
  const int slot = threadIdx.x / Layout<T>::kLanes;
  const int channel = first_channel + lane * kLaneChannels;
  float taps[kTaps][kLaneChannels], bias[kLaneChannels];
  load_coefficients(arguments.epilogue.bias, channel, shape.channels, 0.0f, bias);
  load_taps(arguments.depthwise_weights, channel, shape.channels, taps);
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
                        out + int64_t{row} * shape.out_width * shape.channels);
        });
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
      const int64_t cost = int64_t{tiles_y} * tiles_x * divide_up(pixels, kWarpPixels<kPixels>);
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

int expand_depthwise(const DepthwiseShape& shape, int in_channels, Element type, const void* x,
                     const void* weight, Epilogue hidden, const float* depthwise_weights,
                     Epilogue epilogue, void* z2, void* stream) {
  const ExpandArguments arguments = {
      shape,  plan_tiles(shape), {x, weight, in_channels, shape.channels},
      hidden, depthwise_weights, epilogue,
      z2};
  if (type == Element::bfloat16) return launch_expand_depthwise<__nv_bfloat16>(arguments, stream);
  if (type == Element::float16) return launch_expand_depthwise<__half>(arguments, stream);
  return cudaErrorInvalidValue;
}

}  // namespace moat_kernels::cuda
