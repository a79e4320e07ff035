// z2[b, y, x, e] = act2(bias[e] + sum over 3x3 taps of
//                       w[i, j, e] h1[b, y stride + i - top, x stride + j - left, e])
//
// with h1 = act(scale z1 + shift) inside the map and 0 outside: the padding follows the activation.
//
// DRAM: reads z1, writes z2, each once (a halo is read again, mostly from L2); per group of tiles
// 3 floats per channel of statistics. On chip: rows of h1, which the columns of a tile show each
// other, in shared memory; taps, the sums of the outputs that a row contributes to, and statistics
// in registers. An input is activated once per tile.
//
// At stride 1 a warp owns an output and the input in its middle, at stride 2 an output and two
// columns of inputs, of which only the first has a neighbour that needs it.

#include "cuda/columns.cuh"

namespace moat_kernels::cuda {
namespace {

// Steps down before the first output is complete.
template <int stride>
constexpr int kReach = stride == 1 ? 2 : 1;
template <int stride>
constexpr int kPhases = kReach<stride> + 1;
// The warp of the first output.
template <int stride>
constexpr int kFirstWarp = stride == 1 ? 1 : 0;

// Warps that a multiprocessor is to hold at once, of one block or several, as far as registers
// allow: in 16 bits and at stride 1 three blocks of 7 columns.
template <class T, int stride>
constexpr int kHeldWarps = stride == 2 ? kMostWarps : (sizeof(T) == 2 ? 28 : 20);

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

struct SharedMoments {
  float pivot[kMostColumns][kChunk];
  float mean[kMostColumns][kChunk];  // less the pivot
  float squares[kMostColumns][kChunk];
  int count[kMostColumns];
};

template <int stride>
union alignas(16) ForwardShared {
  Ring<kPhases<stride> * stride> ring;
  SharedMoments moments;
};

struct ForwardArguments {
  DepthwiseShape shape;
  TileGrid grid;
  Pitches pitches;
  int reach;  // kReach of the stride
  Prologue prologue;
  const void* z1;
  const float* weights;
  Epilogue epilogue;
  void* z2;
  float* partials;
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

// A thread's way down one tile. Step `row` loads the inputs that complete output `row` of the tile.
template <class T, Activation activation, Activation output_activation, int stride>
class Walk {
 public:
  // `own` is the thread's place in the first row of the ring.
  __device__ __forceinline__ Walk(const ForwardArguments& arguments, const Place& place,
                                  const Tile& tile, const ChannelCoefficients& coefficients,
                                  float2* own, Moments& moments)
      : own_(own), rows_(tile.rows), pitches_(arguments.pitches) {
    const DepthwiseShape& shape = arguments.shape;
    const bool has_channel = place.channel < shape.channels;
    // Steps whose inputs lie above the map would add nothing.
    row_ = max(-kReach<stride>, min(0, shape.top / stride - tile.row - kReach<stride>));
    const int column = tile.column + place.warp - kFirstWarp<stride>;
    const bool works = has_channel && column >= tile.column && column < tile.column + tile.columns;
    out_end_ = works ? tile.rows : 0;
    pivot_row_ = moments.count == 0 ? 0 : -1;
    moments.count += out_end_;
    out_offset_ = column * pitches_.pixel + place.channel;
    const int64_t out_at =
        (tile.image * shape.out_height + tile.row + row_) * shape.out_width * shape.channels;
    z2_ = held_global(static_cast<T*>(arguments.z2) + out_at);

    const bool loads = has_channel && place.warp < tile.columns + kReach<stride>;
    const int x = (tile.column + place.warp) * stride - shape.left;
    const int bottom = min((tile.row + tile.rows - 1) * stride - shape.top + 3, shape.height);
#pragma unroll
    for (int px = 0; px < stride; ++px) {
      limit_[px] = loads && (px == 0 || works) && within(x + px, shape.width) ? max(bottom, 0) : 0;
    }
    y_ = (tile.row + row_ + kReach<stride>)*stride - shape.top;
    offset_ = x * pitches_.pixel + place.channel;
    const int64_t row_elements = int64_t{shape.width} * shape.channels;
    z1_ = static_cast<const T*>(arguments.z1) + (tile.image * shape.height + y_) * row_elements;
#pragma unroll
    for (int phase = 0; phase < kPhases<stride>; ++phase) {
      load(phase, y_ + phase * stride, offset_ + phase * pitches_.step);
#pragma unroll
      for (int c = 0; c < kPair; ++c) sums_[phase][c] = coefficients.bias[c];
    }
    z1_ = held_global(z1_ + kPhases<stride> * stride * row_elements);
  }

