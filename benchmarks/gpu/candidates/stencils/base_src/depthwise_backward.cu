// With dz2 = slope dy2 + z2_slope z2 + constant inside the output map and 0 outside (the batch norm
// behind the convolution; without it dz2 = dy2), y1 = scale z1 + shift and h1 = act(y1):
//
//   dpre[b, y, x, e] = act'(y1) sum over taps of w[i, j, e] dz2[b, (y + top - i) / stride,
//                                                                  (x + left - j) / stride, e]
//   dw[i, j, e]      = sum over pixels of dz2[that pixel] h1[b, y, x, e]
//   sums of dpre and of dpre z1 over all pixels, for the norm before the activation
//
// DRAM: reads dy2, z2 (if given) and z1, writes dpre, each once (dy2's and z2's halo again, mostly
// from L2); 11 floats per channel and group of tiles. On chip: rows of dz2, which the columns of a
// tile show each other, in shared memory; windows of dz2, taps, their gradients and the sums in
// registers. Both gradients share the window, and an input pixel is activated once.
//
// A warp owns the stride x stride input pixels that begin at one position of the output's grid:
// together they meet each of the nine taps once, so stride 2 wastes nothing and does not diverge.

#include "cuda/columns.cuh"

namespace moat_kernels::cuda {
namespace {

// How far above and left of a position its taps reach in the output.
template <int stride>
constexpr int kReach = stride == 1 ? 2 : 1;
template <int stride>
constexpr int kPhases = kReach<stride> + 1;

struct BackwardArguments {
  DepthwiseShape shape;
  TileGrid grid;
  int first_row, first_column;  // of the grid of positions
  Pitches pitches;
  int reach;  // kReach of the stride
  const void* dy2;
  NormBackward norm;
  const void* z1;
  Prologue prologue;
  const float* weights;
  void* dpre;
  float* partials;
};

template <int stride>
union alignas(16) BackwardShared {
  Ring<kPhases<stride>> ring;
  float gradients[kMostColumns][kGradientRows][kChunk];
};

// What depends on the channel only.
struct ChannelCoefficients : StencilCoefficients {
  float slope[kPair], z2_slope[kPair], constant[kPair];
};

__device__ __forceinline__ ChannelCoefficients load_channels(const BackwardArguments& arguments,
                                                             int channel) {
  const int channels = arguments.shape.channels;
  ChannelCoefficients values;
  load_stencil(arguments.weights, arguments.prologue, channel, channels, values);
  // Without a norm dy2 is loaded as z2 too, and dz2 is the sum of its halves, which is exact.
  load_coefficients(arguments.norm.slope, channel, channels, 0.5f, values.slope);
  load_coefficients(arguments.norm.z2_slope, channel, channels, 0.5f, values.z2_slope);
  load_coefficients(arguments.norm.constant, channel, channels, 0.0f, values.constant);
  return values;
}

// What a thread adds up over its input pixels.
struct Gradients {
  float taps[kTaps][kPair] = {};
  float sum[kPair] = {};
  float product[kPair] = {};
};

// dz2 by [row modulo kPhases][columns to the left].
template <int stride>
struct Window {
  float rows[kPhases<stride>][kReach<stride> + 1][kPair] = {};
};

// One input pixel at offset (py, px) of its position: its dpre, and what it adds to the gradients.
template <class T, Activation activation, int stride>
__device__ __forceinline__ void input_pixel(int py, int px, int phase, const Window<stride>& window,
                                            const ChannelCoefficients& coefficients,
                                            const Stored<T>& stored_z, T* dpre,
                                            Gradients& gradients) {
  float z[kPair], gradient[kPair];
  widen(stored_z, z);
#pragma unroll
  for (int c = 0; c < kPair; ++c) {
    const float y1 = fmaf(coefficients.scale[c], z[c], coefficients.shift[c]);
    const ValueAndSlope h = activate_and_slope<activation>(y1);
    float sum = 0.0f;
#pragma unroll
    for (int i = py; i < 3; i += stride) {
#pragma unroll
      for (int j = px; j < 3; j += stride) {
        const int row = (phase + kPhases<stride> - i / stride) % kPhases<stride>;
        const float dz2 = window.rows[row][j / stride][c];
        sum = fmaf(coefficients.taps[3 * i + j][c], dz2, sum);
        gradients.taps[3 * i + j][c] = fmaf(h.value, dz2, gradients.taps[3 * i + j][c]);
      }
    }
    gradient[c] = sum * h.slope;
  }
  const Stored<T> stored = round_pair<T>(gradient);
  store_pair(dpre, stored);
  widen(stored, gradient);
#pragma unroll
  for (int c = 0; c < kPair; ++c) {
    gradients.sum[c] += gradient[c];
    gradients.product[c] = fmaf(gradient[c], z[c], gradients.product[c]);
  }
}

// A thread's way down one tile. Rows count from the tile's first position.
template <class T, Activation activation, int stride>
class Walk {
 public:
  // `own` is the thread's place in the first row of the ring.
  __device__ __forceinline__ Walk(const BackwardArguments& arguments, const Place& place,
                                  const Tile& tile, float2* own)
      : own_(own), rows_(tile.rows), pitches_(arguments.pitches) {
    const DepthwiseShape& shape = arguments.shape;
    const bool has_channel = place.channel < shape.channels;
    // Rows above the map are zeros, as the window is.
    const int position = arguments.first_row + tile.row;
    row_ = max(-kReach<stride>, -position);
    const int left = arguments.first_column + tile.column - kReach<stride> + place.warp;
    const bool loads =
        has_channel && place.warp < tile.columns + kReach<stride> && within(left, shape.out_width);
    end_ = loads ? min(tile.rows, shape.out_height - position) : -kReach<stride>;
    out_offset_ = left * pitches_.pixel + place.channel;
    const int64_t out_at =
        (tile.image * shape.out_height + position + row_) * shape.out_width * shape.channels;
    dy2_ = held_global(static_cast<const T*>(arguments.dy2) + out_at);
    z2_ = held_global(static_cast<const T*>(arguments.norm.z2) + out_at);

    // Input rows count from the tile's first inside the map; `limit_` of those are the thread's.
    const bool works = has_channel && place.warp >= 1 && place.warp <= tile.columns;
    const int x = (arguments.first_column + tile.column + place.warp - 1) * stride - shape.left;
    const int top = max(position * stride - shape.top, 0);
    const int bottom = min((position + tile.rows) * stride - shape.top, shape.height);
#pragma unroll
    for (int px = 0; px < stride; ++px) {
      limit_[px] = works && within(x + px, shape.width) ? bottom - top : 0;
    }
    // At stride 1 all positions are inside.
    above_ = stride == 1 ? 0 : position * stride - shape.top - top;
    offset_ = x * pitches_.pixel + place.channel;
    const int64_t row_elements = int64_t{shape.width} * shape.channels;
    const int64_t at = (tile.image * shape.height + top + above_ + row_ * stride) * row_elements;
    z1_ = static_cast<const T*>(arguments.z1) + at;
    dpre_ = held_global(static_cast<T*>(arguments.dpre) + at);
#pragma unroll
    for (int phase = 0; phase < kPhases<stride>; ++phase) {
      load_output(phase, row_ + phase);
      load_input(phase, row_ + phase, offset_ + phase * pitches_.step);
    }
    z1_ = held_global(z1_ + kPhases<stride> * stride * row_elements);
  }

