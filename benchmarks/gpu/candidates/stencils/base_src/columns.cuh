#pragma once

// How the two stencil kernels divide their work: a warp is a column.
//
// A block owns 64 channels, two for each lane of a warp, so that a warp's load of a pixel is one
// cache line in 16 bits and two in float32. Its warps are the neighbouring columns of a tile, with
// the halo's columns as warps of their own, which only load and convert: a warp that has nothing to
// do issues no instruction, so widths that divide badly cost nothing. All walk down the rows of the
// tile together. A warp converts what it loads once, shows it to its neighbours in a ring of rows
// in shared memory, one barrier for each row, and keeps its window of the stencil in registers. The
// loop over the rows is unrolled by the ring's period (`kPhases`), so that nothing moves when the
// window rolls, and raw rows are loaded that many rows ahead, to cover DRAM's latency.
//
// Instructions per element decide how fast the kernels are: nothing in the loop divides, addresses
// are 32-bit offsets from where a tile begins, and activations are parameters of the templates.

#include "cuda/element.cuh"
#include "cuda/gelu.cuh"
#include "cuda/launch.cuh"

namespace moat_kernels::cuda {

constexpr int kLanes = 32;
constexpr int kPair = 2;  // channels of a lane
constexpr int kChunk = kLanes * kPair;
constexpr int kMostWarps = kMostColumns + 2;
// A band of rows has a halo too; with fewer rows than this it is not worth its while.
constexpr int kLeastRows = 8;

using FloatPair = Pack<float, kPair>;
// Columns of a row in shared memory: one more on both sides, which is read and not used.
constexpr int kRingColumns = kMostWarps + 2;
// Rows of float32 by [row modulo phases].
template <int phases>
struct Ring {
  float2 rows[phases][kRingColumns][kLanes];
};

// A map of height x width positions per image in tiles of about equal size.
struct TileGrid {
  int height, width;
  int rows, columns;  // of a tile
  int bands, tiles_x;
  int chunks;      // of channels
  int64_t tiles;   // of all images
  int64_t splits;  // groups of tiles; a block goes through one, for one chunk
};

// Elements from one pixel, or row, to the next; computed before the launch, so that a thread adds
// them from constant memory.
struct Pitches {
  uint32_t pixel, in, out;  // of maps before and behind the convolution
  uint32_t step;            // input rows of one output row
};

inline Pitches pitches_of(const DepthwiseShape& shape) {
  const uint32_t pixel = shape.channels;
  const uint32_t in = pixel * shape.width;
  return {pixel, in, pixel * shape.out_width, in * shape.stride};
}

struct Tile {
  int64_t image;
  int row, column;    // of its first position
  int rows, columns;  // inside the map
};

// Elements of a tile's rows, at most, so that 32 bits count them.
constexpr int64_t kMostElements = int64_t{1} << 30;

// Bands are whole maps where these make enough blocks.
inline TileGrid divide_map(const DepthwiseShape& shape, int height, int width,
                           const BlockPlan& plan) {
  TileGrid grid;
  grid.height = height;
  grid.width = width;
  grid.chunks = divide_up(shape.channels, kChunk);
  grid.tiles_x = divide_up(width, plan.columns);
  grid.columns = divide_up(width, grid.tiles_x);
  const int64_t wanted = divide_up(plan.target_blocks, grid.chunks);
  const int64_t bands = wanted / (shape.images * grid.tiles_x);
  const int64_t most = height < kLeastRows ? 1 : height / kLeastRows;
  grid.rows = divide_up(height, static_cast<int>(bands < 1 ? 1 : (bands < most ? bands : most)));
  const int64_t row_elements =
      int64_t{shape.width > shape.out_width ? shape.width : shape.out_width} * shape.channels;
  const int64_t most_rows = kMostElements / (row_elements * shape.stride);
  if (grid.rows > most_rows) grid.rows = static_cast<int>(most_rows);
  grid.bands = divide_up(height, grid.rows);
  grid.tiles = shape.images * grid.bands * grid.tiles_x;
  grid.splits = wanted < grid.tiles ? wanted : grid.tiles;
  return grid;
}

// The block's row of `partials`.
__device__ __forceinline__ int64_t split_of(const TileGrid& grid) {
  return blockIdx.x / grid.chunks;
}

// The tiles of a block, one after the other.
class Tiles {
 public:
  __device__ __forceinline__ explicit Tiles(const TileGrid& grid) {
    const int64_t split = split_of(grid);
    const int64_t first = grid.tiles * split / grid.splits;
    left_ = static_cast<int>(grid.tiles * (split + 1) / grid.splits - first);
    image_ = static_cast<int>(first / (grid.bands * grid.tiles_x));
    within_ = static_cast<int>(first % (grid.bands * grid.tiles_x));
  }

