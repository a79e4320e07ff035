#pragma once

// How the two stencil kernels divide their work: a warp is a few neighbouring columns.
//
// A block owns 64 channels, two for each lane of a warp. Its warps are the neighbouring columns of
// a tile, `wide` for each, and one warp more, which only loads and converts, has the halo's columns
// on both sides. All walk down the rows of the tile together. What a warp loads comes by
// asynchronous copies of 16 bytes into rows of its own in shared memory, several rows ahead and on
// into the next tile: what covers DRAM's latency takes no registers, and no warp but its own waits
// for it. A warp converts a pixel once, shows the columns at its edges to its neighbours in shared
// memory, one barrier for each row, and keeps its window of the stencil in registers.
//
// Instructions per element decide how fast the kernels are: nothing in the loop divides, what may
// lie outside of the map is asked once for all columns of a row, and activations are parameters of
// the templates.

#include "cuda/element.cuh"
#include "cuda/gelu.cuh"
#include "cuda/launch.cuh"

namespace moat_kernels::cuda {

constexpr int kLanes = 32;
constexpr int kPair = 2;  // channels of a lane
constexpr int kChunk = kLanes * kPair;
// A band of rows has a halo too; with fewer rows than this it is not worth its while.
constexpr int kLeastRows = 8;

using FloatPair = Pack<float, kPair>;

// Warps of a block that have `wide` columns each.
template <int wide>
constexpr int kMostWorkers = (kMostColumns + wide - 1) / wide;
template <int wide>
constexpr int kMostWarps = kMostWorkers<wide> + 1;

// What one asynchronous copy moves, and how many make a pixel.
template <class T>
constexpr int kPart = 16 / sizeof(T);
template <class T>
constexpr int kParts = kChunk / kPart<T>;

// A map of height x width positions per image in tiles of about equal size.
struct TileGrid {
  int height, width;
  int rows, columns;  // of a tile
  int workers;        // warps that have those columns
  int bands, tiles_x;
  int chunks;      // of channels
  int64_t tiles;   // of all images
  int64_t splits;  // groups of tiles; a block goes through one, for one chunk
};

// Elements from one pixel, or row, to the next; computed before the launch, so that a thread adds
// them from constant memory.
struct Pitches {
  uint32_t pixel, in, out;  // of maps before and behind the convolution
  uint32_t step;            // input rows of a step
};

inline Pitches pitches_of(const DepthwiseShape& shape, int step_inputs) {
  const uint32_t pixel = shape.channels;
  const uint32_t in = pixel * shape.width;
  return {pixel, in, pixel * shape.out_width, in * step_inputs};
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
                           const BlockPlan& plan, int wide) {
  TileGrid grid;
  grid.height = height;
  grid.width = width;
  grid.chunks = divide_up(shape.channels, kChunk);
  grid.tiles_x = divide_up(width, plan.columns);
  grid.columns = divide_up(width, grid.tiles_x);
  grid.workers = divide_up(grid.columns, wide);
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

// The tiles of a block. It lies in shared memory, where every thread writes the same: between tiles
// it takes no registers.
class Tiles {
 public:
  __device__ __forceinline__ void begin(const TileGrid& grid) {
    const int64_t split = split_of(grid);
    const int64_t first = grid.tiles * split / grid.splits;
    count_ = static_cast<int>(grid.tiles * (split + 1) / grid.splits - first);
    image_ = first / (grid.bands * grid.tiles_x);
    within_ = static_cast<int>(first % (grid.bands * grid.tiles_x));
  }

  __device__ __forceinline__ int count() const { return count_; }

  __device__ __forceinline__ Tile tile(const TileGrid& grid, int index) const {
    const unsigned position = static_cast<unsigned>(within_) + index;
    const unsigned image = position / (grid.bands * grid.tiles_x);
    const int within = position - image * (grid.bands * grid.tiles_x);
    Tile tile;
    tile.image = image_ + image;
    tile.row = within / grid.tiles_x * grid.rows;
    tile.column = within % grid.tiles_x * grid.columns;
    tile.rows = min(grid.rows, grid.height - tile.row);
    tile.columns = min(grid.columns, grid.width - tile.column);
    return tile;
  }

 private:
  int64_t image_;
  int within_, count_;
};

// The number of a warp's next tile, in shared memory too.
class TileCounter {
 public:
  __device__ __forceinline__ void begin() { number_ = 0; }

  // For all threads of the warp.
  __device__ __forceinline__ int next() {
    const int number = number_;
    __syncwarp();
    number_ = number + 1;
    return number;
  }

 private:
  int number_;
};

// What a thread is: one of the warps that have columns, or the halo's, and its channels.
struct Place {
  int warp, lane;
  int first_channel;  // of the block
  int channel;        // the first of the thread's, maybe beyond the last
};

__device__ __forceinline__ Place place_in(const TileGrid& grid) {
  Place place;
  const int thread = thread_number();
  place.warp = thread / kLanes;
  place.lane = thread % kLanes;
  place.first_channel = blockIdx.x % grid.chunks * kChunk;
  place.channel = place.first_channel + place.lane * kPair;
  return place;
}

// Where column `c` of a warp lies, from the tile's first. The halo's warp, which comes last, has
// the column behind the tile and the one before it.
template <int wide>
__device__ __forceinline__ int column_of(const TileGrid& grid, const Place& place, int c) {
  static_assert(wide >= 2, "the halo's warp has two columns");
  return place.warp == grid.workers && c == wide - 1 ? -1 : place.warp * wide + c;
}

// 0 <= value < limit by one comparison; a limit of 0 admits nothing.
__device__ __forceinline__ bool within(int value, int limit) {
  return static_cast<unsigned>(value) < static_cast<unsigned>(limit);
}

// Some of a tile's rows, which are counted down: `count` of them, the last one being `last`.
struct RowsLeft {
  int last, count;

  // Of rows `first` up to `end` of `rows`.
  __device__ __forceinline__ void set(int rows, int first, int end) {
    last = rows - end + 1;
    count = max(end - first, 0);
  }
  __device__ __forceinline__ bool contains(int left) const { return within(left - last, count); }
};

// A thread's copies of a row of `columns` pixels beside each other. Its rows follow in more of
// them, or, where a row is less than a warp copies at once, in other threads.
template <class T, int columns>
constexpr int kRowCopies = columns * kParts<T> < kLanes ? 1 : columns * kParts<T> / kLanes;

// The elements from the first of those to number `k`.
template <class T, int columns>
__device__ __forceinline__ uint32_t copy_offset(const Pitches& pitches, int k) {
  constexpr int kCopies = kRowCopies<T, columns>;
  return k / kCopies * pitches.in + k % kCopies * (kLanes / kParts<T>)*pitches.pixel;
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
