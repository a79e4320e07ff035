#pragma once

// The rows of depthwise_backward.cu: how they lie in shared memory, and how they get there.

#include "cuda/columns.cuh"

namespace moat_kernels::cuda::backward {

// How far above and left of a position its taps reach in the output.
template <int stride>
constexpr int kReach = stride == 1 ? 2 : 1;
// Rows of dz2 that a position sees, and the unrolling of the loop over the rows in which nothing
// moves when they roll on. At stride 2, where a row is as much work as four, one moves.
template <int stride>
constexpr int kRows = kReach<stride> + 1;
template <int stride>
constexpr int kPhases = stride == 1 ? kRows<1> : 1;

// Columns of a warp, rows that are on their way, and blocks that a multiprocessor is to hold.
template <int stride>
constexpr int kWide = 2;
template <class T, int stride>
constexpr int kStages = (stride == 1 ? 10 : 4) / static_cast<int>(sizeof(T));
template <int stride>
constexpr int kHeldBlocks = 2;

struct BackwardArguments {
  DepthwiseShape shape;
  TileGrid grid;
  int first_row, first_column;  // of the grid of positions
  Pitches pitches;
  const void* dy2;
  NormBackward norm;
  const void* z1;
  Prologue prologue;
  const float* weights;
  void* dpre;
  float* partials;
};

// A row of a warp as it is stored: its columns of dy2, then of z2, and their input pixels. The
// halo's warp, which is the last, has no input.
template <int stride>
constexpr int kRawOutput = 2 * kWide<stride> * kChunk;
template <int stride>
constexpr int kRaw = kRawOutput<stride> + stride * stride * kWide<stride> * kChunk;
template <int stride>
constexpr int kRawRow = kMostWorkers<kWide<stride>> * kRaw<stride> + kRawOutput<stride>;

// What a warp shows of its dz2: to the left its first column, which no position of stride 2 sees,
// to the right its last. It does so in the place behind its own number; what the halo's warp has to
// the left of the tile comes first. Behind both lie its channels' constants of dz2.
template <int stride>
constexpr int kSides = kReach<stride>;
template <int stride>
using RingRow = float2[kMostWarps<kWide<stride>> + 1][kSides<stride> + 1][kLanes];

// What a warp has to know of its tile where some of a row lies outside of the map: in shared
// memory, where all of its threads write the same, it takes no registers.
struct WarpTile {
  bool is_halo;
  int rows, end;                      // of positions, and of dz2
  int y;                              // the first position's first input row
  int output_columns, input_columns;  // those inside the map, a bit for each
};

template <class T, int stride>
union alignas(16) BackwardShared {
  struct {
    T raw[kStages<T, stride>][kRawRow<stride>];
    RingRow<stride> ring[2];
    WarpTile warps[kMostWarps<kWide<stride>>];
    Tiles tiles;
    TileCounter loaded[kMostWarps<kWide<stride>>], walked[kMostWarps<kWide<stride>>];
  } rows;
  float gradients[kMostWorkers<kWide<stride>>][kGradientRows][kChunk];
};

// More rows than a tile has.
constexpr int kMostLeft = 0x7fffffff;

// The rows of a tile, from its first position.
struct RowRange {
  int position;  // the first one's
  int first;     // rows above the map are zeros, as the window is
};

template <int stride>
__device__ __forceinline__ RowRange rows_of(const BackwardArguments& arguments, const Tile& tile) {
  const int position = arguments.first_row + tile.row;
  return {position, max(-kReach<stride>, -position)};
}

// The column of dz2 that a warp has for one of positions.
template <int stride>
__device__ __forceinline__ int output_column(const BackwardArguments& arguments, const Tile& tile,
                                             int column) {
  return arguments.first_column + tile.column + column - (kReach<stride> - 1);
}

// The first input column of a position.
template <int stride>
__device__ __forceinline__ int input_column(const BackwardArguments& arguments, const Tile& tile,
                                            int column) {
  return (arguments.first_column + tile.column + column) * stride - arguments.shape.left;
}

// Copies a warp's rows, one at a time, of all tiles of the block.
template <class T, int stride>
class Loader {
 public:
  __device__ __forceinline__ Loader(const BackwardArguments& arguments,
                                    BackwardShared<T, stride>& shared)
      : arguments_(arguments), shared_(shared) {
    begin_tile();
  }

  // The next row; `to` is the thread's place in a row of the warp.
  __device__ __forceinline__ void load(T* to) {
    const Pitches& pitches = arguments_.pitches;
    if (left_ >= outputs_last_) {
      copy_async(to, outputs_from_);
      if (kOutputs == 2) copy_async(to + kLanes * kPart<T>, outputs_from_ + z2_distance());
    }
    outputs_from_ += pitches.out;
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      const bool copies = kRowInputs == 1 || (input_copies_ >> k % kRowInputs & 1);
      const RowsLeft& rows = inputs_[k / kRowInputs];
      // At stride 1 they reach to the end of the tile.
      const bool contained = stride == 1 ? within(left_ - 1, rows.count) : rows.contains(left_);
      if (copies && contained) {
        copy_async(to + (kRawOutput<stride> + k * kLanes * kPart<T>),
                   inputs_from_ + copy_offset<T, kWide<stride> * stride>(pitches, k));
      }
    }
    inputs_from_ += pitches.step;
    close_copies();
    if (--left_ == 0) begin_tile();
  }

