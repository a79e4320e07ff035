// z2[b, y, x, e] = act2(bias[e] + sum over 3x3 taps of
//                       w[i, j, e] h1[b, y stride + i - top, x stride + j - left, e])
//
// with h1 = act(scale z1 + shift) inside the map and 0 outside: the padding follows the activation.
//
// DRAM: reads z1, writes z2, each once (a halo is read again, mostly from L2); per group of tiles
// 3 floats per channel of statistics. On chip: rows of z1 that are yet to come, and what the warps
// of a tile show each other of h1, in shared memory; taps, the sums of the outputs that a row
// contributes to, and statistics in registers. An input is activated once per tile.
//
// At stride 1 a column is an output and the input in its middle, at stride 2 an output and two
// columns of inputs, of which only the first has a neighbour that needs it.

#include "cuda/forward_rows.cuh"

namespace moat_kernels::cuda {
namespace {

using namespace forward;

// Sums of what a thread has seen of its channels, around the first value of each, so that nothing
// cancels where the mean is large.
struct Moments {
  float pivot[kPair] = {};
  float sum[kPair] = {};
  float square[kPair] = {};
  int count = 0;  // of whole tiles

  __device__ __forceinline__ void add(const float (&values)[kPair], bool is_first) {
#pragma unroll
    for (int c = 0; c < kPair; ++c) {
      if (is_first) pivot[c] = values[c];
      const float deviation = values[c] - pivot[c];
      sum[c] += deviation;
      square[c] = fmaf(deviation, deviation, square[c]);
    }
  }
};

// What depends on the channel only.
struct ChannelCoefficients : StencilCoefficients {
  float bias[kPair];
};

__device__ __forceinline__ ChannelCoefficients load_channels(const ForwardArguments& arguments,
                                                             int channel) {
  const int channels = arguments.shape.channels;
  ChannelCoefficients values;
  load_stencil(arguments.weights, arguments.prologue, channel, channels, values);
  load_coefficients(arguments.epilogue.bias, channel, channels, 0.0f, values.bias);
  return values;
}

// A thread's way down the tiles, one after the other.
template <class T, Activation activation, Activation output_activation, int stride>
class Walk {
 public:
  __device__ __forceinline__ Walk(const ForwardArguments& arguments, const Place& place,
                                  ForwardShared<T, stride>& shared)
      : arguments_(arguments),
        shared_(shared),
        stores_(place.channel < arguments.shape.channels),
        loader_(arguments, shared) {
    T* raw = shared.rows.raw[0][place.warp];
    to_ = held_shared(raw + place.lane * kPart<T>);
    raw_ = held_shared(raw + place.lane * kPair);
    own_ = held_shared(&shared.rows.ring[0][0][place.warp + 1][0][place.lane]);
#pragma unroll 1
    for (int stage = 0; stage < kStages<T, stride>; ++stage) loader_.load(to_ + stage * kRawRow);
  }

  // False where there is no other.
  __device__ __forceinline__ bool begin_tile(const ChannelCoefficients& coefficients,
                                             Moments& moments) {
    const Place place = place_in(arguments_.grid);
    const int number = shared_.rows.walked[place.warp].next();
    if (number >= shared_.rows.tiles.count()) return false;
    const Tile tile = shared_.rows.tiles.tile(arguments_.grid, number);
    const DepthwiseShape& shape = arguments_.shape;
    const StepRange steps = steps_of<stride>(shape, tile);
    left_ = steps.count;
    WarpTile mine = {};
    mine.rows = tile.rows;
    mine.end_row = steps.first + steps.count * kStepOutputs<stride>;
    mine.y = steps.y - steps.first * stride;
    mine.end = steps.end;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (input_column<stride>(arguments_, place, tile, c).needed) mine.input_columns |= 1 << c;
    }
    const int first = place.warp * kWide<stride>;
    mine.is_halo = place.warp == arguments_.grid.workers;
    mine.outputs = mine.is_halo ? 0 : min(max(tile.columns - first, 0), kWide<stride>);
    mine.pivot_row = moments.count == 0 ? 0 : -1;
    moments.count += mine.outputs * tile.rows;
    shared_.rows.warps[place.warp] = mine;
    // Whole steps: from the first with rows inside the map only, and no pivot, to the last.
    const bool whole = mine.input_columns == (1 << kColumns) - 1 && mine.outputs == kWide<stride>;
    const int first_whole = max(max(divide_up(-mine.y, stride), 0), mine.pivot_row + 1);
    const int end_whole =
        min(tile.rows - kStepOutputs<stride>, (steps.end - kStepInputs - mine.y) / stride) + 1;
    whole_.set(left_, divide_up(first_whole - steps.first, kStepOutputs<stride>),
               whole ? divide_up(end_whole - steps.first, kStepOutputs<stride>) : 0);
    z2_ = static_cast<T*>(arguments_.z2) +
          ((tile.image * shape.out_height + tile.row + steps.first) * shape.out_width +
           tile.column + first) *
              shape.channels +
          place.channel;
#pragma unroll
    for (auto& sums : sums_) {
#pragma unroll
      for (auto& sum : sums) {
#pragma unroll
        for (int k = 0; k < kPair; ++k) sum[k] = coefficients.bias[k];
      }
    }
    return true;
  }

