#pragma once

// What C++ has no words for: shared memory of a type, single instructions of arithmetic, and those
// that feed tensor cores (sm_80 and up; layouts: PTX ISA, "Matrix multiply-accumulate operation
// using mma instruction").

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace moat_kernels::cuda {

// The block's one object of type T; uninitialised.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  __shared__ T memory;
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same value, and the same object in shared or global memory; all threads of the warp call it.
// What comes of a shuffle the compiler keeps in a register: it would otherwise compute such values
// again in every turn of a loop.
__device__ __forceinline__ int held(int value) { return __shfl_xor_sync(0xffffffffu, value, 0); }

template <class Object>
__device__ __forceinline__ Object* held_shared(Object* object) {
  const int address = held(static_cast<int>(shared_address(object)));
  return static_cast<Object*>(__cvta_shared_to_generic(static_cast<uint32_t>(address)));
}

template <class Object>
__device__ __forceinline__ Object* held_global(Object* object) {
  const auto address = reinterpret_cast<uint64_t>(object);
  const uint32_t low = held(static_cast<int>(address));
  const uint64_t high = static_cast<uint32_t>(held(static_cast<int>(address >> 32)));
  return static_cast<Object*>(__cvta_global_to_generic(high << 32 | low));
}

// The smaller one; NaN if either is.
__device__ __forceinline__ float min_or_nan(float left, float right) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(left), "f"(right));
  return result;
}

// 2^x to two units in the last place; 0 below 2^-126.
__device__ __forceinline__ float exp2_approximately(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x to one unit in the last place.
__device__ __forceinline__ float reciprocal_approximately(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Two elements of 16 bits in one register, `low` first in memory; rounded to the nearest.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

template <class T>
__device__ __forceinline__ void unpack(uint32_t bits, float& low, float& high);

template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(uint32_t bits, float& low, float& high) {
  low = __uint_as_float(bits << 16);
  high = __uint_as_float(bits & 0xffff0000u);
}

template <>
__device__ __forceinline__ void unpack<__half>(uint32_t bits, float& low, float& high) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(bits));
}

// Copies 16 bytes to shared memory in the background; zeros if not `valid`, reading nothing.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// Waits for all copies that this thread has begun.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8 by its address.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// d [16 x 8] += a [16 x 16] b [16 x 8].
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1);

template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                        uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace moat_kernels::cuda
