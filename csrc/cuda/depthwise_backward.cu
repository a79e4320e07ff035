// With dz2 = slope dy2 + z2_slope z2 + constant inside the output map and 0 outside (the batch norm
// behind the convolution; without it dz2 = dy2), y1 = scale z1 + shift and h1 = act(y1):
//
//   dpre[b, y, x, e] = act'(y1) sum over taps of w[i, j, e] dz2[b, (y + top - i) / stride,
//                                                                  (x + left - j) / stride, e]
//   dw[i, j, e]      = sum over pixels of dz2[that pixel] h1[b, y, x, e]
//   sums of dpre and of dpre z1 over all pixels, for the norm before the activation
//
// DRAM: reads dy2, z2 (if given) and z1, writes dpre, each once (dy2's and z2's halo again, mostly
// from L2); 11 floats per channel and group of tiles. On chip: rows of all three that are yet to
// come, and what the warps of a tile show each other of dz2, in shared memory; windows of dz2,
// taps, their gradients and the sums in registers. Both gradients share the window, and an input
// pixel is activated once.
//
// A column is the stride x stride input pixels that begin at one position of the output's grid:
// together they meet each of the nine taps once, so stride 2 wastes nothing and does not diverge.

#include "cuda/backward_rows.cuh"

namespace moat_kernels::cuda {
namespace {

using namespace backward;

// What depends on the channel only.
struct ChannelCoefficients : StencilCoefficients {
  float slope[kPair], z2_slope[kPair];
};

__device__ __forceinline__ ChannelCoefficients load_channels(const BackwardArguments& arguments,
                                                             int channel) {
  const int channels = arguments.shape.channels;
  ChannelCoefficients values;
  load_stencil(arguments.weights, arguments.prologue, channel, channels, values);
  // Without a norm dy2 is loaded as z2 too, and dz2 is the sum of its halves, which is exact.
  load_coefficients(arguments.norm.slope, channel, channels, 0.5f, values.slope);
  load_coefficients(arguments.norm.z2_slope, channel, channels, 0.5f, values.z2_slope);
  return values;
}

// What a thread adds up over its input pixels.
struct Gradients {
  float taps[kTaps][kPair] = {};
  float sum[kPair] = {};
  float product[kPair] = {};
};

// dz2 by [row][column], of which the warp's own begin at 1. Row `phase` is the newest one.
template <int stride>
struct Window {
  float rows[kRows<stride>][kWide<stride> + kReach<stride>][kPair];
};

// An input pixel at offset (py, px) of the position in column c: its dpre, and what it adds to the
// gradients.
template <class T, Activation activation, int stride>
__device__ __forceinline__ void input_pixel(int py, int px, int c, int phase,
                                            const Window<stride>& window,
                                            const ChannelCoefficients& coefficients,
                                            const Stored<T>& stored_z, T* dpre, bool stores,
                                            Gradients& gradients) {
  float z[kPair], gradient[kPair];
  widen(stored_z, z);
#pragma unroll
  for (int k = 0; k < kPair; ++k) {
    const float y1 = fmaf(coefficients.scale[k], z[k], coefficients.shift[k]);
    const ValueAndSlope h = activate_and_slope<activation>(y1);
    float sum = 0.0f;
#pragma unroll
    for (int i = py; i < 3; i += stride) {
#pragma unroll
      for (int j = px; j < 3; j += stride) {
        const int row = (phase + kRows<stride> - i / stride) % kRows<stride>;
        const float dz2 = window.rows[row][c + kReach<stride> - j / stride][k];
        sum = fmaf(coefficients.taps[3 * i + j][k], dz2, sum);
        gradients.taps[3 * i + j][k] = fmaf(h.value, dz2, gradients.taps[3 * i + j][k]);
      }
    }
    gradient[k] = sum * h.slope;
  }
  const Stored<T> stored = round_pair<T>(gradient);
  if (stores) store_pair(dpre, stored);
  widen(stored, gradient);
#pragma unroll
  for (int k = 0; k < kPair; ++k) {
    gradients.sum[k] += gradient[k];
    gradients.product[k] = fmaf(gradient[k], z[k], gradients.product[k]);
  }
}

// A thread's way down the tiles, one after the other. Rows count from the tile's first position.
template <class T, Activation activation, int stride>
class Walk {
 public:
  __device__ __forceinline__ Walk(const BackwardArguments& arguments, const Place& place,
                                  BackwardShared<T, stride>& shared)
      : arguments_(arguments),
        shared_(shared),
        stores_(place.channel < arguments.shape.channels),
        loader_(arguments, shared) {
    T* raw = shared.rows.raw[0] + place.warp * kRaw<stride>;
    to_ = held_shared(raw + place.lane * kPart<T>);
    raw_ = held_shared(raw + place.lane * kPair);
    own_ = held_shared(&shared.rows.ring[0][place.warp + 1][0][place.lane]);
    float constants[kPair];
    load_coefficients(arguments.norm.constant, place.channel, arguments.shape.channels, 0.0f,
                      constants);
    for (auto& row : shared.rows.ring) {
      row[place.warp + 1][kSides<stride>][place.lane] = {constants[0], constants[1]};
    }
#pragma unroll 1
    for (int stage = 0; stage < kStages<T, stride>; ++stage) {
      loader_.load(to_ + stage * kRawRow<stride>);
    }
  }

