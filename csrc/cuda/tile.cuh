#pragma once

// How the stencil kernels divide their work, and what they share.
//
// A block owns 128 bytes of channels (one cache line of a pixel: 64 of bfloat16, 32 of float32) and
// goes through a group of tiles of the map. Its threads are 16 slots times lanes of 4 channels: a
// slot is a column of the tile, or in narrow maps one of two halves of a column, which the thread
// walks down, so that an input is read from shared memory once per column of taps and each of the
// 9 x 4 taps stays in a register.

#include "cuda/element.cuh"
#include "cuda/gelu.cuh"
#include "cuda/launch.cuh"

namespace moat_kernels::cuda {

constexpr int kSlots = 16;
constexpr int kLaneChannels = 4;

template <class T>
struct Layout {
  static constexpr int kChunk = 128 / sizeof(T);
  static constexpr int kLanes = kChunk / kLaneChannels;
  static constexpr int kThreads = kSlots * kLanes;
  static constexpr int kVectors = kChunk / kVector<T>;
};

// A map of height x width positions per image in tiles of about equal size.
struct TileGrid {
  int height, width;
  int rows, columns;  // positions of a tile
  int groups;         // of rows in a tile: 1 or 2
  int run;            // positions that a thread walks down, at most
  int tiles_y, tiles_x;
  int64_t tiles;   // of all images
  int64_t splits;  // groups of tiles
};

struct Tile {
  int64_t image;
  int row, column;    // of its first position
  int rows, columns;  // inside the map
};

inline int channel_chunks(int channels, Element type) {
  return divide_up(channels, type == Element::float32 ? 32 : 64);
}

// run: the most positions that a thread can walk down.
inline TileGrid divide_map(int64_t images, int height, int width, int run, int chunks,
                           int target_blocks) {
  TileGrid grid;
  grid.height = height;
  grid.width = width;
  grid.groups = width <= kSlots / 2 ? 2 : 1;
  grid.tiles_x = divide_up(width, kSlots / grid.groups);
  grid.tiles_y = divide_up(height, run * grid.groups);
  grid.columns = divide_up(width, grid.tiles_x);
  grid.rows = divide_up(height, grid.tiles_y);
  grid.run = divide_up(grid.rows, grid.groups);
  grid.tiles = images * grid.tiles_y * grid.tiles_x;
  const int64_t wanted = divide_up(target_blocks, chunks);
  grid.splits = wanted < grid.tiles ? wanted : grid.tiles;
  return grid;
}

__device__ __forceinline__ Tile tile_at(const TileGrid& grid, int64_t index) {
  const int within = static_cast<int>(index % (grid.tiles_y * grid.tiles_x));
  Tile tile;
  tile.image = index / (grid.tiles_y * grid.tiles_x);
  tile.row = within / grid.tiles_x * grid.rows;
  tile.column = within % grid.tiles_x * grid.columns;
  tile.rows = min(grid.rows, grid.height - tile.row);
  tile.columns = min(grid.columns, grid.width - tile.column);
  return tile;
}

// A thread's part of a tile: `count` positions downwards from (row, column), maybe none.
struct Column {
  int row, column, count;
};

__device__ __forceinline__ Column column_of(const TileGrid& grid, const Tile& tile, int slot) {
  const int slots = kSlots / grid.groups;
  Column part;
  part.column = slot % slots;
  part.row = slot / slots * grid.run;
  part.count = part.column < tile.columns ? min(grid.run, tile.rows - part.row) : 0;
  return part;
}

// The taps of a thread's channels.
__device__ __forceinline__ void load_taps(const float* weights, int channel, int channels,
                                          float (&taps)[kTaps][kLaneChannels]) {
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    load_coefficients(weights + int64_t{tap} * channels, channel, channels, 0.0f, taps[tap]);
  }
}

