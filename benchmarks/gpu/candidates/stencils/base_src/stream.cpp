// Apart from binding.cpp, so that the tests, which run the rest on the host, can leave it out.
#define USE_CUDA  // makes the declaration of aoti_torch_get_current_cuda_stream visible
#include "cuda/stream.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

namespace moat_kernels::cuda {

using torch::stable::accelerator::DeviceGuard;

void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

DeviceScope::DeviceScope(int32_t device) : guard_(new DeviceGuard(device)) {}

DeviceScope::~DeviceScope() { delete static_cast<DeviceGuard*>(guard_); }

}  // namespace moat_kernels::cuda
