#pragma once

// The part of CUDA's own header that csrc/cuda uses, for g++ and a host without CUDA.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() ::cuda_on_cpu::sync_block(__FILE__, __LINE__)
#define __syncwarp() ::cuda_on_cpu::sync_warp()
#define threadIdx (::cuda_on_cpu::thread_index())
#define blockIdx (::cuda_on_cpu::block_index())

using std::max;
using std::min;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = void*;

struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

struct alignas(8) float2 {
  float x, y;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "launch failure, see stderr" : "invalid argument";
}

// Runs the grid before it returns.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto index = [](dim3 d) { return cuda_on_cpu::Index{d.x, d.y, d.z}; };
  const unsigned threads = config->blockDim.x * config->blockDim.y * config->blockDim.z;
  if (config->gridDim.x == 0 || threads == 0 || threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const bool done = cuda_on_cpu::run_grid(index(config->gridDim), index(config->blockDim),
                                          [&] { kernel(arguments...); });
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const std::byte* table = cuda_on_cpu::deposit(&value, sizeof value);
  std::memcpy(&value, table + (cuda_on_cpu::lane() ^ mask) * cuda_on_cpu::kDepositBytes,
              sizeof value);
  return value;
}
