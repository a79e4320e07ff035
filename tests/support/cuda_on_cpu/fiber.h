#pragma once

// A function with its own stack, which can be left and entered again.

#include <memory>

namespace cuda_on_cpu {

class Fiber {
 public:
  explicit Fiber(void (*function)());
  ~Fiber();
  Fiber(const Fiber&) = delete;

  // Runs until the function suspends or returns; not to be called again once it has returned.
  void resume();
  // Called from within: back to whoever resumed.
  void suspend();

 private:
  struct Context;

  static void run();

  std::unique_ptr<Context> context_;
  void (*function_)();
};

}  // namespace cuda_on_cpu
