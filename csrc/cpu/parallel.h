#pragma once

// Tasks on PyTorch's own thread pool.

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace moat_kernels::cpu {

// How many threads PyTorch would use here.
inline int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// Calls function(task, worker) once for each task in [0, tasks). At any time a worker in [0,
// workers) runs one task; which tasks it gets is up to the speed of the threads, so results must
// not depend on it.
template <class Function>
void for_each_task(int64_t tasks, int64_t workers, const Function& function) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) {
        function(task, worker);
      }
    }
  });
}

}  // namespace moat_kernels::cpu