  __device__ __forceinline__ bool done() const { return row_ >= rows_; }

  // One row.
  template <int phase>
  __device__ __forceinline__ void step(const ChannelCoefficients& coefficients,
                                       Gradients& gradients) {
    float (&dz2)[kPair] = window_.rows[phase][kReach<stride> - 1];
    dz2[0] = dz2[1] = 0.0f;
    if (row_ < end_) {
      float gradient[kPair], z[kPair];
      widen(next_dy2_[phase], gradient);
      widen(next_z2_[phase], z);
#pragma unroll
      for (int c = 0; c < kPair; ++c) {
        dz2[c] = fmaf(coefficients.slope[c], gradient[c],
                      fmaf(coefficients.z2_slope[c], z[c], coefficients.constant[c]));
      }
    }
    float2* ring = own_ + phase * kRingColumns * kLanes;
    *ring = {dz2[0], dz2[1]};
    load_output(phase, row_ + kPhases<stride>);
    __syncthreads();
    const auto show = [&](int j, float2 values) {
      window_.rows[phase][j][0] = values.x;
      window_.rows[phase][j][1] = values.y;
    };
    show(kReach<stride>, ring[-kLanes]);
    if (stride == 1) show(0, ring[kLanes]);
#pragma unroll
    for (int py = 0; py < stride; ++py) {
#pragma unroll
      for (int px = 0; px < stride; ++px) {
        if (within(row_ * stride + above_ + py, limit_[px])) {
          input_pixel<T, activation, stride>(
              py, px, phase, window_, coefficients, next_z1_[phase][py][px],
              dpre_ + (offset_ + py * pitches_.in + px * pitches_.pixel), gradients);
        }
      }
    }
    load_input(phase, row_ + kPhases<stride>, offset_);
    offset_ += pitches_.step;
    ++row_;
  }

 private:
  __device__ __forceinline__ void load_output(int phase, int row) {
    if (row < end_) {
      next_dy2_[phase] = load_pair(dy2_ + out_offset_);
      next_z2_[phase] = load_pair(z2_ + out_offset_);
    }
    out_offset_ += pitches_.out;
  }

