// Partial moments of groups of different sizes made into one, in float64 and in one fixed order:
//
//   mean = sum n_p mean_p / N,  squares = sum squares_p + n_p (mean_p - mean)^2
//
// DRAM: reads the partial moments twice, a few MB at most, and writes one row.
// On chip: 8 threads per column, whose sums meet in shared memory.

#include "cuda/launch.cuh"

namespace moat_kernels::cuda {
namespace {

constexpr int kColumns = 32;
constexpr int kRows = 8;

struct RowSums {
  double values[kRows][kColumns];
};

// The sum of `value` over the block's rows of threads, in every thread.
__device__ __forceinline__ double sum_rows(RowSums& shared, double value) {
  const int column = threadIdx.x % kColumns;
  __syncthreads();
  shared.values[threadIdx.x / kColumns][column] = value;
  __syncthreads();
  double sum = 0.0;
  for (int row = 0; row < kRows; ++row) sum += shared.values[row][column];
  return sum;
}

__global__ void __launch_bounds__(kColumns* kRows)
    finish_moments_kernel(const float* partials, int64_t count, int channels, float* moments) {
  auto& shared = shared_memory<RowSums>();
  const int column = blockIdx.x * kColumns + threadIdx.x % kColumns;
  const int64_t first = column < channels ? threadIdx.x / kColumns : count;
  const int64_t size = int64_t{kMomentRows} * channels;
  double pixels = 0.0;
  double total = 0.0;
  for (int64_t p = first; p < count; p += kRows) {
    const float* partial = partials + p * size + column;
    pixels += partial[0];
    total += static_cast<double>(partial[0]) * partial[channels];
  }
  pixels = sum_rows(shared, pixels);
  const double average = sum_rows(shared, total) / pixels;
  double squares = 0.0;
  for (int64_t p = first; p < count; p += kRows) {
    const float* partial = partials + p * size + column;
    const double deviation = partial[channels] - average;
    squares += partial[2 * int64_t{channels}] + partial[0] * deviation * deviation;
  }
  squares = sum_rows(shared, squares);
  if (threadIdx.x < kColumns && column < channels) {
    moments[column] = static_cast<float>(average);
    moments[channels + column] = static_cast<float>(squares);
  }
}

}  // namespace

int finish_moments(const float* partials, int64_t count, int channels, float* moments,
                   void* stream) {
  return launch(&finish_moments_kernel, divide_up(channels, kColumns), kColumns * kRows, stream,
                partials, count, channels, moments);
}

}  // namespace moat_kernels::cuda
