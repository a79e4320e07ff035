// Prints what the launchers of the stencils hand to their kernels: blocks, threads and arguments.
//
// Every line of the input is a pass: "forward" or "backward", images, height, width, out_height,
// out_width, stride, top, left, channels, target_blocks, columns. The maps are bfloat16, with GELU
// before the convolution and nothing behind it, measured, as training launches them. Nothing runs.

#include <cuda_runtime.h>

#include <cstdio>
#include <iostream>
#include <string>

// Takes the place of the function that would launch.
template <class... Parameters, class Arguments>
int print_launch(const cudaLaunchConfig_t* config, void (*)(Parameters...), Arguments arguments) {
  std::printf("%u %u ", config->gridDim.x, config->blockDim.x);
  const auto* bytes = reinterpret_cast<const unsigned char*>(&arguments);
  for (std::size_t i = 0; i < sizeof arguments; ++i) std::printf("%02x", bytes[i]);
  std::printf("\n");
  return 0;
}

#define cudaLaunchKernelEx print_launch
#ifdef BACKWARD
#include "cuda/depthwise_backward.cu"
#else
#include "cuda/depthwise_forward.cu"
#endif

namespace moat_kernels::cuda {
namespace {
// An address that nobody follows.
float* somewhere() { return reinterpret_cast<float*>(uintptr_t{1} << 40); }

void print(const DepthwiseShape& shape, const BlockPlan& plan) {
  const Prologue prologue = {somewhere(), somewhere(), Activation::gelu};
#ifdef BACKWARD
  const NormBackward norm = {somewhere(), somewhere(), somewhere(), somewhere()};
  depthwise_backward(shape, Element::bfloat16, somewhere(), norm, somewhere(), prologue,
                     somewhere(), somewhere(), somewhere(), plan, nullptr);
#else
  const Epilogue epilogue = {nullptr, Activation::identity};
  depthwise_forward(shape, Element::bfloat16, somewhere(), prologue, somewhere(), epilogue,
                    somewhere(), somewhere(), plan, nullptr);
#endif
}
}  // namespace
}  // namespace moat_kernels::cuda

int main() {
  moat_kernels::cuda::DepthwiseShape shape;
  moat_kernels::cuda::BlockPlan plan;
  while (std::cin >> shape.images >> shape.height >> shape.width >> shape.out_height >>
         shape.out_width >> shape.stride >> shape.top >> shape.left >> shape.channels >>
         plan.target_blocks >> plan.columns) {
    moat_kernels::cuda::print(shape, plan);
  }
}