  __device__ __forceinline__ bool done() const { return left_ == 0; }

  __device__ __forceinline__ void step(const ChannelCoefficients& coefficients, Moments& moments) {
    wait_for_copies_but<kStages<T, stride> - 1>();
    __syncwarp();
    if (whole_.contains(left_)) {
      step<true>(coefficients, moments);
    } else {
      step<false>(coefficients, moments);
    }
    z2_ += kStepOutputs<stride> * arguments_.pitches.out;
    --left_;
  }

 private:
  static constexpr int kColumns = kWide<stride> * stride;
  static constexpr int kRawRow = kMostWarps<kWide<stride>> * kRaw<stride>;
  static constexpr int kRingRow = (kMostWarps<kWide<stride>> + 1) * kSides<stride> * kLanes;
  static constexpr int kOwn = stride == 1 ? 1 : 0;

  // A row of h1: the warp's columns, from kOwn, and its neighbours'.
  struct Inputs {
    float columns[(kWide<stride> - 1) * stride + 3][kPair];
  };

  // `whole`: nothing in it lies outside of the map, or is the thread's first.
  template <bool whole>
  __device__ __forceinline__ void step(const ChannelCoefficients& coefficients, Moments& moments) {
    constexpr int wide = kWide<stride>;
    WarpTile tile;
    int row = 0;  // the first that the step completes
    if constexpr (!whole) {
      tile = shared_.rows.warps[thread_number() / kLanes];
      row = tile.end_row - left_ * kStepOutputs<stride>;
    }
    Inputs inputs[kStepInputs];
#pragma unroll
    for (int py = 0; py < kStepInputs; ++py) {
      const bool inside = whole || within(tile.y + row * stride + py, tile.end);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float (&h)[kPair] = inputs[py].columns[kOwn + c];
        if (!whole) h[0] = h[1] = 0.0f;
        if (whole || (inside && (tile.input_columns >> c & 1))) {
          read(py * kColumns + c, coefficients, h);
        }
      }
    }
    float2* own = own_ + parity_;
    float2* last = own + kLanes;
    if (!whole && tile.is_halo) last -= (arguments_.grid.workers + 1) * kSides<stride> * kLanes;
#pragma unroll
    for (int py = 0; py < kStepInputs; ++py) {
      const auto& left = inputs[py].columns[kOwn];
      const auto& right = inputs[py].columns[kOwn + kColumns - 1];
      own[py * kRingRow] = {left[0], left[1]};
      if (stride == 1) last[py * kRingRow] = {right[0], right[1]};
    }
    __syncthreads();
    loader_.load(to_ + stage_);
    stage_ += kRawRow;
    if (stage_ == kStages<T, stride> * kRawRow) stage_ = 0;
    parity_ = kStepInputs * kRingRow - parity_;
    if (!whole && tile.outputs == 0) return;
#pragma unroll
    for (int py = 0; py < kStepInputs; ++py) {
      if (stride == 1) show(own[py * kRingRow - kLanes], inputs[py].columns[0]);
      show(own[py * kRingRow + kSides<stride> * kLanes], inputs[py].columns[kOwn + kColumns]);
    }
#pragma unroll
    for (int c = 0; c < wide; ++c) {
      add<2>(c, inputs[0], sums_[0][c], sums_[0][c], coefficients);
      if constexpr (stride == 1) {
        add<1>(c, inputs[0], sums_[1][c], sums_[1][c], coefficients);
        add<2>(c, inputs[1], sums_[1][c], sums_[1][c], coefficients);
      }
    }
#pragma unroll
    for (int r = 0; r < kStepOutputs<stride>; ++r) {
      if (whole || within(row + r, tile.rows)) {
        finish<whole>(r, tile.outputs, row + r == tile.pivot_row, moments);
      }
    }
#pragma unroll
    for (int c = 0; c < wide; ++c) {
      add<0>(c, inputs[0], coefficients.bias, sums_[0][c], coefficients);
      add<1>(c, inputs[1], sums_[0][c], sums_[0][c], coefficients);
      if constexpr (stride == 1) {
        add<0>(c, inputs[1], coefficients.bias, sums_[1][c], coefficients);
      }
    }
  }