  __device__ __forceinline__ bool done() const { return row_ >= rows_; }

  template <int phase>
  __device__ __forceinline__ void step(const ChannelCoefficients& coefficients, Moments& moments) {
    float inputs[stride][3][kPair];
    float2* ring = own_ + phase * stride * kRingColumns * kLanes;
#pragma unroll
    for (int py = 0; py < stride; ++py) {
#pragma unroll
      for (int px = 0; px < stride; ++px) {
        float (&h)[kPair] = inputs[py][px + kFirstWarp<stride>];
        h[0] = h[1] = 0.0f;
        if (within(y_ + py, limit_[px])) {
          widen(next_[phase][py][px], h);
#pragma unroll
          for (int c = 0; c < kPair; ++c) {
            h[c] = activate<activation>(fmaf(coefficients.scale[c], h[c], coefficients.shift[c]));
          }
        }
      }
      const float (&first)[kPair] = inputs[py][kFirstWarp<stride>];
      ring[py * kRingColumns * kLanes] = {first[0], first[1]};
    }
    load(phase, y_ + kPhases<stride> * stride, offset_);
    offset_ += pitches_.step;
    __syncthreads();
#pragma unroll
    for (int py = 0; py < stride; ++py) {
      const float2* row = ring + py * kRingColumns * kLanes;
      show(row[kLanes], inputs[py][2]);
      if (stride == 1) show(row[-kLanes], inputs[py][0]);
    }
    finish<(phase + 1) % kPhases<stride>>(inputs[0], coefficients, moments);
    if constexpr (stride == 1) {
      add<1>((phase + 2) % 3, inputs[0], coefficients);
      add<0>(phase, inputs[0], coefficients);
    } else {
      add<0>(phase, inputs[0], coefficients);
      add<1>(phase, inputs[1], coefficients);
    }
    y_ += stride;
    ++row_;
  }

 private:
  __device__ __forceinline__ void load(int phase, int y, uint32_t offset) {
#pragma unroll
    for (int py = 0; py < stride; ++py) {
#pragma unroll
      for (int px = 0; px < stride; ++px) {
        if (within(y + py, limit_[px])) {
          next_[phase][py][px] = load_pair(z1_ + (offset + py * pitches_.in + px * pitches_.pixel));
        }
      }
    }
  }

  static __device__ __forceinline__ void show(float2 values, float (&input)[kPair]) {
    input[0] = values.x;
    input[1] = values.y;
  }

  // What row i of the taps makes of a row of inputs.
  template <int i>
  __device__ __forceinline__ void add(int output, const float (&inputs)[3][kPair],
                                      const ChannelCoefficients& coefficients) {
#pragma unroll
    for (int c = 0; c < kPair; ++c) {
      float sum = i == 0 ? coefficients.bias[c] : sums_[output][c];
#pragma unroll
      for (int j = 0; j < 3; ++j) sum = fmaf(coefficients.taps[3 * i + j][c], inputs[j][c], sum);
      sums_[output][c] = sum;
    }
  }

  // Rounds, stores and counts an output, of which the last row of inputs is here.
  template <int output>
  __device__ __forceinline__ void finish(const float (&inputs)[3][kPair],
                                         const ChannelCoefficients& coefficients,
                                         Moments& moments) {
    if (within(row_, out_end_)) {
      add<2>(output, inputs, coefficients);
      float values[kPair];
#pragma unroll
      for (int c = 0; c < kPair; ++c) values[c] = activate<output_activation>(sums_[output][c]);
      const Stored<T> stored = round_pair<T>(values);
      store_pair(z2_ + out_offset_, stored);
      widen(stored, values);
      moments.add(values, row_ == pivot_row_);
    }
    out_offset_ += pitches_.out;
  }

