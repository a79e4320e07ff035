#pragma once

// Elements as they are stored, and as float32, in which everything is computed.

#include "cuda/launchers.h"
#include "cuda/ptx.cuh"

namespace moat_kernels::cuda {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// Consecutive elements that one instruction loads or stores.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
  T values[count];
};

template <class T, int count>
__device__ __forceinline__ const Pack<T, count>& pack_at(const T* pointer) {
  return *reinterpret_cast<const Pack<T, count>*>(pointer);
}
template <class T, int count>
__device__ __forceinline__ Pack<T, count>& pack_at(T* pointer) {
  return *reinterpret_cast<Pack<T, count>*>(pointer);
}

template <int count, class T>
__device__ __forceinline__ void to_floats(const Pack<T, count>& pack, float (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] = to_float(pack.values[i]);
}

template <class T, int count>
__device__ __forceinline__ Pack<T, count> from_floats(const float (&values)[count]) {
  Pack<T, count> pack;
#pragma unroll
  for (int i = 0; i < count; ++i) pack.values[i] = from_float<T>(values[i]);
  return pack;
}

// `count` of a vector of channels; `otherwise` where there is no vector, or beyond its end.
template <int count>
__device__ __forceinline__ void load_coefficients(const float* vector, int first, int channels,
                                                  float otherwise, float (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    values[i] = vector && first + i < channels ? vector[first + i] : otherwise;
  }
}

}  // namespace moat_kernels::cuda
