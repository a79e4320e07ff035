#include "fiber.h"

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {
namespace {

// Enough for the kernels with a sanitizer's larger frames.
constexpr std::size_t kStackBytes = 128 << 10;

}  // namespace

Fiber::Fiber(void (*function)()) : stack_(new char[kStackBytes]), function_(function) {
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_.get();
  inside_.uc_stack.ss_size = kStackBytes;
  inside_.uc_link = &outside_;
  // makecontext passes ints only.
  const auto self = reinterpret_cast<std::uintptr_t>(this);
  makecontext(&inside_, reinterpret_cast<void (*)()>(&Fiber::start), 2,
              static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
}

void Fiber::start(unsigned high, unsigned low) {
  const auto self = (static_cast<std::uintptr_t>(high) << 32) | low;
  reinterpret_cast<Fiber*>(self)->function_();
}

void Fiber::resume() { swapcontext(&outside_, &inside_); }

void Fiber::suspend() { swapcontext(&inside_, &outside_); }

}  // namespace cuda_on_cpu
