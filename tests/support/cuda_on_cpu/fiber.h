#pragma once

// A function with its own stack, which can be left and entered again.

#include <ucontext.h>

#include <memory>

namespace cuda_on_cpu {

class Fiber {
 public:
  explicit Fiber(void (*function)());
  Fiber(const Fiber&) = delete;

  // Runs until the function suspends or returns.
  void resume();
  // Called from within: back to whoever resumed.
  void suspend();

 private:
  static void start(unsigned high, unsigned low);

  std::unique_ptr<char[]> stack_;
  ucontext_t inside_, outside_;
  void (*function_)();
};

}  // namespace cuda_on_cpu
