#pragma once

// Memory that a call needs until it ends.

#include <atomic>
#include <memory>

#include "cpu/host/recycled_memory.h"

namespace moat_kernels::cpu {

// Floats of as many whole cache lines: parts of a block begin on one.
inline int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// A process keeps one block of at most this size from one call to the next: touching memory that is
// new to the process costs several times what computing on it does. Larger ones are recycled.
constexpr int64_t kKeptFloats = kLargeBytes / static_cast<int64_t>(sizeof(float));

// Exchanged whole, so that calls from several threads, or after a fork, never wait or share.
inline std::atomic<Tensor*>& kept_scratch() {
  static std::atomic<Tensor*> kept{nullptr};
  return kept;
}

// Frees the kept block; the bytes that it had.
inline int64_t release_scratch() {
  const std::unique_ptr<Tensor> block(kept_scratch().exchange(nullptr));
  return block ? block->numel() * static_cast<int64_t>(sizeof(float)) : 0;
}

// `floats` uninitialised floats: the kept block if no other call has it and it is large enough.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t floats) : block_(kept_scratch().exchange(nullptr)) {
    if (block_ && block_->numel() >= floats) return;
    block_.reset();  // before more is taken
    block_ = std::make_unique<Tensor>(floats > kKeptFloats ? recycled_floats(like, {floats})
                                                           : float_buffer(like, floats));
  }
  ~Scratch() {
    if (block_->numel() <= kKeptFloats) delete kept_scratch().exchange(block_.release());
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return data_of(*block_); }

 private:
  std::unique_ptr<Tensor> block_;
};

}  // namespace moat_kernels::cpu
