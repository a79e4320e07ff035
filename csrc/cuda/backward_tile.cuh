#pragma once

// What the backward passes share. A thread owns the stride x stride input pixels that begin at one
// position of the output's grid: together they meet each of the nine taps once, so stride 2 wastes
// nothing and does not diverge.

#include "cuda/tile.cuh"

namespace moat_kernels::cuda {

// How far above and left of a position its taps reach in the output.
template <int stride>
constexpr int kReach = stride == 1 ? 2 : 1;

template <class T>
struct SharedGradients {
  float values[Layout<T>::kThreads / 32][kGradientRows][Layout<T>::kChunk];
};

struct BackwardProblem {
  DepthwiseShape shape;
  TileGrid grid;
  int first_row, first_column;  // of the grid of positions
  const void* dy2;
  NormBackward norm;
  const float* weights;
  void* dpre;
  float* partials;
};

// The positions whose input pixels lie in the map: rows first_row.. of the output's grid.
inline TileGrid backward_grid(const DepthwiseShape& shape, Element type, int run,
                              int target_blocks) {
  const int rows = (shape.top + shape.height - 1) / shape.stride - shape.top / shape.stride + 1;
  const int columns = (shape.left + shape.width - 1) / shape.stride - shape.left / shape.stride + 1;
  return divide_map(shape.images, rows, columns, run, channel_chunks(shape.channels, type),
                    target_blocks);
}

// What depends on the channel only, in shared memory: beside the gradients of the taps there are
// too few registers for it if two blocks are to fit.
template <class T>
struct alignas(16) ChannelCoefficients {
  float taps[kTaps][Layout<T>::kChunk];
  float scale[Layout<T>::kChunk];
  float shift[Layout<T>::kChunk];
  float slope[Layout<T>::kChunk];
  float z2_slope[Layout<T>::kChunk];
  float constant[Layout<T>::kChunk];
};

template <class T>
__device__ __forceinline__ void load_channels(const BackwardProblem& problem, const float* scale,
                                              const float* shift, int first_channel,
                                              ChannelCoefficients<T>& coefficients) {
  const int at = threadIdx.x;
  if (at >= Layout<T>::kChunk) return;
  const int channel = first_channel + at;
  const int channels = problem.shape.channels;
  const auto load = [&](const float* vector, float otherwise) {
    return vector && channel < channels ? vector[channel] : otherwise;
  };
  for (int tap = 0; tap < kTaps; ++tap) {
    coefficients.taps[tap][at] = load(problem.weights + int64_t{tap} * channels, 0.0f);
  }
  coefficients.scale[at] = load(scale, 1.0f);
  coefficients.shift[at] = load(shift, 0.0f);
  coefficients.slope[at] = load(problem.norm.slope, 1.0f);
  coefficients.z2_slope[at] = load(problem.norm.z2_slope, 0.0f);
  coefficients.constant[at] = load(problem.norm.constant, 0.0f);
}

// Fills the shared tile with dz2 and zeros; a thread always takes the same channels of a pixel.
template <class T, int stride, int pixels_held>
__device__ __forceinline__ void load_dz2(const BackwardProblem& problem, const Tile& tile,
                                         int first_channel,
                                         const ChannelCoefficients<T>& coefficients,
                                         T (&dz2)[pixels_held][Layout<T>::kChunk]) {
  constexpr int kVectors = Layout<T>::kVectors;
  const DepthwiseShape& shape = problem.shape;
  const NormBackward& norm = problem.norm;
  const int vector = threadIdx.x % kVectors;
  const int channel = first_channel + vector * kVector<T>;
  const int width = tile.columns + kReach<stride>;
  const int pixels = (tile.rows + kReach<stride>)*width;
  const int top = problem.first_row + tile.row - kReach<stride>;
  const int left = problem.first_column + tile.column - kReach<stride>;
  const int64_t image = tile.image * shape.out_height * shape.out_width * shape.channels + channel;
#pragma unroll 2
  for (int pixel = threadIdx.x / kVectors; pixel < pixels;
       pixel += Layout<T>::kThreads / kVectors) {
    const int y = top + pixel / width;
    const int x = left + pixel % width;
    auto values = zero_pack<T, kVector<T>>();
    if (y >= 0 && y < shape.out_height && x >= 0 && x < shape.out_width &&
        channel < shape.channels) {
      const int64_t at = image + (int64_t{y} * shape.out_width + x) * shape.channels;
      values = pack_at<T, kVector<T>>(static_cast<const T*>(problem.dy2) + at);
      if (norm.z2) {
        float gradient[kVector<T>], z2[kVector<T>];
        to_floats(values, gradient);
        to_floats(pack_at<T, kVector<T>>(static_cast<const T*>(norm.z2) + at), z2);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          const int c = vector * kVector<T> + i;
          gradient[i] = fmaf(coefficients.slope[c], gradient[i],
                             fmaf(coefficients.z2_slope[c], z2[i], coefficients.constant[c]));
        }
        values = from_floats<T>(gradient);
      }
    }
    pack_at<T, kVector<T>>(&dz2[pixel][vector * kVector<T>]) = values;
  }
}

