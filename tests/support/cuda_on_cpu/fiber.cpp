#include "fiber.h"

#include <cstddef>
#include <cstdint>
#include <vector>

// CUDA_ON_CPU_UCONTEXT chooses what other processors than x86-64 use: slower, as it asks the system
// to save the signal mask at every switch.
#if !defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_UCONTEXT
#endif

#ifdef CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#else
extern "C" void cuda_on_cpu_switch(void** saved, void* loaded);
// Saves the registers that a call keeps on the stack, and changes to the other stack.
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
#endif

namespace cuda_on_cpu {
namespace {

// Enough for the kernels with a sanitizer's larger frames.
constexpr std::size_t kStackBytes = 128 << 10;

using Stack = std::unique_ptr<char[]>;

// Stacks are used again: making 256 of them for every block would take longer than the block.
std::vector<Stack> free_stacks;

Stack take_stack() {
  if (free_stacks.empty()) return Stack(new char[kStackBytes]);
  Stack stack = std::move(free_stacks.back());
  free_stacks.pop_back();
  return stack;
}

Fiber* entered = nullptr;

}  // namespace

struct Fiber::Context {
  Stack stack = take_stack();
  bool returned = false;
#ifdef CUDA_ON_CPU_UCONTEXT
  ucontext_t inside, outside;
#else
  void* inside;
  void* outside;
#endif
};

Fiber::Fiber(void (*function)()) : context_(new Context), function_(function) {
  char* stack = context_->stack.get();
#ifdef CUDA_ON_CPU_UCONTEXT
  getcontext(&context_->inside);
  context_->inside.uc_stack.ss_sp = stack;
  context_->inside.uc_stack.ss_size = kStackBytes;
  makecontext(&context_->inside, &Fiber::run, 0);
#else
  // What the first switch pops: six registers, the address of run, and a place to return to.
  const auto top = (reinterpret_cast<std::uintptr_t>(stack) + kStackBytes) & ~std::uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(&Fiber::run);
  context_->inside = frame;
#endif
}

Fiber::~Fiber() {
  // A sanitizer keeps marks on a stack that was left for good.
  if (context_->returned) free_stacks.push_back(std::move(context_->stack));
}

void Fiber::run() {
  Fiber* self = entered;
  self->function_();
  self->context_->returned = true;
  self->suspend();
}

void Fiber::resume() {
  entered = this;
#ifdef CUDA_ON_CPU_UCONTEXT
  swapcontext(&context_->outside, &context_->inside);
#else
  cuda_on_cpu_switch(&context_->outside, context_->inside);
#endif
}

void Fiber::suspend() {
#ifdef CUDA_ON_CPU_UCONTEXT
  swapcontext(&context_->inside, &context_->outside);
#else
  cuda_on_cpu_switch(&context_->inside, context_->outside);
#endif
}

}  // namespace cuda_on_cpu
