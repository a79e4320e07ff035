#pragma once

// The rows of depthwise_forward.cu: how they lie in shared memory, and how they get there.

#include "cuda/columns.cuh"

namespace moat_kernels::cuda::forward {

// Rows of outputs that are begun and not complete after a step, which takes two rows of inputs and
// completes as many of outputs as there are in those.
template <int stride>
constexpr int kReach = stride == 1 ? 2 : 1;
constexpr int kStepInputs = 2;
template <int stride>
constexpr int kStepOutputs = kStepInputs / stride;

// Columns of a warp, steps that are on their way, and blocks that a multiprocessor is to hold.
template <int stride>
constexpr int kWide = 2;
template <class T, int stride>
constexpr int kStages = (stride == 1 ? 8 : 6) / static_cast<int>(sizeof(T));
template <int stride>
constexpr int kHeldBlocks = 2;

template <int workers>
struct SharedMoments {
  float pivot[workers][kChunk];
  float mean[workers][kChunk];  // less the pivot
  float squares[workers][kChunk];
  int count[workers];
};

// What a warp reads in a step, as it is stored.
template <int stride>
constexpr int kRaw = kStepInputs * kWide<stride> * stride * kChunk;

// What a warp shows of its inputs: to the left its first column, to the right, at stride 1, its
// last. It does so in the place behind its own number; what the halo's warp has to the left of the
// tile comes first.
template <int stride>
constexpr int kSides = kReach<stride>;
template <int stride>
using RingStep = float2[kStepInputs][kMostWarps<kWide<stride>> + 1][kSides<stride>][kLanes];

// What a warp has to know of its tile where some of a step lies outside of the map: in shared
// memory, where all of its threads write the same, it takes no registers.
struct WarpTile {
  bool is_halo;
  int rows, end_row;  // of outputs, and behind the last step
  int y, end;         // the input row of a step that begins with output 0; of all
  int input_columns;  // those inside the map, a bit for each
  int outputs;        // columns of those
  int pivot_row;      // whose output is the first that the thread sees; none is negative
};

// All warps have read their last row before the last barrier, behind which they write moments.
template <class T, int stride>
union alignas(16) ForwardShared {
  struct {
    T raw[kStages<T, stride>][kMostWarps<kWide<stride>>][kRaw<stride>];
    RingStep<stride> ring[2];
    WarpTile warps[kMostWarps<kWide<stride>>];
    Tiles tiles;
    TileCounter loaded[kMostWarps<kWide<stride>>], walked[kMostWarps<kWide<stride>>];
  } rows;
  SharedMoments<kMostWorkers<kWide<stride>>> moments;

  static_assert(sizeof(moments) <= sizeof(rows.raw), "the ring is still being read");
};

struct ForwardArguments {
  DepthwiseShape shape;
  TileGrid grid;
  Pitches pitches;
  Prologue prologue;
  const void* z1;
  const float* weights;
  Epilogue epilogue;
  void* z2;
  float* partials;
};

// The steps of a tile, by the rows of outputs that they complete, from the tile's first.
struct StepRange {
  int first;  // what lies above the map would add nothing
  int count;
  int y;    // the first input row of the first step
  int end;  // of the input rows
};

template <int stride>
__device__ __forceinline__ StepRange steps_of(const DepthwiseShape& shape, const Tile& tile) {
  StepRange steps;
  steps.first = max(-kReach<stride>, min(0, shape.top / stride - tile.row - kReach<stride>));
  steps.count = divide_up(tile.rows - steps.first, kStepOutputs<stride>);
  steps.y = (tile.row + steps.first + kReach<stride>)*stride - shape.top;
  steps.end = min((tile.row + tile.rows - 1) * stride - shape.top + 3, shape.height);
  return steps;
}

// Input column `c` of a warp, of `stride` for each of its columns.
struct InputColumn {
  int x;
  bool needed;  // inside the map
};

template <int stride>
__device__ __forceinline__ InputColumn input_column(const ForwardArguments& arguments,
                                                    const Place& place, const Tile& tile, int c) {
  const int column = column_of<kWide<stride>>(arguments.grid, place, c / stride);
  InputColumn input;
  input.x =
      (tile.column + column) * stride + c % stride - arguments.shape.left + (stride == 1 ? 1 : 0);
  const bool needed = stride == 1 ? column <= tile.columns
                                  : column >= 0 && (column < tile.columns ||
                                                    (column == tile.columns && c % stride == 0));
  input.needed = needed && within(input.x, arguments.shape.width);
  return input;
}

// Copies a warp's rows, one step at a time, of all tiles of the block.
template <class T, int stride>
class Loader {
 public:
  __device__ __forceinline__ Loader(const ForwardArguments& arguments,
                                    ForwardShared<T, stride>& shared)
      : arguments_(arguments), shared_(shared) {
    begin_tile();
  }

  // The next step; `to` is the thread's place in a row of the warp.
  __device__ __forceinline__ void load(T* to) {
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      if (copied_[k].contains(left_)) {
        copy_async(to + k * kLanes * kPart<T>,
                   from_ + copy_offset<T, kColumns>(arguments_.pitches, k));
      }
    }
    from_ += arguments_.pitches.step;
    close_copies();
    if (--left_ == 0) begin_tile();
  }

 private:
  static constexpr int kColumns = kWide<stride> * stride;
  static constexpr int kCopies = divide_up(kStepInputs * kColumns * kParts<T>, kLanes);

  // Without another tile there is nothing to copy: rows that are left become negative.
  __device__ __forceinline__ void begin_tile() {
    const Place place = place_in(arguments_.grid);
    const Tiles& tiles = shared_.rows.tiles;
    const int number = shared_.rows.loaded[place.warp].next();
    if (number >= tiles.count()) {
#pragma unroll
      for (RowsLeft& rows : copied_) rows.count = 0;
      return;
    }
    const DepthwiseShape& shape = arguments_.shape;
    const Tile tile = tiles.tile(arguments_.grid, number);
    const StepRange steps = steps_of<stride>(shape, tile);
    left_ = steps.count;
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      const int index = k * kLanes + place.lane;
      const int channel = place.first_channel + index % kParts<T> * kPart<T>;
      const InputColumn column =
          input_column<stride>(arguments_, place, tile, index / kParts<T> % kColumns);
      const int py = index / (kParts<T> * kColumns);
      const bool copies = py < kStepInputs && channel < shape.channels && column.needed;
      const int y = steps.y + py;
      if (k == 0) {
        from_ = static_cast<const T*>(arguments_.z1) +
                ((tile.image * shape.height + y) * shape.width + column.x) * shape.channels +
                channel;
      }
      // From the first row inside the map.
      copied_[k].set(left_, max(0, (kStepInputs - 1 - y) / kStepInputs),
                     copies ? min(left_, divide_up(steps.end - y, kStepInputs)) : 0);
    }
  }

  const ForwardArguments& arguments_;
  ForwardShared<T, stride>& shared_;
  int left_;  // steps of the tile
  const T* from_;
  RowsLeft copied_[kCopies];
};

}  // namespace moat_kernels::cuda::forward
