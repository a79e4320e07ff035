#pragma once

// Small kernels, right and wrong ones, by which the tests try the emulation itself. Each runs one
// block of kThreads threads; pointers are to as many values where nothing else is said.

#include <cstdint>

namespace cuda_on_cpu {

constexpr int kThreads = 64;

// result[i] = values[last - i], through shared memory.
void reverse(const float* values, float* result);
void read_uninitialised(float* result);
// Writes `excess` elements beyond the end of an array in shared memory, which has a neighbour.
void overrun(int excess);
// result = values by asynchronous copies.
void copy(const float* values, float* result, bool waits);
// Half of every warp waits for the block, the other half for its warp.
void wait_apart();
void half_a_warp_shuffles(float* result);
// result [16][16] = a [16][16] times the transpose of b [16][16], in bfloat16 on tensor cores.
void multiply(const float* a, const float* b, float* result);

std::uint16_t to_bfloat16(float value);
std::uint16_t to_float16(float value);
float from_bfloat16(std::uint16_t bits);
float from_float16(std::uint16_t bits);

}  // namespace cuda_on_cpu
