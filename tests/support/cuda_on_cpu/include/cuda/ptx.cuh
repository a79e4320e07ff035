#pragma once

// Takes the place of csrc/cuda/ptx.cuh: the same functions for threads that are fibers. The layouts
// are written from the PTX ISA's text and were not compared with a GPU.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace moat_kernels::cuda {

template <class T>
T& shared_memory() {
  static const char key = 0;
  constexpr std::size_t alignment = alignof(T) < 16 ? 16 : alignof(T);
  return *static_cast<T*>(cuda_on_cpu::shared_memory(&key, sizeof(T), alignment));
}

inline int thread_number() { return threadIdx.x; }
inline int held(int value) { return value; }
template <class Object>
Object* held_shared(Object* object) {
  return object;
}

template <class Object>
Object* held_global(Object* object) {
  return object;
}

inline float min_or_nan(float left, float right) {
  return left != left || right != right ? left + right : std::min(left, right);
}
inline float max_or_nan(float left, float right) {
  return left != left || right != right ? left + right : std::max(left, right);
}
inline float exp2_approximately(float x) { return std::exp2(x); }
inline float reciprocal_approximately(float x) { return 1.0f / x; }

inline void copy_async(void* shared, const void* global, bool valid) {
  cuda_on_cpu::postpone([=] {
    if (valid) {
      std::memcpy(shared, global, 16);
    } else {
      std::memset(shared, 0, 16);
    }
  });
}

inline void copy_async(void* shared, const void* global) { copy_async(shared, global, true); }

inline void close_copies() { cuda_on_cpu::close_postponed(); }
template <int open>
void wait_for_copies_but() {
  cuda_on_cpu::do_postponed(open);
}
inline void wait_for_copies() { cuda_on_cpu::do_postponed(); }

// Lane l receives, of each matrix, elements 2 (l % 4) and the next of row l / 4.
inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  const std::byte* table = cuda_on_cpu::deposit(&row, sizeof row);
  const int lane = cuda_on_cpu::lane();
  for (int matrix = 0; matrix < 4; ++matrix) {
    const char* source;
    std::memcpy(&source, table + (matrix * 8 + lane / 4) * cuda_on_cpu::kDepositBytes,
                sizeof source);
    std::memcpy(&matrices[matrix], source + lane % 4 * 4, 4);
  }
}

inline float element(__nv_bfloat16 value) { return __bfloat162float(value); }
inline float element(__half value) { return __half2float(value); }

// Half `half` of a register as a float.
template <class T>
float half_of(uint32_t bits, int half) {
  return element(T{static_cast<std::uint16_t>(bits >> 16 * half)});
}

inline std::uint16_t bits_of(float value, __nv_bfloat16) { return __float2bfloat16_rn(value).bits; }
inline std::uint16_t bits_of(float value, __half) { return __float2half_rn(value).bits; }

template <class T>
uint32_t pack(float low, float high) {
  return bits_of(low, T{}) | uint32_t{bits_of(high, T{})} << 16;
}

template <class T>
void unpack(uint32_t bits, float& low, float& high) {
  low = half_of<T>(bits, 0);
  high = half_of<T>(bits, 1);
}

// a: lane 4 g + t holds rows g and g + 8, columns 2 t, 2 t + 1 and those plus 8; b: columns 2 t,
// 2 t + 1 (and those plus 8) of its column g; d: rows g and g + 8, columns 2 t and 2 t + 1.
template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  Operands mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  mine.b[0] = b0;
  mine.b[1] = b1;
  const std::byte* table = cuda_on_cpu::deposit(&mine, sizeof mine);
  const auto operands = [&](int lane) {
    return reinterpret_cast<const Operands*>(table + lane * cuda_on_cpu::kDepositBytes);
  };
  const int group = cuda_on_cpu::lane() / 4;
  const int member = cuda_on_cpu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * member + i % 2;
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2;
      const uint32_t left = operands(group * 4 + holder)->a[i / 2 + 2 * (k / 8)];
      const uint32_t right = operands(column * 4 + holder)->b[k / 8];
      sum += half_of<T>(left, k % 2) * half_of<T>(right, k % 2);
    }
    d[i] += sum;
  }
}

}  // namespace moat_kernels::cuda