  float2* own_;
  int rows_;
  const Pitches& pitches_;
  int row_, out_end_;
  int pivot_row_;      // whose output is the first that the thread sees; none is negative
  int y_;              // of the first input row of the step
  int limit_[stride];  // of the input rows that the thread loads
  // An address is a row of the tile's image, a thread's 32 bits added to it by one instruction.
  uint32_t out_offset_, offset_;
  T* z2_;
  const T* z1_;
  // Of the rows that are yet to come.
  Stored<T> next_[kPhases<stride>][stride][stride];
  // Of the outputs that are not complete, by the phase in which they began.
  float sums_[kPhases<stride>][kPair];
};

// Merges the moments of all columns into one row of `partials`, in the order of the columns.
template <int stride>
__device__ __forceinline__ void write_moments(const ForwardArguments& arguments, const Place& place,
                                              const Moments& moments, SharedMoments& shared) {
  const int columns = arguments.grid.columns;
  const int column = place.warp - kFirstWarp<stride>;
  if (column >= 0 && column < columns) {
#pragma unroll
    for (int c = 0; c < kPair; ++c) {
      const int channel = place.lane * kPair + c;
      const float mean = moments.count ? moments.sum[c] / moments.count : 0.0f;
      shared.pivot[column][channel] = moments.pivot[c];
      shared.mean[column][channel] = mean;
      shared.squares[column][channel] = moments.square[c] - moments.sum[c] * mean;
    }
    if (place.lane == 0) shared.count[column] = moments.count;
  }
  __syncthreads();
  const int channels = arguments.shape.channels;
  const int first_channel = place.channel - place.lane * kPair;
  const int channel = threadIdx.x;
  if (channel >= kChunk || first_channel + channel >= channels) return;
  // Means around the first column's pivot, whose difference from the others is exact.
  const float pivot = shared.pivot[0][channel];
  const auto mean_of = [&](int i) {
    return shared.pivot[i][channel] - pivot + shared.mean[i][channel];
  };
  float count = 0.0f;
  float mean = 0.0f;
  for (int i = 0; i < columns; ++i) {
    count += shared.count[i];
    mean += shared.count[i] * mean_of(i);
  }
  mean /= count;
  float squares = 0.0f;
  for (int i = 0; i < columns; ++i) {
    const float deviation = mean_of(i) - mean;
    squares += shared.squares[i][channel] + shared.count[i] * deviation * deviation;
  }
  float* partial =
      arguments.partials + split_of(arguments.grid) * kMomentRows * channels + first_channel;
  partial[channel] = count;
  partial[channels + channel] = pivot + mean;
  partial[2 * channels + channel] = squares;
}

template <class T, Activation activation, Activation output_activation, int stride>
__global__ void __launch_bounds__(kHeldWarps<T, stride>* kLanes)
    depthwise_forward_kernel(ForwardArguments arguments) {
  auto& shared = shared_memory<ForwardShared<stride>>();
  const Place place = place_in(arguments.grid);
  const ChannelCoefficients coefficients = load_channels(arguments, place.channel);
  float2* own = held_shared(&shared.ring.rows[0][place.warp + 1][place.lane]);
  Moments moments;
  for (Tiles tiles(arguments.grid); !tiles.done(); tiles.next(arguments.grid)) {
    Walk<T, activation, output_activation, stride> walk(
        arguments, place, tiles.tile(arguments.grid), coefficients, own, moments);
    while (!walk.done()) {
      walk.template step<0>(coefficients, moments);
      if (walk.done()) break;
      walk.template step<1>(coefficients, moments);
      if constexpr (stride == 1) {
        if (walk.done()) break;
        walk.template step<2>(coefficients, moments);
      }
    }
    __syncthreads();
  }
  if (arguments.partials) write_moments<stride>(arguments, place, moments, shared.moments);
}

TileGrid forward_grid(const DepthwiseShape& shape, const BlockPlan& plan) {
  return divide_map(shape, shape.out_height, shape.out_width, plan);
}

template <class T, Activation activation, Activation output_activation>
int launch_forward(const ForwardArguments& arguments, void* stream) {
  const auto kernel = arguments.shape.stride == 1
                          ? &depthwise_forward_kernel<T, activation, output_activation, 1>
                          : &depthwise_forward_kernel<T, activation, output_activation, 2>;
  const TileGrid& grid = arguments.grid;
  // A block that writes moments has a thread for each of its channels.
  return launch(kernel, grid.splits * grid.chunks, (grid.columns + arguments.reach) * kLanes,
                stream, arguments);
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
                                      pitches_of(shape),
                                      shape.stride == 1 ? kReach<1> : kReach<2>,
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
