#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "harness_kernels.h"

namespace {

namespace py = pybind11;

using Array = py::array_t<float, py::array::c_style | py::array::forcecast>;

}  // namespace

PYBIND11_MODULE(harness, module) {
  using namespace cuda_on_cpu;
  module.def("reverse", [](const Array& values) {
    Array result(kThreads);
    reverse(values.data(), result.mutable_data());
    return result;
  });
  module.def("read_uninitialised", [] {
    Array result(kThreads);
    read_uninitialised(result.mutable_data());
    return result;
  });
  module.def("overrun", &overrun);
  module.def("copy", [](const Array& values, bool waits) {
    Array result(kThreads);
    copy(values.data(), result.mutable_data(), waits);
    return result;
  });
  module.def("wait_apart", &wait_apart);
  module.def("half_a_warp_shuffles", [] {
    Array result(kThreads);
    half_a_warp_shuffles(result.mutable_data());
  });
  module.def("multiply", [](const Array& a, const Array& b) {
    Array result({16, 16});
    multiply(a.data(), b.data(), result.mutable_data());
    return result;
  });
  module.def("to_bfloat16", py::vectorize(&to_bfloat16));
  module.def("to_float16", py::vectorize(&to_float16));
  module.def("from_bfloat16", py::vectorize(&from_bfloat16));
  module.def("from_float16", py::vectorize(&from_float16));
}