  __device__ __forceinline__ bool done() const { return left_ <= 0; }

  __device__ __forceinline__ Tile tile(const TileGrid& grid) const {
    Tile tile;
    tile.image = image_;
    tile.row = within_ / grid.tiles_x * grid.rows;
    tile.column = within_ % grid.tiles_x * grid.columns;
    tile.rows = min(grid.rows, grid.height - tile.row);
    tile.columns = min(grid.columns, grid.width - tile.column);
    return tile;
  }

  __device__ __forceinline__ void next(const TileGrid& grid) {
    --left_;
    if (++within_ < grid.bands * grid.tiles_x) return;
    within_ = 0;
    ++image_;
  }

 private:
  int left_, image_, within_;
};

// What a thread is: a column, and its channels.
struct Place {
  int warp, lane;
  int channel;  // the first of the thread's, maybe beyond the last
};

__device__ __forceinline__ Place place_in(const TileGrid& grid) {
  Place place;
  place.warp = threadIdx.x / kLanes;
  place.lane = threadIdx.x % kLanes;
  place.channel = blockIdx.x % grid.chunks * kChunk + place.lane * kPair;
  return place;
}

// A thread's channels of a pixel as they are stored, in one register where they fit: taken apart
// only where they are used, they cost no instruction until then.
template <class T>
struct Stored {
  uint32_t bits;
};
template <>
struct Stored<float> {
  FloatPair values;
};

template <class T>
__device__ __forceinline__ Stored<T> load_pair(const T* pointer) {
  if constexpr (sizeof(T) == 2) {
    return {*reinterpret_cast<const uint32_t*>(pointer)};
  } else {
    return {pack_at<T, kPair>(pointer)};
  }
}

template <class T>
__device__ __forceinline__ void store_pair(T* pointer, const Stored<T>& pair) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(pointer) = pair.bits;
  } else {
    pack_at<T, kPair>(pointer) = pair.values;
  }
}

template <class T>
__device__ __forceinline__ void widen(const Stored<T>& pair, float (&values)[kPair]) {
  if constexpr (sizeof(T) == 2) {
    unpack<T>(pair.bits, values[0], values[1]);
  } else {
    to_floats(pair.values, values);
  }
}

template <class T>
__device__ __forceinline__ Stored<T> round_pair(const float (&values)[kPair]) {
  if constexpr (sizeof(T) == 2) {
    return {pack<T>(values[0], values[1])};
  } else {
    return {from_floats<T>(values)};
  }
}

// 0 <= value < limit by one comparison; a limit of 0 admits nothing.
__device__ __forceinline__ bool within(int value, int limit) {
  return static_cast<unsigned>(value) < static_cast<unsigned>(limit);
}

// The taps of a thread's channels, and the affine map before the activation.
struct StencilCoefficients {
  float taps[kTaps][kPair];
  float scale[kPair], shift[kPair];
};

__device__ __forceinline__ void load_stencil(const float* weights, const Prologue& prologue,
                                             int channel, int channels,
                                             StencilCoefficients& coefficients) {
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    load_coefficients(weights + int64_t{tap} * channels, channel, channels, 0.0f,
                      coefficients.taps[tap]);
  }
  load_coefficients(prologue.scale, channel, channels, 1.0f, coefficients.scale);
  load_coefficients(prologue.shift, channel, channels, 0.0f, coefficients.shift);
}

}  // namespace moat_kernels::cuda
