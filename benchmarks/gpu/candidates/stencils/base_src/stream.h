#pragma once

#include <cstdint>

namespace moat_kernels::cuda {

// PyTorch's current stream of a device, a cudaStream_t.
void* current_stream(int32_t device);

// Makes a device the current one while it lives.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;

 private:
  void* guard_;
};

}  // namespace moat_kernels::cuda
