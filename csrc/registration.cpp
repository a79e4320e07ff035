// The schemas of all native ops, and the empty Python module whose import registers them. An op's
// implementation is registered with STABLE_TORCH_LIBRARY_IMPL beside its code.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/common/isa_facts.h"
#include "cpu/host/attention_half_eval.h"
#include "cpu/host/dispatch.h"
#include "cpu/host/frozen.h"
#include "cpu/host/head_eval.h"
#include "cpu/host/mbconv_arguments.h"
#include "cpu/host/mbconv_train.h"
#include "cpu/host/mlp_eval.h"
#include "cpu/host/scratch.h"
#include "cpu/host/stem_eval.h"

namespace {

std::string cpu_isa() { return MOAT_KERNELS_DISPATCH(isa_name)(); }

}  // namespace

STABLE_TORCH_LIBRARY(moat_kernels, library) {
  using namespace moat_kernels;
  using namespace moat_kernels::cpu;
  const auto define = [&](const std::string& schema) { library.def(schema.c_str()); };
  define("cpu_isa() -> str");
  // Whether frozen models multiply in a dtype; of others the products are in float32.
  define("cpu_multiplies(ScalarType dtype) -> bool");
  // Give back memory that cpu/host/recycled_memory.h and cpu/host/scratch.h keep. -> bytes
  define("cpu_release_memory() -> int");
  define("cpu_release_scratch() -> int");
  // Maps are [B, C, H, W] in any format, the results in channels_last.
  const std::string block = schema_of<BlockTensors>();
  const std::string block_settings = schema_of<BlockSettings>();
  const std::string stem = schema_of<StemTensors>();
  const std::string half = schema_of<AttentionHalfTensors>();
  const std::string quantizations = schema_of<Quantizations>();
  define("cpu_mbconv_eval(Tensor x, " + block + ", Tensor? drop_path_scale, " + block_settings +
         ", " + schema_of<BlockPadding>() + ", ScalarType dtype) -> Tensor");
  define("cpu_stem_eval(Tensor x, " + stem + ", float eps) -> Tensor");
  define("cpu_attention_half_eval(Tensor y, " + half +
         ", int heads, int head_dim, SymInt window_height, SymInt window_width, float scale, float "
         "eps) "
         "-> Tensor");
  // The norm and GELU of the stem's training: z [B, H, W, C] -> (output, statistics [2, C]); and,
  // in place of the output's gradient, that of z -> (gradient of weight, gradient of bias).
  define(
      "cpu_stem_train_forward(Tensor z, Tensor? weight, Tensor? bias, Tensor? statistics, "
      "float eps) -> (Tensor, Tensor)");
  define(
      "cpu_stem_train_backward(Tensor(a!) grad, Tensor z, Tensor? weight, Tensor? bias, "
      "Tensor statistics, float eps, bool frozen) -> (Tensor, Tensor)");
  // Models frozen for inference; csrc/cpu/host/frozen.cpp explains. -> a step and its packed
  // weights.
  define("cpu_freeze_stem(" + stem +
         ", str activation, bool symmetric, float eps, ScalarType dtype) -> (Tensor, Tensor)");
  define("cpu_freeze_mbconv(" + block + ", " + block_settings + ", ScalarType dtype, " +
         quantizations + ") -> (Tensor, Tensor)");
  define("cpu_freeze_attention_half(" + half +
         ", int heads, int head_dim, float scale, float eps, bool grid, ScalarType dtype, " +
         quantizations + ") -> (Tensor, Tensor)");
  define("cpu_freeze_pooled_half(" + half + ", " + schema_of<ShortcutTensors>() + ", " +
         schema_of<HalfSettings>() + ", ScalarType dtype) -> (Tensor, Tensor)");
  define("cpu_freeze_mlp(" + schema_of<MlpTensors>() +
         ", str activation, float eps, ScalarType dtype, " + quantizations +
         ") -> (Tensor, Tensor)");
  define("cpu_freeze_head(" + schema_of<HeadTensors>() + ", float eps) -> (Tensor, Tensor)");
  define("cpu_freeze_for_maps(Tensor step, " + schema_of<Placement>() +
         ", Tensor? position_table) -> (Tensor, Tensor)");
  define("cpu_frozen_forward(Tensor x, Tensor steps, Tensor[] packed, int[] kept) -> Tensor[]");
  // Training; maps are [B, H, W, C]. csrc/cpu/host/mbconv_train*.cpp say what each op computes.
  const std::string bottleneck =
      ", " + schema_of<BottleneckTensors>() + ", " + schema_of<TrainSettings>() + ") -> ";
  define("cpu_mbconv_train_front(Tensor x, Tensor? statistics, bool keep_z1" + bottleneck +
         "(Tensor, Tensor, Tensor, Tensor)");
  define("cpu_mbconv_train_pool(Tensor z2, Tensor statistics" + bottleneck + "Tensor");
  define(
      "cpu_mbconv_train_project(Tensor z2, Tensor statistics, Tensor? gate, "
      "Tensor? drop_path_scale, Tensor? addend, ScalarType dtype" +
      bottleneck + "Tensor");
  define(
      "cpu_mbconv_train_backward_gated(Tensor grad, Tensor z2, Tensor statistics, Tensor gate, "
      "Tensor? drop_path_scale" +
      bottleneck + "(Tensor, Tensor, Tensor, Tensor)");
  define(
      "cpu_mbconv_train_backward(Tensor grad, Tensor x, Tensor? z1, Tensor? z2, "
      "Tensor(a!)? gated_gradient, Tensor? gate, Tensor? grad_mean, Tensor? statistics, "
      "Tensor? drop_path_scale, Tensor? addend, bool needs_input" +
      bottleneck + "Tensor[]");
  // -> (output, log_sum_exp [B, heads, H, W]) and (gradient of qkv, gradient of bias_table as a
  // flat tensor, empty if not needed). heads_first: the channels are (heads, 3, head_dim).
  define(
      "cpu_window_attention_forward(Tensor qkv, Tensor? bias_table, int heads, int head_dim, "
      "SymInt window_height, SymInt window_width, float scale, bool heads_first, bool grid) "
      "-> (Tensor, Tensor)");
  define(
      "cpu_window_attention_backward(Tensor grad, Tensor qkv, Tensor? bias_table, Tensor output, "
      "Tensor log_sum_exp, int heads, int head_dim, SymInt window_height, SymInt window_width, "
      "float scale, bool heads_first, bool grid, bool needs_table) -> (Tensor, Tensor)");
  // x [.., K], weight [N, K]. -> x weight^T + bias; and the gradients of x, weight and bias, empty
  // where they are not needed.
  define("cpu_linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  define(
      "cpu_linear_backward(Tensor grad, Tensor x, Tensor weight, ScalarType input_dtype, "
      "bool needs_input, bool needs_parameters) -> (Tensor, Tensor, Tensor)");
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
