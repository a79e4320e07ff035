// The schemas of all native ops, and the empty Python module whose import registers them. An op's
// implementation is registered with STABLE_TORCH_LIBRARY_IMPL beside its code.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/kernels/isa_name.h"

namespace {

std::string cpu_isa() { return MOAT_KERNELS_DISPATCH(isa_name)(); }

}  // namespace

STABLE_TORCH_LIBRARY(moat_kernels, library) { library.def("cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
