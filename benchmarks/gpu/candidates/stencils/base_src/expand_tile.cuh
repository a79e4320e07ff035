#pragma once

// The expand GEMM of a tile: z1[p, e] = sum over c of x[p, c] W[e, c] for some pixels and 64
// channels of E, on tensor cores. C is streamed in steps of 32 through two stages of shared memory
// (cp.async, ldmatrix, mma.sync; float32 accumulators in registers).

#include "cuda/walk_down.cuh"

namespace moat_kernels::cuda {

constexpr int kChannels = 64;  // of E
constexpr int kDepth = 32;     // of C, in one step
constexpr int kThreads = 256;
constexpr int kMatrix = 8;  // rows, and 16-bit columns, of what ldmatrix loads
// Elements from one pixel of a tile to the next: the extra ones spread a column over all banks.
constexpr int kPitch = kChannels + 8;
// Steps along a row of a stage, 16 bytes each.
constexpr int kStageVectors = kDepth / kMatrix;

// Of a tile of `pixels`: rows of accumulators that a warp holds, pixels that it owns, and 16-byte
// copies of x that a thread makes in a step.
template <int pixels>
constexpr int kWarpPixels = pixels / (kThreads / 32);
template <int pixels>
constexpr int kWarpRows = kWarpPixels<pixels> / 16;
template <int pixels>
constexpr int kCopies = pixels * kStageVectors / kThreads;

struct ExpandProblem {
  const void* x;
  const void* weight;
  int in_channels;
  int channels;
};

template <class T, int pixels>
struct Stage {
  T x[pixels][kDepth];
  T weight[kChannels][kDepth];
};

template <int pixels>
using Accumulators = float[kWarpRows<pixels>][kChannels / kMatrix][4];

// Where the 16 bytes `vector` of a stage's row lie: eight rows that ldmatrix reads at once, 64
// bytes apart, touch every bank once.
__device__ __forceinline__ int swizzled(int row, int vector) {
  return (vector ^ (row / 2 % 4)) * kMatrix;
}

// Begins to copy channels depth .. depth + kDepth of the tile's pixels and of the weights. Each
// thread copies the same 16 bytes of some pixels, whose places in x (-1: none) are `offsets`.
template <class T, int pixels>
__device__ __forceinline__ void load_stage(const ExpandProblem& problem,
                                           const int64_t (&offsets)[kCopies<pixels>],
                                           int first_channel, int depth, Stage<T, pixels>& stage) {
  const int vector = threadIdx.x % kStageVectors;
  const int row = threadIdx.x / kStageVectors;
  const int channel = depth + vector * kMatrix;
  const T* x = static_cast<const T*>(problem.x);
  const T* weight = static_cast<const T*>(problem.weight);
#pragma unroll
  for (int i = 0; i < kCopies<pixels>; ++i) {
    const int pixel = row + i * (kThreads / kStageVectors);
    const bool valid = offsets[i] >= 0 && channel < problem.in_channels;
    copy_async(&stage.x[pixel][swizzled(pixel, vector)], valid ? x + offsets[i] + channel : x,
               valid);
  }
  const bool valid = first_channel + row < problem.channels && channel < problem.in_channels;
  const int64_t at = (int64_t{first_channel} + row) * problem.in_channels + channel;
  copy_async(&stage.weight[row][swizzled(row, vector)], valid ? weight + at : weight, valid);
}

// sums += x W^T of a stage, for the warp's pixels.
template <class T, int pixels>
__device__ __forceinline__ void multiply_stage(const Stage<T, pixels>& stage, int first_pixel,
                                               Accumulators<pixels>& sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t a[kWarpRows<pixels>][4];
#pragma unroll
    for (int m = 0; m < kWarpRows<pixels>; ++m) {
      const int row = first_pixel + m * 16 + lane % 16;
      load_matrices(a[m], &stage.x[row][swizzled(row, 2 * step + lane / 16)]);
    }
#pragma unroll
    for (int pair = 0; pair < kChannels / 16; ++pair) {
      uint32_t b[4];
      const int row = pair * 16 + lane / 16 * 8 + lane % 8;
      load_matrices(b, &stage.weight[row][swizzled(row, 2 * step + lane / 8 % 2)]);
#pragma unroll
      for (int m = 0; m < kWarpRows<pixels>; ++m) {
        multiply<T>(sums[m][2 * pair], a[m], b[0], b[1]);
        multiply<T>(sums[m][2 * pair + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// act(sums + bias), from the accumulators' layout to rows of pixels.
template <class T, int pixels>
__device__ __forceinline__ void store_tile(const Accumulators<pixels>& sums, Epilogue epilogue,
                                           int first_channel, int channels, int first_pixel,
                                           T (&result)[pixels][kPitch]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kChannels / kMatrix; ++n) {
    const int channel = n * kMatrix + lane % 4 * 2;
    float bias[2];
    load_coefficients(epilogue.bias, first_channel + channel, channels, 0.0f, bias);
#pragma unroll
    for (int m = 0; m < kWarpRows<pixels>; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = first_pixel + m * 16 + half * 8 + lane / 4;
        const float values[2] = {activate(epilogue.activation, sums[m][n][2 * half] + bias[0]),
                                 activate(epilogue.activation, sums[m][n][2 * half + 1] + bias[1])};
        pack_at<T, 2>(&result[pixel][channel]) = from_floats<T>(values);
      }
    }
  }
}

// result[p] = epilogue of x[p] W^T for the `count` pixels of a tile and 64 channels from
// first_channel on; offset_of(p) is where pixel p begins in x, or -1 for a row of zeros. `result`
// may overlap the stages, which are free when it returns; every thread sees the result.
template <class T, int pixels, class OffsetOf>
__device__ __forceinline__ void expand_tile(const ExpandProblem& problem, Epilogue epilogue,
                                            int first_channel, int count, const OffsetOf& offset_of,
                                            Stage<T, pixels> (&stages)[2],
                                            T (&result)[pixels][kPitch]) {
  int64_t offsets[kCopies<pixels>];
#pragma unroll
  for (int i = 0; i < kCopies<pixels>; ++i) {
    const int pixel = threadIdx.x / kStageVectors + i * (kThreads / kStageVectors);
    offsets[i] = pixel < count ? offset_of(pixel) : -1;
  }
  const int first_pixel = threadIdx.x / 32 * kWarpPixels<pixels>;
  const bool works = first_pixel < count;
  Accumulators<pixels> sums = {};
  load_stage(problem, offsets, first_channel, 0, stages[0]);
  for (int depth = 0; depth < problem.in_channels; depth += kDepth) {
    const int current = depth / kDepth % 2;
    wait_for_copies();
    __syncthreads();
    if (depth + kDepth < problem.in_channels) {
      load_stage(problem, offsets, first_channel, depth + kDepth, stages[1 - current]);
    }
    if (works) multiply_stage(stages[current], first_pixel, sums);
  }
  __syncthreads();
  if (works) {
    store_tile(sums, epilogue, first_channel, problem.channels, first_pixel, result);
  }
  __syncthreads();
}

}  // namespace moat_kernels::cuda