  // False where there is no other.
  __device__ __forceinline__ bool begin_tile() {
    const Place place = place_in(arguments_.grid);
    const int number = shared_.rows.walked[place.warp].next();
    if (number >= shared_.rows.tiles.count()) return false;
    const Tile tile = shared_.rows.tiles.tile(arguments_.grid, number);
    const DepthwiseShape& shape = arguments_.shape;
    const RowRange rows = rows_of<stride>(arguments_, tile);
    left_ = tile.rows - rows.first;
    WarpTile mine = {};
    mine.rows = tile.rows;
    mine.end = min(tile.rows, shape.out_height - rows.position);
    mine.y = rows.position * stride - shape.top;
#pragma unroll
    for (int c = 0; c < kWide<stride>; ++c) {
      const int column = column_of<kWide<stride>>(arguments_.grid, place, c);
      const int x = output_column<stride>(arguments_, tile, column);
      if (column <= tile.columns + kReach<stride> - 2 && within(x, shape.out_width)) {
        mine.output_columns |= 1 << c;
      }
    }
    mine.is_halo = place.warp == arguments_.grid.workers;
    const int first = place.warp * kWide<stride>;
    const int x = input_column<stride>(arguments_, tile, first);
#pragma unroll
    for (int c = 0; c < kWide<stride> * stride; ++c) {
      if (!mine.is_halo && first + c / stride < tile.columns && within(x + c, shape.width)) {
        mine.input_columns |= 1 << c;
      }
    }
    shared_.rows.warps[place.warp] = mine;
    const bool whole = mine.output_columns == (1 << kWide<stride>)-1 &&
                       mine.input_columns == (1 << kWide<stride> * stride) - 1;
    const int first_whole = max(0, divide_up(-mine.y, stride));
    const int end_whole = whole ? min(mine.end, (shape.height - mine.y) / stride) : 0;
    whole_.set(left_, first_whole - rows.first, end_whole - rows.first);
    const int y = mine.y + rows.first * stride;
    dpre_ = static_cast<T*>(arguments_.dpre) +
            ((tile.image * shape.height + y) * shape.width + x) * shape.channels + place.channel;
#pragma unroll
    for (auto& row : window_.rows) {
#pragma unroll
      for (auto& column : row) column[0] = column[1] = 0.0f;
    }
    return true;
  }

  __device__ __forceinline__ bool done() const { return left_ == 0; }

  // One row.
  template <int phase>
  __device__ __forceinline__ void step(const ChannelCoefficients& coefficients,
                                       Gradients& gradients) {
    wait_for_copies_but<kStages<T, stride> - 1>();
    __syncwarp();
    if (whole_.contains(left_)) {
      step<phase, true>(coefficients, gradients);
    } else {
      step<phase, false>(coefficients, gradients);
    }
    dpre_ += arguments_.pitches.step;
    --left_;
  }

 private:
  static constexpr int kPlace = (kSides<stride> + 1) * kLanes;
  static constexpr int kRingRow = (kMostWarps<kWide<stride>> + 1) * kPlace;

