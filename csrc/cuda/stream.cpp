// Apart from binding.cpp, so that the tests, which run the rest on the host, can leave it out.
#define USE_CUDA  // makes the declaration of aoti_torch_get_current_cuda_stream visible
#include "cuda/stream.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

#include <string>

namespace moat_kernels::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;
using GetCurrentStream = decltype(&aoti_torch_get_current_cuda_stream);

// Looked up where PyTorch has loaded it already, not linked: a CPU build of torch has no such
// library, and this one must load there too.
GetCurrentStream find_get_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* function =
      library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(function != nullptr, "this torch has no libtorch_cuda.so with its CUDA streams");
  return reinterpret_cast<GetCurrentStream>(function);
}

// Why CUDA's runtime, which is linked into this library, cannot use a GPU; empty if it can. Where
// torch can and this says no, the driver is too old for the toolkit that compiled the kernels.
std::string problem() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess) return "";
  return "compiled by CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
         std::to_string(CUDART_VERSION % 1000 / 10) + ": " + cudaGetErrorString(status);
}

}  // namespace

void* current_stream(int32_t device) {
  static const GetCurrentStream get_current_stream = find_get_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_current_stream(device, &stream));
  return stream;
}

DeviceScope::DeviceScope(int32_t device) : guard_(new DeviceGuard(device)) {}

DeviceScope::~DeviceScope() { delete static_cast<DeviceGuard*>(guard_); }

}  // namespace moat_kernels::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(moat_kernels, library) { library.def("cuda_problem() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CompositeExplicitAutograd, library) {
  library.impl("cuda_problem", TORCH_BOX(&moat_kernels::cuda::problem));
}
