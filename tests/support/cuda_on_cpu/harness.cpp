// Small kernels, right and wrong ones, by which the tests try the emulation itself.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "cuda/ptx.cuh"

namespace {

using namespace moat_kernels::cuda;
namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

constexpr int kThreads = 64;

struct Line {
  float values[kThreads];
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config;
  config.blockDim = dim3(kThreads);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// result[i] = values[last - i], through shared memory.
__global__ void reverse_kernel(const float* values, float* result) {
  auto& shared = shared_memory<Line>();
  shared.values[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  result[threadIdx.x] = shared.values[kThreads - 1 - threadIdx.x];
}

__global__ void read_uninitialised_kernel(float* result) {
  result[threadIdx.x] = shared_memory<Line>().values[threadIdx.x];
}

__global__ void overrun_kernel(int excess) {
  shared_memory<Line>().values[threadIdx.x + excess] = 1.0f;
}

__global__ void copy_kernel(const float* values, float* result, bool waits) {
  auto& shared = shared_memory<Line>();
  if (threadIdx.x % 4 == 0) copy_async(&shared.values[threadIdx.x], values + threadIdx.x, true);
  if (waits) wait_for_copies();
  __syncthreads();
  result[threadIdx.x] = shared.values[threadIdx.x];
}

__global__ void wait_apart_kernel() {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    cuda_on_cpu::sync_warp();
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

// Each warp multiplies a [16][16] by the transpose of b [16][16].
__global__ void multiply_kernel(const float* a, const float* b, float* result) {
  auto& shared = shared_memory<Operands>();
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
  multiply<__nv_bfloat16>(sums[0], left, right[0], right[1]);
  multiply<__nv_bfloat16>(sums[1], left, right[2], right[3]);
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) {
      result[(lane / 4 + i / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + i % 2] = sums[n][i];
    }
  }
}

// A kernel that fills `count` floats, run on some arrays.
template <class... Arguments>
py::array_t<float> filled(int count, const Arguments&... arguments) {
  py::array_t<float> result(count);
  launch(arguments..., result.mutable_data());
  return result;
}

}  // namespace

PYBIND11_MODULE(harness, module) {
  module.def("reverse",
             [](Array<float> values) { return filled(kThreads, &reverse_kernel, values.data()); });
  module.def("read_uninitialised", [] { return filled(kThreads, &read_uninitialised_kernel); });
  module.def("overrun", [](int excess) { launch(&overrun_kernel, excess); });
  module.def("copy", [](Array<float> values, bool waits) {
    py::array_t<float> result(kThreads);
    launch(&copy_kernel, values.data(), result.mutable_data(), waits);
    return result;
  });
  module.def("wait_apart", [] { launch(&wait_apart_kernel); });
  module.def("half_a_warp_shuffles", [] { return filled(kThreads, &half_a_warp_shuffles_kernel); });
  module.def("multiply", [](Array<float> a, Array<float> b) {
    return filled(256, &multiply_kernel, a.data(), b.data());
  });
  module.def("to_bfloat16",
             py::vectorize([](float value) { return __float2bfloat16_rn(value).bits; }));
  module.def("to_float16", py::vectorize([](float value) { return __float2half_rn(value).bits; }));
  module.def("from_bfloat16",
             py::vectorize([](uint16_t bits) { return __bfloat162float(__nv_bfloat16{bits}); }));
  module.def("from_float16",
             py::vectorize([](uint16_t bits) { return __half2float(__half{bits}); }));
}