  __device__ __forceinline__ void read(int pixel, const ChannelCoefficients& coefficients,
                                       float (&h)[kPair]) const {
    widen(load_pair(raw_ + stage_ + pixel * kChunk), h);
#pragma unroll
    for (int k = 0; k < kPair; ++k) {
      h[k] = activate<activation>(fmaf(coefficients.scale[k], h[k], coefficients.shift[k]));
    }
  }

  static __device__ __forceinline__ void show(float2 values, float (&input)[kPair]) {
    input[0] = values.x;
    input[1] = values.y;
  }

  // before + what row i of the taps makes of a row of inputs, for the output in column c.
  template <int i>
  static __device__ __forceinline__ void add(int c, const Inputs& inputs,
                                             const float (&before)[kPair], float (&sums)[kPair],
                                             const ChannelCoefficients& coefficients) {
#pragma unroll
    for (int k = 0; k < kPair; ++k) {
      float sum = before[k];
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        sum = fmaf(coefficients.taps[3 * i + j][k], inputs.columns[c * stride + j][k], sum);
      }
      sums[k] = sum;
    }
  }

  // Rounds, stores and counts a complete row of outputs.
  template <bool whole>
  __device__ __forceinline__ void finish(int r, int outputs, bool is_first, Moments& moments) {
#pragma unroll
    for (int c = 0; c < kWide<stride>; ++c) {
      if (!whole && c >= outputs) return;
      float values[kPair];
#pragma unroll
      for (int k = 0; k < kPair; ++k) values[k] = activate<output_activation>(sums_[r][c][k]);
      const Stored<T> stored = round_pair<T>(values);
      if (stores_) {
        store_pair(z2_ + (r * arguments_.pitches.out + c * arguments_.pitches.pixel), stored);
      }
      widen(stored, values);
      moments.add(values, !whole && c == 0 && is_first);
    }
  }

  const ForwardArguments& arguments_;
  ForwardShared<T, stride>& shared_;
  bool stores_;  // the thread has channels
  Loader<T, stride> loader_;
  T* to_;  // where the thread's copies go, and where its channels are found, in the first stage
  const T* raw_;
  float2* own_;                 // what the warp shows
  int stage_ = 0, parity_ = 0;  // offsets of the row
  int left_;                    // steps of the tile
  RowsLeft whole_;              // those in which nothing lies outside of the map
  T* z2_;                       // of the first output
  // Of the outputs that are not complete, the older one first.
  float sums_[kReach<stride>][kWide<stride>][kPair];
};

