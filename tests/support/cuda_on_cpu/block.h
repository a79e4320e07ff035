#pragma once

// Runs the threads of a CUDA block on the host, one fiber each, until all are done. The order in
// which threads run between two barriers, and the order of the blocks, are shuffled by
// CUDA_ON_CPU_SEED (0 or unset: as numbered). CUDA_ON_CPU_SKIP_BARRIER=file.cu:123 makes the
// __syncthreads() of that line do nothing, to prove that a test would notice.
//
// Stricter than a GPU: threads of a warp do not advance together, shared memory starts as NaN, and
// asynchronous copies arrive only when waited for. It says nothing of speed, of bank conflicts, or
// of what memory ordering allows within one instruction.

#include <cstddef>
#include <functional>

namespace cuda_on_cpu {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int kWarpSize = 32;
// Bytes that a thread may hand to its warp at once.
constexpr std::size_t kDepositBytes = 64;

// Returns false, after a message on stderr, where threads wait for each other for ever, or where a
// warp acts together although some of its threads have returned.
bool run_grid(Index grid, Index block, const std::function<void()>& kernel);

Index thread_index();
Index block_index();
int lane();

void sync_block(const char* file, int line);
void sync_warp();

// Hands `bytes` of the calling thread to its warp, waits for the others, and returns the table of
// all deposits: kDepositBytes per lane, valid until the thread's next deposit but one.
const std::byte* deposit(const void* data, std::size_t bytes);

// Memory of the block for the object that `key` stands for: exactly `size` bytes of 0xff.
void* shared_memory(const void* key, std::size_t size, std::size_t alignment);

// Keeps `copy` until the calling thread waits.
void postpone(std::function<void()> copy);
// Makes a group of what the thread has postponed since the last.
void close_postponed();
// All groups but the last `open`; without an argument, what is in none too.
void do_postponed(std::size_t open);
void do_postponed();

}  // namespace cuda_on_cpu