  // `whole`: nothing in it lies outside of the map.
  template <int phase, bool whole>
  __device__ __forceinline__ void step(const ChannelCoefficients& coefficients,
                                       Gradients& gradients) {
    constexpr int wide = kWide<stride>;
    if constexpr (stride == 2) {
#pragma unroll
      for (int column = 0; column < wide + kReach<stride>; ++column) {
#pragma unroll
        for (int k = 0; k < kPair; ++k) window_.rows[1][column][k] = window_.rows[0][column][k];
      }
    }
    WarpTile tile;
    int number = 0;
    if constexpr (!whole) {
      tile = shared_.rows.warps[thread_number() / kLanes];
      number = tile.rows - left_;
    }
    auto& row = window_.rows[phase];
    const float2* own_constants = own_ + parity_ + kSides<stride> * kLanes;
    const float constants[kPair] = {own_constants->x, own_constants->y};
#pragma unroll
    for (int c = 0; c < wide; ++c) {
      if (!whole) row[c + 1][0] = row[c + 1][1] = 0.0f;
      if (whole || (number < tile.end && (tile.output_columns >> c & 1))) {
        read_output(c, coefficients, constants, row[c + 1]);
      }
    }
    float2* own = own_ + parity_;
    parity_ = kRingRow - parity_;
    float2* last = own + (kSides<stride> - 1) * kLanes;
    if (!whole && tile.is_halo) last -= (arguments_.grid.workers + 1) * kPlace;
    if (stride == 1) own[0] = {row[1][0], row[1][1]};
    *last = {row[wide][0], row[wide][1]};
    const bool works = whole || tile.input_columns != 0;
    Stored<T> z[stride * wide];
    if (works) read_inputs(0, z);
    __syncthreads();
    if (stride == 1 || !works) next_stage();
    if (!works) return;
    show(own[-2 * kLanes], row[0]);
    if (stride == 1) show(own[kPlace], row[wide + kReach<stride> - 1]);
#pragma unroll
    for (int py = 0; py < stride; ++py) {
      if (py == 1) {
        read_inputs(1, z);
        __syncwarp();
        next_stage();
      }
      const bool inside =
          whole || (number >= 0 && within(tile.y + number * stride + py, arguments_.shape.height));
#pragma unroll
      for (int c = 0; c < stride * wide; ++c) {
        if (whole || (inside && (tile.input_columns >> c & 1))) {
          input_pixel<T, activation, stride>(
              py, c % stride, c / stride, phase, window_, coefficients, z[c],
              dpre_ + (py * arguments_.pitches.in + c * arguments_.pitches.pixel), stores_,
              gradients);
        }
      }
    }
  }

  __device__ __forceinline__ void read_inputs(int py,
                                              Stored<T> (&z)[stride * kWide<stride>]) const {
#pragma unroll
    for (int c = 0; c < stride * kWide<stride>; ++c) {
      z[c] = load_pair(raw_ + stage_ + kRawOutput<stride> +
                       (py * stride * kWide<stride> + c) * kChunk);
    }
  }

  // Copies another row to where this one was, which all threads of the warp have read.
  __device__ __forceinline__ void next_stage() {
    loader_.load(to_ + stage_);
    stage_ += kRawRow<stride>;
    if (stage_ == kStages<T, stride> * kRawRow<stride>) stage_ = 0;
  }

  __device__ __forceinline__ void read_output(int c, const ChannelCoefficients& coefficients,
                                              const float (&constants)[kPair],
                                              float (&dz2)[kPair]) const {
    const T* raw = raw_ + stage_ + c * kChunk;
    float gradient[kPair], z[kPair];
    widen(load_pair(raw), gradient);
    widen(load_pair(raw + kWide<stride> * kChunk), z);
#pragma unroll
    for (int k = 0; k < kPair; ++k) {
      dz2[k] = fmaf(coefficients.slope[k], gradient[k],
                    fmaf(coefficients.z2_slope[k], z[k], constants[k]));
    }
  }

  static __device__ __forceinline__ void show(float2 values, float (&column)[kPair]) {
    column[0] = values.x;
    column[1] = values.y;
  }

