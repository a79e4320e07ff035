#pragma once

// How expand_depthwise.cu convolves what lies in shared memory: a thread owns 4 channels of a
// column and walks down it, so that an input is read once per column of taps, and each of the 9 x 4
// taps stays in a register. A block has 16 such columns of 128 bytes of channels.

#include "cuda/element.cuh"
#include "cuda/gelu.cuh"
#include "cuda/launch.cuh"

namespace moat_kernels::cuda {

constexpr int kSlots = 16;
constexpr int kLaneChannels = 4;

template <class T>
struct Layout {
  static constexpr int kChunk = 128 / sizeof(T);
  static constexpr int kLanes = kChunk / kLaneChannels;
  static constexpr int kThreads = kSlots * kLanes;
};

// The taps of a thread's channels.
__device__ __forceinline__ void load_taps(const float* weights, int channel, int channels,
                                          float (&taps)[kTaps][kLaneChannels]) {
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    load_coefficients(weights + int64_t{tap} * channels, channel, channels, 0.0f, taps[tap]);
  }
}

// Output r < count is the sum of the taps times the inputs in rows r * stride + 0..2 of three
// columns. Calls load(row, column, values) once for each input, then finish(r, sums).
template <int stride, int run, class Load, class Finish>
__device__ __forceinline__ void walk_down(const float (&taps)[kTaps][kLaneChannels], int count,
                                          const Load& load, const Finish& finish) {
  if (count <= 0) return;
  float sums[run][kLaneChannels];
#pragma unroll
  for (int row = 0; row < (run - 1) * stride + 3; ++row) {
    if (row >= (count - 1) * stride + 3) break;
    float inputs[3][kLaneChannels];
#pragma unroll
    for (int j = 0; j < 3; ++j) load(row, j, inputs[j]);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (row < i || (row - i) % stride != 0 || (row - i) / stride >= run) continue;
      const int r = (row - i) / stride;
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        if (i == 0) sums[r][c] = 0.0f;
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          sums[r][c] = fmaf(taps[3 * i + j][c], inputs[j][c], sums[r][c]);
        }
      }
      if (i == 2) finish(r, sums[r]);
    }
  }
}

// Rounds and stores one output of a thread's channels.
template <class T>
__device__ __forceinline__ void finish_output(const float (&sums)[kLaneChannels],
                                              const float (&bias)[kLaneChannels],
                                              Activation activation, T* out) {
  float values[kLaneChannels];
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) values[c] = activate(activation, sums[c] + bias[c]);
  pack_at<T, kLaneChannels>(out) = from_floats<T>(values);
}

}  // namespace moat_kernels::cuda
