#include "harness_kernels.h"

#include <stdexcept>

#include "cuda/ptx.cuh"

namespace cuda_on_cpu {
namespace {

using moat_kernels::cuda::copy_async;
using moat_kernels::cuda::load_matrices;
using moat_kernels::cuda::wait_for_copies;

template <class T>
T& block_memory() {
  return moat_kernels::cuda::shared_memory<T>();
}

struct Line {
  float values[kThreads];
  float neighbour[kThreads];
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config;
  config.blockDim = dim3(kThreads);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

__global__ void reverse_kernel(const float* values, float* result) {
  auto& shared = block_memory<Line>();
  shared.values[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  result[threadIdx.x] = shared.values[kThreads - 1 - threadIdx.x];
}

__global__ void read_uninitialised_kernel(float* result) {
  result[threadIdx.x] = block_memory<Line>().values[threadIdx.x];
}

__global__ void overrun_kernel(int excess) {
  block_memory<Line>().values[threadIdx.x + excess] = 1.0f;
}

__global__ void copy_kernel(const float* values, float* result, bool waits) {
  auto& shared = block_memory<Line>();
  if (threadIdx.x % 4 == 0) copy_async(&shared.values[threadIdx.x], values + threadIdx.x, true);
  if (waits) wait_for_copies();
  __syncthreads();
  result[threadIdx.x] = shared.values[threadIdx.x];
}

__global__ void wait_apart_kernel() {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    sync_warp();
  }
}

__global__ void half_a_warp_shuffles_kernel(float* result) {
  if (threadIdx.x % 32 >= 16) return;
  result[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

struct Operands {
  alignas(16) __nv_bfloat16 a[16][16];
  alignas(16) __nv_bfloat16 b[16][16];  // [column][row]
};

__global__ void multiply_kernel(const float* a, const float* b, float* result) {
  auto& shared = block_memory<Operands>();
  for (int i = threadIdx.x; i < 256; i += kThreads) {
    shared.a[i / 16][i % 16] = __float2bfloat16_rn(a[i]);
    shared.b[i / 16][i % 16] = __float2bfloat16_rn(b[i]);
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  uint32_t left[4], right[4];
  load_matrices(left, &shared.a[lane % 16][lane / 16 * 8]);
  load_matrices(right, &shared.b[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
  float sums[2][4] = {};
  moat_kernels::cuda::multiply<__nv_bfloat16>(sums[0], left, right[0], right[1]);
  moat_kernels::cuda::multiply<__nv_bfloat16>(sums[1], left, right[2], right[3]);
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) {
      result[(lane / 4 + i / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + i % 2] = sums[n][i];
    }
  }
}

}  // namespace

void reverse(const float* values, float* result) { launch(&reverse_kernel, values, result); }
void read_uninitialised(float* result) { launch(&read_uninitialised_kernel, result); }
void overrun(int excess) { launch(&overrun_kernel, excess); }
void copy(const float* values, float* result, bool waits) {
  launch(&copy_kernel, values, result, waits);
}
void wait_apart() { launch(&wait_apart_kernel); }
void half_a_warp_shuffles(float* result) { launch(&half_a_warp_shuffles_kernel, result); }
void multiply(const float* a, const float* b, float* result) {
  launch(&multiply_kernel, a, b, result);
}

std::uint16_t to_bfloat16(float value) { return __float2bfloat16_rn(value).bits; }
std::uint16_t to_float16(float value) { return __float2half_rn(value).bits; }
float from_bfloat16(std::uint16_t bits) { return __bfloat162float({bits}); }
float from_float16(std::uint16_t bits) { return __half2float({bits}); }

}  // namespace cuda_on_cpu
