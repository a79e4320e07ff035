#pragma once
#include <cuda_bf16.h>
#include <cstdint>
#include <vector>
struct Plan;
using Forward = int64_t (*)(int size, int out, int channels, int stride, int top, int batch, const void* z1, const float* affine, const float* taps, void* z2, float* partials, int blocks, int columns);
using Backward = int64_t (*)(int size, int out, int channels, int stride, int top, int batch, const void* dy2, const void* z2, const float* factors, const void* z1, const float* affine, const float* taps, void* dpre, float* partials, int blocks, int columns);
struct Plan { int columns, blocks; };
struct Variant { const char* name; Forward forward; Backward backward; int stride; std::vector<Plan> forward_plans, backward_plans; };