// Merges the moments of all warps into one row of `partials`, in the order of the columns.
template <int most_workers>
__device__ __forceinline__ void write_moments(const ForwardArguments& arguments, const Place& place,
                                              const Moments& moments,
                                              SharedMoments<most_workers>& shared) {
  const int workers = arguments.grid.workers;
  if (place.warp < workers) {
#pragma unroll
    for (int c = 0; c < kPair; ++c) {
      const int channel = place.lane * kPair + c;
      const float mean = moments.count ? moments.sum[c] / moments.count : 0.0f;
      shared.pivot[place.warp][channel] = moments.pivot[c];
      shared.mean[place.warp][channel] = mean;
      shared.squares[place.warp][channel] = moments.square[c] - moments.sum[c] * mean;
    }
    if (place.lane == 0) shared.count[place.warp] = moments.count;
  }
  __syncthreads();
  const int channels = arguments.shape.channels;
  const int channel = threadIdx.x;
  if (channel >= kChunk || place.first_channel + channel >= channels) return;
  // Means around the first warp's pivot, whose difference from the others is exact.
  const float pivot = shared.pivot[0][channel];
  const auto mean_of = [&](int i) {
    return shared.pivot[i][channel] - pivot + shared.mean[i][channel];
  };
  float count = 0.0f;
  float mean = 0.0f;
  for (int i = 0; i < workers; ++i) {
    count += shared.count[i];
    mean += shared.count[i] * mean_of(i);
  }
  mean /= count;
  float squares = 0.0f;
  for (int i = 0; i < workers; ++i) {
    const float deviation = mean_of(i) - mean;
    squares += shared.squares[i][channel] + shared.count[i] * deviation * deviation;
  }
  float* partial =
      arguments.partials + split_of(arguments.grid) * kMomentRows * channels + place.first_channel;
  partial[channel] = count;
  partial[channels + channel] = pivot + mean;
  partial[2 * channels + channel] = squares;
}

template <class T, Activation activation, Activation output_activation, int stride>
__global__ void __launch_bounds__(kMostWarps<kWide<stride>>* kLanes, kHeldBlocks<stride>)
    depthwise_forward_kernel(ForwardArguments arguments) {
  auto& shared = shared_memory<ForwardShared<T, stride>>();
  const Place place = place_in(arguments.grid);
  shared.rows.tiles.begin(arguments.grid);
  shared.rows.loaded[place.warp].begin();
  shared.rows.walked[place.warp].begin();
  Walk<T, activation, output_activation, stride> walk(arguments, place, shared);
  const ChannelCoefficients coefficients = load_channels(arguments, place.channel);
  Moments moments;
  while (walk.begin_tile(coefficients, moments)) {
    do {
      walk.step(coefficients, moments);
    } while (!walk.done());
  }
  if (arguments.partials) write_moments(arguments, place, moments, shared.moments);
}

TileGrid forward_grid(const DepthwiseShape& shape, const BlockPlan& plan) {
  return divide_map(shape, shape.out_height, shape.out_width, plan,
                    shape.stride == 1 ? kWide<1> : kWide<2>);
}

template <class T, Activation activation, Activation output_activation>
int launch_forward(const ForwardArguments& arguments, void* stream) {
  const auto kernel = arguments.shape.stride == 1
                          ? &depthwise_forward_kernel<T, activation, output_activation, 1>
                          : &depthwise_forward_kernel<T, activation, output_activation, 2>;
  const TileGrid& grid = arguments.grid;
  // A block that writes moments has a thread for each of its channels: two warps.
  return launch(kernel, grid.splits * grid.chunks, (grid.workers + 1) * kLanes, stream, arguments);
}

template <class T, Activation activation>
int launch_forward(const ForwardArguments& arguments, void* stream) {
  return arguments.epilogue.activation == Activation::gelu
             ? launch_forward<T, activation, Activation::gelu>(arguments, stream)
             : launch_forward<T, activation, Activation::identity>(arguments, stream);
}

}  // namespace

int64_t depthwise_forward_partials(const DepthwiseShape& shape, const BlockPlan& plan) {
  return forward_grid(shape, plan).splits;
}

int depthwise_forward(const DepthwiseShape& shape, Element type, const void* z1, Prologue prologue,
                      const float* weights, Epilogue epilogue, void* z2, float* partials,
                      const BlockPlan& plan, void* stream) {
  const ForwardArguments arguments = {shape,
                                      forward_grid(shape, plan),
                                      pitches_of(shape, kStepInputs),
                                      prologue,
                                      z1,
                                      weights,
                                      epilogue,
                                      z2,
                                      partials};
  return with_element(type, [&](auto element) {
    using T = decltype(element);
    return prologue.activation == Activation::gelu
               ? launch_forward<T, Activation::gelu>(arguments, stream)
               : launch_forward<T, Activation::identity>(arguments, stream);
  });
}

}  // namespace moat_kernels::cuda