 private:
  static constexpr int kOutputs = divide_up(2 * kWide<stride> * kParts<T>, kLanes);
  static constexpr int kInputs = divide_up(stride * stride * kWide<stride> * kParts<T>, kLanes);
  static constexpr int kRowInputs = kRowCopies<T, kWide<stride> * stride>;

  // Without another tile there is nothing to copy: rows that are left become negative.
  __device__ __forceinline__ void begin_tile() {
    const Place place = place_in(arguments_.grid);
    const Tiles& tiles = shared_.rows.tiles;
    const int number = shared_.rows.loaded[place.warp].next();
    if (number >= tiles.count()) {
#pragma unroll
      for (RowsLeft& rows : inputs_) rows.count = 0;
      return;
    }
    const Tile tile = tiles.tile(arguments_.grid, number);
    const RowRange rows = rows_of<stride>(arguments_, tile);
    left_ = tile.rows - rows.first;
    begin_outputs(place, tile, rows);
    input_copies_ = 0;
#pragma unroll
    for (int k = 0; k < kInputs; ++k) begin_input(place, tile, rows, k);
  }

  __device__ __forceinline__ int64_t z2_distance() const {
    return static_cast<const T*>(arguments_.norm.z2) - static_cast<const T*>(arguments_.dy2);
  }

  // One copy, of which half of the warp has dy2 and half z2, or one of each.
  __device__ __forceinline__ void begin_outputs(const Place& place, const Tile& tile,
                                                const RowRange& rows) {
    constexpr int kRowParts = kWide<stride> * kParts<T>;
    static_assert(kRowParts * (3 - kOutputs) == kLanes, "or begin one at a time");
    const DepthwiseShape& shape = arguments_.shape;
    const int channel = place.first_channel + place.lane % kParts<T> * kPart<T>;
    const int column =
        column_of<kWide<stride>>(arguments_.grid, place, place.lane / kParts<T> % kWide<stride>);
    const int x = output_column<stride>(arguments_, tile, column);
    const bool copies = channel < shape.channels && column <= tile.columns + kReach<stride> - 2 &&
                        within(x, shape.out_width);
    const int y = rows.position + rows.first;
    outputs_from_ =
        static_cast<const T*>(place.lane < kRowParts ? arguments_.dy2 : arguments_.norm.z2) +
        ((tile.image * shape.out_height + y) * shape.out_width + x) * shape.channels + channel;
    outputs_last_ =
        copies && shape.out_height > y ? max(left_ - (shape.out_height - y), 0) + 1 : kMostLeft;
  }

  __device__ __forceinline__ void begin_input(const Place& place, const Tile& tile,
                                              const RowRange& rows, int k) {
    constexpr int kColumns = kWide<stride> * stride;
    const DepthwiseShape& shape = arguments_.shape;
    const int index = k * kLanes + place.lane;
    const int channel = place.first_channel + index % kParts<T> * kPart<T>;
    const int c = index / kParts<T> % kColumns;
    const int column = place.warp * kWide<stride> + c / stride;
    const int x = input_column<stride>(arguments_, tile, column) + c % stride;
    const int py = index / (kParts<T> * kColumns);
    const bool copies = py < stride && channel < shape.channels &&
                        place.warp < arguments_.grid.workers && column < tile.columns &&
                        within(x, shape.width);
    const int y = (rows.position + rows.first) * stride + py - shape.top;
    if (k == 0) {
      inputs_from_ = static_cast<const T*>(arguments_.z1) +
                     ((tile.image * shape.height + y) * shape.width + x) * shape.channels + channel;
    }
    if (copies) input_copies_ |= 1 << k % kRowInputs;
    // From the first row of a position in the tile and of a pixel in the map.
    inputs_[k / kRowInputs].set(
        left_, max(-rows.first, (stride - 1 - y) / stride),
        copies || kRowInputs > 1 ? min(left_, divide_up(shape.height - y, stride)) : 0);
  }

  const BackwardArguments& arguments_;
  BackwardShared<T, stride>& shared_;
  int left_;  // rows of the tile
  const T* outputs_from_;
  const T* inputs_from_;
  int input_copies_;  // those inside the map, a bit for each, of a row
  int outputs_last_;  // of the rows of dz2, which begin with the first
  RowsLeft inputs_[kInputs / kRowInputs];
};

}  // namespace moat_kernels::cuda::backward
