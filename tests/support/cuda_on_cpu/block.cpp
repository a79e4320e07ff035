#include "block.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

namespace cuda_on_cpu {
namespace {

struct Barrier {
  int arrived = 0;
  int live = 0;
  long generation = 0;
  int released = 0;  // how many the last release let go

  void release_if_complete() {
    if (arrived == 0 || arrived < live) return;
    released = arrived;
    arrived = 0;
    ++generation;
  }
};

struct Warp {
  Barrier barrier;
  alignas(16) std::byte deposits[2][kWarpSize][kDepositBytes];
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  Index index;
  int number = 0;
  bool done = false;
  Barrier* waits_at = nullptr;
  long generation = 0;
  long deposits = 0;
  // Groups of copies, of which the last is still open.
  std::deque<std::vector<std::function<void()>>> postponed{1};

  bool can_run() const { return !done && (!waits_at || waits_at->generation != generation); }
};

struct SharedObject {
  void* memory;
  std::size_t alignment;
};

struct Block {
  Index index, size;
  Barrier barrier;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<const void*, SharedObject> shared;
  Thread* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::string failure;

  ~Block() {
    for (auto& [key, object] : shared) {
      ::operator delete(object.memory, std::align_val_t(object.alignment));
    }
  }
  Warp& warp() { return warps[current->number / kWarpSize]; }
};

Block* block = nullptr;

void wait_at(Barrier& barrier) {
  Thread& thread = *block->current;
  thread.waits_at = &barrier;
  thread.generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_complete();
  if (!thread.can_run()) thread.fiber->suspend();
  thread.waits_at = nullptr;
}

void leave(Barrier& barrier) {
  --barrier.live;
  barrier.release_if_complete();
}

// Threads that have returned count as arrived, as on a GPU.
void run_thread() {
  (*block->kernel)();
  block->current->done = true;
  leave(block->warp().barrier);
  leave(block->barrier);
}

void start_threads(Block& started) {
  const int count = static_cast<int>(started.size.x * started.size.y * started.size.z);
  started.threads.resize(count);
  started.warps.resize((count + kWarpSize - 1) / kWarpSize);
  started.barrier.live = count;
  for (int number = 0; number < count; ++number) {
    Thread& thread = started.threads[number];
    const unsigned row = number / started.size.x;
    thread.number = number;
    thread.index = {number % started.size.x, row % started.size.y, row / started.size.y};
    thread.fiber = std::make_unique<Fiber>(&run_thread);
    ++started.warps[number / kWarpSize].barrier.live;
  }
}

// Runs each of these threads once, as far as it goes; false if none can run.
bool run_once(Block& running, const std::vector<Thread*>& threads) {
  bool advanced = false;
  for (Thread* thread : threads) {
    if (!thread->can_run() || !running.failure.empty()) continue;
    advanced = true;
    running.current = thread;
    thread->fiber->resume();
  }
  return advanced;
}

std::vector<Thread*> threads_between(Block& running, std::size_t first, std::size_t last) {
  std::vector<Thread*> threads;
  for (std::size_t i = first; i < std::min(last, running.threads.size()); ++i) {
    threads.push_back(&running.threads[i]);
  }
  return threads;
}

// One warp runs ahead of the others, to the next barrier of the block or until chance picks
// another one; its threads take turns in shuffled order.
void run_shuffled(Block& running, std::mt19937& random) {
  std::vector<std::vector<Thread*>> warps;
  for (std::size_t i = 0; i < running.warps.size(); ++i) {
    warps.push_back(threads_between(running, i * kWarpSize, (i + 1) * kWarpSize));
  }
  bool advanced = true;
  while (advanced && running.failure.empty()) {
    advanced = false;
    std::shuffle(warps.begin(), warps.end(), random);
    for (std::vector<Thread*>& warp : warps) {
      do {
        std::shuffle(warp.begin(), warp.end(), random);
        if (!run_once(running, warp)) break;
        advanced = true;
      } while (random() % 8);
    }
  }
}

bool run_block(Block& running, std::mt19937* random) {
  block = &running;
  start_threads(running);
  const std::vector<Thread*> order = threads_between(running, 0, running.threads.size());
  if (random) {
    run_shuffled(running, *random);
  } else {
    while (run_once(running, order)) {
    }
  }
  const bool finished = std::all_of(order.begin(), order.end(), [](Thread* t) { return t->done; });
  if (running.failure.empty() && !finished) {
    running.failure = "deadlock: some threads wait at a barrier that others never reach";
  }
  if (!running.failure.empty()) {
    std::fprintf(stderr, "cuda_on_cpu: block %u: %s\n", running.index.x, running.failure.c_str());
  }
  block = nullptr;
  return running.failure.empty();
}

}  // namespace

bool run_grid(Index grid, Index size, const std::function<void()>& kernel) {
  const char* seed = std::getenv("CUDA_ON_CPU_SEED");
  std::mt19937 random(seed ? std::atoi(seed) : 0);
  std::mt19937* shuffle = seed && std::atoi(seed) ? &random : nullptr;
  std::vector<unsigned> order(std::size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  if (shuffle) std::shuffle(order.begin(), order.end(), *shuffle);
  for (const unsigned number : order) {
    Block running;
    running.index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    running.size = size;
    running.kernel = &kernel;
    if (!run_block(running, shuffle)) return false;
  }
  return true;
}

Index thread_index() { return block->current->index; }
Index block_index() { return block->index; }
int lane() { return block->current->number % kWarpSize; }

void sync_block(const char* file, int line) {
  if (const char* skipped = std::getenv("CUDA_ON_CPU_SKIP_BARRIER")) {
    const std::string path = std::string(file) + ":" + std::to_string(line);
    if (path.substr(path.rfind('/') + 1) == skipped) return;
  }
  wait_at(block->barrier);
}

void sync_warp() { wait_at(block->warp().barrier); }

const std::byte* deposit(const void* data, std::size_t bytes) {
  Warp& warp = block->warp();
  auto& table = warp.deposits[block->current->deposits++ % 2];
  std::memcpy(table[lane()], data, std::min(bytes, kDepositBytes));
  sync_warp();
  if (bytes > kDepositBytes || warp.barrier.released != kWarpSize) {
    block->failure = "a warp acts together, but not with all of its 32 threads";
    block->current->fiber->suspend();
  }
  return table[0];
}

void* shared_memory(const void* key, std::size_t size, std::size_t alignment) {
  const auto found = block->shared.find(key);
  if (found != block->shared.end()) return found->second.memory;
  void* memory = ::operator new(size, std::align_val_t(alignment));
  std::memset(memory, 0xff, size);
  block->shared[key] = {memory, alignment};
  return memory;
}

void postpone(std::function<void()> copy) {
  block->current->postponed.back().push_back(std::move(copy));
}

void close_postponed() { block->current->postponed.emplace_back(); }

void do_postponed(std::size_t open) {
  auto& groups = block->current->postponed;
  while (groups.size() > open + 1) {
    for (const auto& copy : groups.front()) copy();
    groups.pop_front();
  }
}

void do_postponed() {
  close_postponed();
  do_postponed(0);
}

}  // namespace cuda_on_cpu
