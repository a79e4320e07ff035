#pragma once

#include "cuda/launchers.h"
#include "cuda/ptx.cuh"

namespace moat_kernels::cuda {

constexpr int kTaps = 9;

inline int divide_up(int value, int divisor) { return (value + divisor - 1) / divisor; }

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
           Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Calls function(T{}) with the C++ type of `type`.
template <class Function>
int with_element(Element type, const Function& function) {
  switch (type) {
    case Element::float32:
      return function(float{});
    case Element::bfloat16:
      return function(__nv_bfloat16{});
    default:
      return function(__half{});
  }
}

}  // namespace moat_kernels::cuda