  __device__ __forceinline__ void load_input(int phase, int row, uint32_t offset) {
#pragma unroll
    for (int py = 0; py < stride; ++py) {
#pragma unroll
      for (int px = 0; px < stride; ++px) {
        if (within(row * stride + above_ + py, limit_[px])) {
          next_z1_[phase][py][px] =
              load_pair(z1_ + (offset + py * pitches_.in + px * pitches_.pixel));
        }
      }
    }
  }

  float2* own_;
  int rows_;
  const Pitches& pitches_;
  int row_;
  int end_;  // of the rows of dz2 that the thread loads
  int limit_[stride];
  int above_;
  // An address is a row of the tile's image, a thread's 32 bits added to it by one instruction.
  uint32_t out_offset_, offset_;
  const T* dy2_;
  const T* z2_;
  const T* z1_;
  T* dpre_;
  // Of the rows that are yet to come.
  Stored<T> next_dy2_[kPhases<stride>], next_z2_[kPhases<stride>];
  Stored<T> next_z1_[kPhases<stride>][stride][stride];
  Window<stride> window_;
};

// Adds up all columns, in an order that is always the same, and writes one row of `partials`.
__device__ __forceinline__ void write_gradients(
    const BackwardArguments& arguments, const Place& place, const Gradients& gradients,
    float (&shared)[kMostColumns][kGradientRows][kChunk]) {
  const int columns = arguments.grid.columns;
  const int channels = arguments.shape.channels;
  if (place.warp >= 1 && place.warp <= columns) {
#pragma unroll
    for (int row = 0; row < kGradientRows; ++row) {
      FloatPair values;
#pragma unroll
      for (int c = 0; c < kPair; ++c) {
        values.values[c] = row < kTaps ? gradients.taps[row < kTaps ? row : 0][c]
                                       : (row == kTaps ? gradients.sum[c] : gradients.product[c]);
      }
      pack_at<float, kPair>(&shared[place.warp - 1][row][place.lane * kPair]) = values;
    }
  }
  __syncthreads();
  const int first_channel = place.channel - place.lane * kPair;
  const int warps = columns + arguments.reach;
  float* partial =
      arguments.partials + split_of(arguments.grid) * kGradientRows * channels + first_channel;
  for (int index = threadIdx.x; index < kGradientRows * kChunk; index += warps * kLanes) {
    const int row = index / kChunk;
    const int channel = index % kChunk;
    if (first_channel + channel >= channels) continue;
    float value = 0.0f;
    for (int column = 0; column < columns; ++column) value += shared[column][row][channel];
    partial[row * channels + channel] = value;
  }
}

template <class T, Activation activation, int stride>
__global__ void __launch_bounds__(kMostWarps* kLanes)
    depthwise_backward_kernel(BackwardArguments arguments) {
  auto& shared = shared_memory<BackwardShared<stride>>();
  const Place place = place_in(arguments.grid);
  const ChannelCoefficients coefficients = load_channels(arguments, place.channel);
  float2* own = held_shared(&shared.ring.rows[0][place.warp + 1][place.lane]);
  Gradients gradients;
  for (Tiles tiles(arguments.grid); !tiles.done(); tiles.next(arguments.grid)) {
    Walk<T, activation, stride> walk(arguments, place, tiles.tile(arguments.grid), own);
    while (!walk.done()) {
      walk.template step<0>(coefficients, gradients);
      if (walk.done()) break;
      walk.template step<1>(coefficients, gradients);
      if constexpr (stride == 1) {
        if (walk.done()) break;
        walk.template step<2>(coefficients, gradients);
      }
    }
    __syncthreads();
  }
  write_gradients(arguments, place, gradients, shared.gradients);
}

// The positions whose input pixels lie in the map: rows first_row.. of the output's grid.
TileGrid backward_grid(const DepthwiseShape& shape, const BlockPlan& plan) {
  const int rows = (shape.top + shape.height - 1) / shape.stride - shape.top / shape.stride + 1;
  const int columns = (shape.left + shape.width - 1) / shape.stride - shape.left / shape.stride + 1;
  return divide_map(shape, rows, columns, plan);
}

template <class T, Activation activation>
int launch_backward(const BackwardArguments& arguments, void* stream) {
  const auto kernel = arguments.shape.stride == 1 ? &depthwise_backward_kernel<T, activation, 1>
                                                  : &depthwise_backward_kernel<T, activation, 2>;
  const TileGrid& grid = arguments.grid;
  return launch(kernel, grid.splits * grid.chunks, (grid.columns + arguments.reach) * kLanes,
                stream, arguments);
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
      pitches_of(shape),
      shape.stride == 1 ? kReach<1> : kReach<2>,
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