  const BackwardArguments& arguments_;
  BackwardShared<T, stride>& shared_;
  bool stores_;  // the thread has channels
  Loader<T, stride> loader_;
  T* to_;  // where the thread's copies go, and where its channels are found, in the first stage
  const T* raw_;
  float2* own_;                 // what the warp shows
  int stage_ = 0, parity_ = 0;  // offsets of the row
  int left_;                    // rows of the tile
  RowsLeft whole_;              // those in which nothing lies outside of the map
  T* dpre_;                     // of the position's first input pixel
  Window<stride> window_;
};

// Adds up all warps, in an order that is always the same, and writes one row of `partials`.
template <int most_workers>
__device__ __forceinline__ void write_gradients(
    const BackwardArguments& arguments, const Place& place, const Gradients& gradients,
    float (&shared)[most_workers][kGradientRows][kChunk]) {
  const int workers = arguments.grid.workers;
  const int channels = arguments.shape.channels;
  if (place.warp < workers) {
#pragma unroll
    for (int row = 0; row < kGradientRows; ++row) {
      FloatPair values;
#pragma unroll
      for (int c = 0; c < kPair; ++c) {
        values.values[c] = row < kTaps ? gradients.taps[row < kTaps ? row : 0][c]
                                       : (row == kTaps ? gradients.sum[c] : gradients.product[c]);
      }
      pack_at<float, kPair>(&shared[place.warp][row][place.lane * kPair]) = values;
    }
  }
  __syncthreads();
  const int threads = (workers + 1) * kLanes;
  float* partial = arguments.partials + split_of(arguments.grid) * kGradientRows * channels +
                   place.first_channel;
  for (int index = threadIdx.x; index < kGradientRows * kChunk; index += threads) {
    const int row = index / kChunk;
    const int channel = index % kChunk;
    if (place.first_channel + channel >= channels) continue;
    float value = 0.0f;
    for (int worker = 0; worker < workers; ++worker) value += shared[worker][row][channel];
    partial[row * channels + channel] = value;
  }
}

template <class T, Activation activation, int stride>
__global__ void __launch_bounds__(kMostWarps<kWide<stride>>* kLanes, kHeldBlocks<stride>)
    depthwise_backward_kernel(BackwardArguments arguments) {
  auto& shared = shared_memory<BackwardShared<T, stride>>();
  const Place place = place_in(arguments.grid);
  shared.rows.tiles.begin(arguments.grid);
  shared.rows.loaded[place.warp].begin();
  shared.rows.walked[place.warp].begin();
  Walk<T, activation, stride> walk(arguments, place, shared);
  const ChannelCoefficients coefficients = load_channels(arguments, place.channel);
  Gradients gradients;
  while (walk.begin_tile()) {
    while (!walk.done()) {
      walk.template step<0>(coefficients, gradients);
      if constexpr (kPhases<stride> > 1) {
        if (walk.done()) break;
        walk.template step<1>(coefficients, gradients);
        if (walk.done()) break;
        walk.template step<2>(coefficients, gradients);
      }
    }
  }
  __syncthreads();
  write_gradients(arguments, place, gradients, shared.gradients);
}

// The positions whose input pixels lie in the map: rows first_row.. of the output's grid.
TileGrid backward_grid(const DepthwiseShape& shape, const BlockPlan& plan) {
  const int rows = (shape.top + shape.height - 1) / shape.stride - shape.top / shape.stride + 1;
  const int columns = (shape.left + shape.width - 1) / shape.stride - shape.left / shape.stride + 1;
  return divide_map(shape, rows, columns, plan, shape.stride == 1 ? kWide<1> : kWide<2>);
}

template <class T, Activation activation>
int launch_backward(const BackwardArguments& arguments, void* stream) {
  const auto kernel = arguments.shape.stride == 1 ? &depthwise_backward_kernel<T, activation, 1>
                                                  : &depthwise_backward_kernel<T, activation, 2>;
  const TileGrid& grid = arguments.grid;
  return launch(kernel, grid.splits * grid.chunks, (grid.workers + 1) * kLanes, stream, arguments);
}

}  // namespace

int64_t depthwise_backward_partials(const DepthwiseShape& shape, const BlockPlan& plan) {
  return backward_grid(shape, plan).splits;
}

int depthwise_backward(const DepthwiseShape& shape, Element type, const void* dy2,
                       NormBackward norm, const void* z1, Prologue prologue, const float* weights,
                       void* dpre, float* partials, const BlockPlan& plan, void* stream) {
  const BackwardArguments arguments = {
      shape,
      backward_grid(shape, plan),
      shape.top / shape.stride,
      shape.left / shape.stride,
      pitches_of(shape, shape.stride),
      dy2,
      {norm.z2 ? norm.z2 : dy2, norm.slope, norm.z2_slope, norm.constant},
      z1,
      prologue,
      weights,
      dpre,
      partials};
  return with_element(type, [&](auto element) {
    using T = decltype(element);
    return prologue.activation == Activation::gelu
               ? launch_backward<T, Activation::gelu>(arguments, stream)
               : launch_backward<T, Activation::identity>(arguments, stream);
  });
}

}  // namespace moat_kernels::cuda