// Calls visit(py, px, y, x, window) for the input pixels at (y, x) of a thread's positions;
// window(i, j, values) loads dz2 for input_pixel.
template <class T, int stride, int pixels_held, class Visit>
__device__ __forceinline__ void for_input_pixels(const BackwardProblem& problem, const Tile& tile,
                                                 const Column& part, int lane,
                                                 const T (&dz2)[pixels_held][Layout<T>::kChunk],
                                                 const Visit& visit) {
  const DepthwiseShape& shape = problem.shape;
  const int width = tile.columns + kReach<stride>;
  for (int r = part.row; r < part.row + part.count; ++r) {
    const int corner = (r + kReach<stride>)*width + part.column + kReach<stride>;
    const auto window = [&](int i, int j, float (&values)[kLaneChannels]) {
      const T* source = &dz2[corner - i * width - j][lane * kLaneChannels];
      to_floats(pack_at<T, kLaneChannels>(source), values);
    };
#pragma unroll
    for (int py = 0; py < stride; ++py) {
      const int y = (problem.first_row + tile.row + r) * stride - shape.top + py;
      if (y < 0 || y >= shape.height) continue;
#pragma unroll
      for (int px = 0; px < stride; ++px) {
        const int x = (problem.first_column + tile.column + part.column) * stride - shape.left + px;
        if (x < 0 || x >= shape.width) continue;
        visit(py, px, y, x, window);
      }
    }
  }
}

// What a thread adds up over its input pixels.
struct Gradients {
  float taps[kTaps][kLaneChannels] = {};
  float sum[kLaneChannels] = {};
  float product[kLaneChannels] = {};
};

// One input pixel at offset (py, px) of its position: its dpre, and what it adds to the gradients.
// window(i, j): dz2 i rows above and j columns left of the position.
template <class T, int stride, class Window>
__device__ __forceinline__ void input_pixel(int py, int px, const Window& window,
                                            const ChannelCoefficients<T>& coefficients, int lane,
                                            Activation activation, const float (&z)[kLaneChannels],
                                            T* dpre, Gradients& gradients) {
  float h[kLaneChannels], slope[kLaneChannels];
  float gradient[kLaneChannels] = {};
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) {
    const int at = lane * kLaneChannels + c;
    const float y1 = fmaf(coefficients.scale[at], z[c], coefficients.shift[at]);
    const ValueAndSlope y = activate_and_slope(activation, y1);
    h[c] = y.value;
    slope[c] = y.slope;
  }
#pragma unroll
  for (int i = py; i < 3; i += stride) {
#pragma unroll
    for (int j = px; j < 3; j += stride) {
      float dz2[kLaneChannels], tap[kLaneChannels];
      window(i / stride, j / stride, dz2);
      const float* source = &coefficients.taps[3 * i + j][lane * kLaneChannels];
      to_floats(pack_at<float, kLaneChannels>(source), tap);
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        gradient[c] = fmaf(tap[c], dz2[c], gradient[c]);
        gradients.taps[3 * i + j][c] = fmaf(h[c], dz2[c], gradients.taps[3 * i + j][c]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) gradient[c] *= slope[c];
  const auto stored = from_floats<T>(gradient);
  pack_at<T, kLaneChannels>(dpre) = stored;
  to_floats(stored, gradient);
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) {
    gradients.sum[c] += gradient[c];
    gradients.product[c] = fmaf(gradient[c], z[c], gradients.product[c]);
  }
}

// Adds up all slots, in an order that is always the same, and writes one row of `partials`.
template <class T>
__device__ __forceinline__ void write_gradients(const Gradients& gradients,
                                                SharedGradients<T>& shared, int first_channel,
                                                int channels, float* partial) {
  constexpr int kLanes = Layout<T>::kLanes;
  constexpr int kChunk = Layout<T>::kChunk;
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int row = 0; row < kGradientRows; ++row) {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      float value = row < kTaps ? gradients.taps[row < kTaps ? row : 0][c]
                                : (row == kTaps ? gradients.sum[c] : gradients.product[c]);
#pragma unroll
      for (int distance = kLanes; distance < 32; distance *= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, distance);
      }
      if (threadIdx.x % 32 < kLanes) {
        shared.values[threadIdx.x / 32][row][lane * kLaneChannels + c] = value;
      }
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < kGradientRows * kChunk; index += Layout<T>::kThreads) {
    const int row = index / kChunk;
    const int channel = index % kChunk;
    if (first_channel + channel >= channels) continue;
    float value = 0.0f;
    for (int warp = 0; warp < Layout<T>::kThreads / 32; ++warp) {
      value += shared.values[warp][row][channel];
    }
    partial[row * channels + first_channel + channel] = value;
  }
}

}  // namespace moat_kernels::cuda
