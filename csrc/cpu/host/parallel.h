#pragma once

// Tasks on PyTorch's own thread pool.

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

namespace moat_kernels::cpu {

// How many threads PyTorch would use here.
inline int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// Calls function(worker) for each worker in [0, workers), side by side.
#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer sees how std::thread synchronises. How PyTorch's pool does is hidden from it, so
// that whatever one parallel region leaves for the next would be reported as a race.
template <class Function>
void for_each_worker(int64_t workers, const Function& function) {
  std::vector<std::thread> threads;
  for (int64_t worker = 0; worker < workers; ++worker) threads.emplace_back(function, worker);
  for (std::thread& thread : threads) thread.join();
}
#else
template <class Function>
void for_each_worker(int64_t workers, const Function& function) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) function(worker);
  });
}
#endif

// Calls function(task, worker) once for each task in [0, tasks). At any time a worker in [0,
// workers) runs one task. Worker w begins with task w, so that what one loop leaves in a core's
// cache is where the next loop over the same parts looks for it; which tasks follow is up to the
// speed of the threads, so results must not depend on it.
template <class Function>
void for_each_task(int64_t tasks, int64_t workers, const Function& function) {
  std::atomic<int64_t> next{workers};
  for_each_worker(workers, [&](int64_t worker) {
    for (int64_t task = worker; task < tasks; task = next.fetch_add(1)) function(task, worker);
  });
}

}  // namespace moat_kernels::cpu
