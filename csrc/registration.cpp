// The schemas of all native ops, and the empty Python module whose import registers them. An op's
// implementation is registered with STABLE_TORCH_LIBRARY_IMPL beside its code.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/common/isa_name.h"
#include "cpu/host/dispatch.h"
#include "cpu/host/scratch.h"

namespace {

std::string cpu_isa() { return MOAT_KERNELS_DISPATCH(isa_name)(); }

}  // namespace

STABLE_TORCH_LIBRARY(moat_kernels, library) {
  library.def("cpu_isa() -> str");
  // Give back memory that cpu/host/recycled_memory.h and cpu/host/scratch.h keep. -> bytes
  library.def("cpu_release_memory() -> int");
  library.def("cpu_release_scratch() -> int");
  // Maps are [B, C, H, W], the result in channels_last; csrc/cpu/host/mbconv_arguments.h says what
  // the lists hold.
  library.def(
      "cpu_mbconv_eval(Tensor x, Tensor?[] convolutions, Tensor?[] norms, "
      "Tensor? drop_path_scale, float[] eps, int stride, int[] padding, str[] activations, "
      "bool residual, str pool_kind, int[] pool, ScalarType dtype) -> Tensor");
  // [B, C_in, H, W] in any format -> channels_last; csrc/cpu/host/stem_eval.cpp lists the tensors.
  library.def("cpu_stem_eval(Tensor x, Tensor?[] tensors, float eps) -> Tensor");
  // The norm and GELU of the stem's training: z [B, H, W, C] -> (output, statistics [2, C]); and,
  // in place of the output's gradient, that of z -> (gradient of weight, gradient of bias).
  library.def(
      "cpu_stem_train_forward(Tensor z, Tensor? weight, Tensor? bias, Tensor? statistics, "
      "float eps) -> (Tensor, Tensor)");
  library.def(
      "cpu_stem_train_backward(Tensor(a!) grad, Tensor z, Tensor? weight, Tensor? bias, "
      "Tensor statistics, float eps, bool frozen) -> (Tensor, Tensor)");
  // [B, C, H, W] in any format -> channels_last; csrc/cpu/host/attention_half_eval.cpp lists the
  // tensors.
  library.def(
      "cpu_attention_half_eval(Tensor y, Tensor?[] tensors, int heads, int head_dim, "
      "int[] window, float scale, float eps) -> Tensor");
  // Models frozen for inference; csrc/cpu/host/frozen.cpp explains. -> a step and its packed
  // weights.
  library.def("cpu_freeze_stem(Tensor?[] tensors, float eps) -> (Tensor, Tensor)");
  library.def(
      "cpu_freeze_mbconv(Tensor?[] convolutions, Tensor?[] norms, float[] eps, int stride, "
      "str[] activations, bool residual, str pool_kind, int[] pool) -> (Tensor, Tensor)");
  library.def(
      "cpu_freeze_attention_half(Tensor?[] tensors, int heads, int head_dim, float scale, "
      "float eps) -> (Tensor, Tensor)");
  library.def("cpu_freeze_head(Tensor?[] tensors, float eps) -> (Tensor, Tensor)");
  library.def(
      "cpu_freeze_for_maps(Tensor step, int[] size, int[] padding, int[] pool_padding, "
      "int[] window, Tensor? position_table) -> (Tensor, Tensor)");
  library.def(
      "cpu_frozen_forward(Tensor x, Tensor steps, Tensor[] packed, int[] kept) -> Tensor[]");
  // Training; maps are [B, H, W, C]. csrc/cpu/host/mbconv_train.h says what the settings hold,
  // mbconv_train*.cpp what each op computes.
  const std::string settings =
      ", Tensor?[] weights, Tensor?[] norms, float[] eps, int[] modes, int[] geometry, "
      "str[] activations) -> ";
  const auto define = [&](const std::string& arguments, const std::string& results) {
    library.def((arguments + settings + results).c_str());
  };
  define("cpu_mbconv_train_front(Tensor x, Tensor? statistics, bool keep_z1, ScalarType dtype",
         "(Tensor, Tensor, Tensor, Tensor)");
  define("cpu_mbconv_train_pool(Tensor z2, Tensor statistics", "Tensor");
  define(
      "cpu_mbconv_train_project(Tensor z2, Tensor statistics, Tensor? gate, "
      "Tensor? drop_path_scale, Tensor? addend",
      "Tensor");
  define(
      "cpu_mbconv_train_backward_gated(Tensor grad, Tensor z2, Tensor statistics, Tensor gate, "
      "Tensor? drop_path_scale",
      "(Tensor, Tensor, Tensor, Tensor)");
  define(
      "cpu_mbconv_train_backward(Tensor grad, Tensor x, Tensor? z1, Tensor? z2, "
      "Tensor(a!)? gated_gradient, Tensor? gate, Tensor? grad_mean, Tensor? statistics, "
      "Tensor? drop_path_scale, Tensor? addend, bool needs_input",
      "Tensor[]");
  // -> (output, log_sum_exp [B, heads, H, W]) and (gradient of qkv, gradient of bias_table as a
  // flat tensor, empty if not needed). heads_first: the channels are (heads, 3, head_dim).
  library.def(
      "cpu_window_attention_forward(Tensor qkv, Tensor? bias_table, int heads, int head_dim, "
      "int window_height, int window_width, float scale, bool heads_first, bool grid) "
      "-> (Tensor, Tensor)");
  library.def(
      "cpu_window_attention_backward(Tensor grad, Tensor qkv, Tensor? bias_table, Tensor output, "
      "Tensor log_sum_exp, int heads, int head_dim, int window_height, int window_width, "
      "float scale, bool heads_first, bool grid, bool needs_table) -> (Tensor, Tensor)");
  // x [.., K], weight [N, K]. -> x weight^T + bias; and the gradients of x, weight and bias, empty
  // where they are not needed.
  library.def("cpu_linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "cpu_linear_backward(Tensor grad, Tensor x, Tensor weight, bool needs_input, "
      "bool needs_parameters) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  library.impl("cpu_release_scratch", TORCH_BOX(&moat_kernels::cpu::release_scratch));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