// Output r < count is the sum of the taps times the inputs in rows r * stride + 0..2 of three
// columns. Calls load(row, column, values) once for each input, then finish(r, sums).
template <int stride, int run, class Load, class Finish>
__device__ __forceinline__ void walk_down(const float (&taps)[kTaps][kLaneChannels], int count,
                                          const Load& load, const Finish& finish) {
  if (count <= 0) return;
  float sums[run][kLaneChannels];
#pragma unroll
  for (int row = 0; row < (run - 1) * stride + 3; ++row) {
    if (row >= (count - 1) * stride + 3) break;
    float inputs[3][kLaneChannels];
#pragma unroll
    for (int j = 0; j < 3; ++j) load(row, j, inputs[j]);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (row < i || (row - i) % stride != 0 || (row - i) / stride >= run) continue;
      const int r = (row - i) / stride;
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        if (i == 0) sums[r][c] = 0.0f;
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          sums[r][c] = fmaf(taps[3 * i + j][c], inputs[j][c], sums[r][c]);
        }
      }
      if (i == 2) finish(r, sums[r]);
    }
  }
}

// Sums of what a thread has seen of its channels, around the first value of each, so that nothing
// cancels where the mean is large.
struct Moments {
  float pivot[kLaneChannels];
  float sum[kLaneChannels];
  float square[kLaneChannels];
  int count = 0;

  __device__ __forceinline__ void add(const float (&values)[kLaneChannels]) {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      if (count == 0) {
        pivot[c] = values[c];
        sum[c] = square[c] = 0.0f;
      }
      const float deviation = values[c] - pivot[c];
      sum[c] += deviation;
      square[c] = fmaf(deviation, deviation, square[c]);
    }
    ++count;
  }
};

// Rounds, stores and counts one output of a thread's channels.
template <class T>
__device__ __forceinline__ void finish_output(const float (&sums)[kLaneChannels],
                                              const float (&bias)[kLaneChannels],
                                              Activation activation, T* out, Moments& moments) {
  float values[kLaneChannels];
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) values[c] = activate(activation, sums[c] + bias[c]);
  const auto stored = from_floats<T>(values);
  pack_at<T, kLaneChannels>(out) = stored;
  to_floats(stored, values);
  moments.add(values);
}

template <class T>
struct SharedMoments {
  float mean[kSlots][Layout<T>::kChunk];
  float squares[kSlots][Layout<T>::kChunk];
  int count[kSlots];
};

// Merges the moments of all slots into one row of `partials`, in the order of the slots.
template <class T>
__device__ __forceinline__ void write_moments(const Moments& moments, SharedMoments<T>& shared,
                                              int first_channel, int channels, float* partial) {
  const int lane = threadIdx.x % Layout<T>::kLanes;
  const int slot = threadIdx.x / Layout<T>::kLanes;
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) {
    const int channel = lane * kLaneChannels + c;
    const float mean = moments.count ? moments.sum[c] / moments.count : 0.0f;
    shared.mean[slot][channel] = moments.count ? moments.pivot[c] + mean : 0.0f;
    shared.squares[slot][channel] =
        moments.count ? moments.square[c] - moments.sum[c] * mean : 0.0f;
  }
  if (lane == 0) shared.count[slot] = moments.count;
  __syncthreads();
  const int channel = threadIdx.x;
  if (channel >= Layout<T>::kChunk || first_channel + channel >= channels) return;
  float count = 0.0f;
  float mean = 0.0f;
  for (int i = 0; i < kSlots; ++i) {
    count += shared.count[i];
    mean += shared.count[i] * shared.mean[i][channel];
  }
  mean /= count;
  float squares = 0.0f;
  for (int i = 0; i < kSlots; ++i) {
    const float deviation = shared.mean[i][channel] - mean;
    squares += shared.squares[i][channel] + shared.count[i] * deviation * deviation;
  }
  partial[first_channel + channel] = count;
  partial[channels + first_channel + channel] = mean;
  partial[2 * channels + first_channel + channel] = squares;
}

}  // namespace moat_kernels::cuda
