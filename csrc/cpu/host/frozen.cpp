// Ops for models that are frozen for inference. cpu_freeze_* turn a stem, an inverted bottleneck,
// an attention half, an MLP or a head into a step, whose weights are folded and packed once, and
// cpu_frozen_forward computes a sequence of steps. dtype: of the maps between the steps and, where
// the CPU multiplies in it, of what products read; else these are in float32. (The ops that take
// plain weights fold and pack them in every call, so that they cannot be out of date.)

#include "cpu/host/frozen.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "cpu/host/attention_half_eval.h"
#include "cpu/host/head_eval.h"
#include "cpu/host/mbconv_eval.h"
#include "cpu/host/mlp_eval.h"
#include "cpu/host/products.h"
#include "cpu/host/recycled_memory.h"
#include "cpu/host/scratch.h"
#include "cpu/host/stem_eval.h"

namespace moat_kernels::cpu {
namespace {

enum class StepKind : int64_t { stem, mbconv, attention_half, mlp, head };

// A step without the address of any tensor. Steps travel through Python as bytes, and are valid in
// the process that made them.
struct Step {
  StepKind kind;
  StemProblem stem;
  MBConvProblem mbconv;
  AttentionHalf attention_half;
  MlpProblem mlp;
  HeadProblem head;
};
static_assert(std::is_trivially_copyable_v<Step>);

constexpr int64_t kStepBytes = sizeof(Step);

Tensor to_bytes(const Step& step, const Tensor& like) {
  const Tensor bytes = torch::stable::new_empty(like, {kStepBytes}, ScalarType::Byte);
  std::memcpy(bytes.mutable_data_ptr(), &step, sizeof(Step));
  return bytes;
}

void check_steps(const Tensor& steps) {
  check_memory("steps", "", steps, DeviceType::CPU, ScalarType::Byte);
  STD_TORCH_CHECK(steps.dim() == 1 && steps.numel() > 0 && steps.numel() % kStepBytes == 0,
                  "steps must come from cpu_freeze_*: [n * ", kStepBytes, "], got ",
                  shape_of(steps));
}

Step step_at(const Tensor& steps, int64_t index) {
  Step step;
  std::memcpy(&step, static_cast<const char*>(steps.const_data_ptr()) + index * kStepBytes,
              sizeof(Step));
  return step;
}

template <class Eval, class Problem>
Tensor pack(const Problem& problem, const Tensor& like) {
  const Tensor packed = float_buffer(like, Eval::packed_size(problem));
  Eval::pack(problem, data_of(packed));
  return packed;
}

Product quantized_product(ScalarType dtype, const Quantizations& quantizations) {
  if (!quantizations.given()) return product_of(dtype);
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 && has_product(Product::int8),
                  "int8 products need maps in bfloat16 and a CPU that has both");
  return Product::int8;
}

bool multiplies(ScalarType dtype) {
  if (dtype == ScalarType::Char) return has_product(Product::int8);
  return dtype == ScalarType::Float || product_of(dtype) != Product::float32;
}

// -> a step for maps of any size (see freeze_for_maps), and its packed weights.
// symmetric: whether the first convolution pads by a pixel on each side, not as TensorFlow's SAME.
std::tuple<Tensor, Tensor> freeze_stem(const StemTensors& tensors, const std::string& activation,
                                       bool symmetric, double eps, ScalarType dtype) {
  const StemTensors kept = readable(tensors);
  Step step = {};
  step.kind = StepKind::stem;
  step.stem = read_stem(kept, eps);
  step.stem.activation = parse_activation(activation);
  step.stem.symmetric = symmetric;
  step.stem.output_type = element_type("dtype", dtype);
  step.stem.product = product_of(dtype);
  const Tensor& like = *kept.conv_0_weight;
  const Tensor packed = pack<StemEval>(step.stem, like);
  step.stem.first = step.stem.second = {};
  step.stem.norm = {};
  return {to_bytes(step, like), packed};
}

std::tuple<Tensor, Tensor> freeze_mbconv(const BlockTensors& tensors, const BlockSettings& settings,
                                         ScalarType dtype, const Quantizations& quantizations) {
  const BlockTensors kept = readable(tensors);
  Step step = {};
  step.kind = StepKind::mbconv;
  MBConvProblem& problem = step.mbconv;
  problem = read_block(kept, settings);
  problem.output_type = element_type("dtype", dtype);
  problem.product = quantized_product(dtype, quantizations);
  problem.input_quantization = quantizations.first();
  problem.middle_quantization = quantizations.second();
  const Tensor& like = *kept.expand_weight;
  const Tensor packed = pack<MBConvEval>(problem, like);
  problem.expand = problem.depthwise = problem.project = problem.shortcut = {};
  problem.squeeze_excite.reduce = problem.squeeze_excite.expand = {};
  problem.pre_norm = problem.expand_norm = problem.depthwise_norm = problem.project_norm = {};
  return {to_bytes(step, like), packed};
}

std::tuple<Tensor, Tensor> half_step(const AttentionHalf& half, ScalarType dtype,
                                     const Quantizations& quantizations, const Tensor& like) {
  Step step = {};
  step.kind = StepKind::attention_half;
  AttentionHalf& problem = step.attention_half;
  problem = half;
  problem.element = element_type("dtype", dtype);
  problem.product = quantized_product(dtype, quantizations);
  problem.norm_quantization = quantizations.first();
  problem.attended_quantization = quantizations.second();
  const Tensor packed = pack<AttentionHalfEval>(problem, like);
  problem.norm_weight = problem.norm_bias = problem.qkv_weight = problem.qkv_bias = nullptr;
  problem.proj_weight = problem.proj_bias = problem.position_table = problem.bias_table = nullptr;
  problem.shortcut_weight = problem.shortcut_bias = nullptr;
  return {to_bytes(step, like), packed};
}

// grid: whether a window's tokens are spread evenly over the map.
std::tuple<Tensor, Tensor> freeze_attention_half(const AttentionHalfTensors& tensors, int64_t heads,
                                                 int64_t head_dim, double scale, double eps,
                                                 bool grid, ScalarType dtype,
                                                 const Quantizations& quantizations) {
  const AttentionHalfTensors kept = readable(tensors);
  AttentionHalf half = read_attention_half(kept, heads, head_dim, scale, eps);
  half.grid = grid;
  return half_step(half, dtype, quantizations, *kept.qkv_weight);
}

// An attention half that changes the size of maps.
std::tuple<Tensor, Tensor> freeze_pooled_half(const AttentionHalfTensors& tensors,
                                              const ShortcutTensors& shortcut,
                                              const HalfSettings& settings, ScalarType dtype) {
  const Pool pool = read_pool(settings.pool);
  STD_TORCH_CHECK(pool.kind != PoolKind::none, "pool_kind must be given");
  const AttentionHalfTensors kept = readable(tensors);
  const ShortcutTensors kept_shortcut = readable(shortcut);
  const AttentionHalf half = read_attention_half(kept, settings.heads, settings.head_dim,
                                                 settings.scale, settings.eps, pool, kept_shortcut);
  return half_step(half, dtype, {}, *kept.qkv_weight);
}

std::tuple<Tensor, Tensor> freeze_mlp(const MlpTensors& tensors, const std::string& activation,
                                      double eps, ScalarType dtype,
                                      const Quantizations& quantizations) {
  const MlpTensors kept = readable(tensors);
  Step step = {};
  step.kind = StepKind::mlp;
  MlpProblem& problem = step.mlp;
  problem = read_mlp(kept, parse_activation(activation), eps);
  problem.element = element_type("dtype", dtype);
  problem.product = quantized_product(dtype, quantizations);
  problem.norm_quantization = quantizations.first();
  problem.hidden_quantization = quantizations.second();
  const Tensor& like = *kept.fc1_weight;
  const Tensor packed = pack<MlpEval>(problem, like);
  problem.norm_weight = problem.norm_bias = nullptr;
  problem.fc1_weight = problem.fc1_bias = problem.fc2_weight = problem.fc2_bias = nullptr;
  return {to_bytes(step, like), packed};
}

std::tuple<Tensor, Tensor> freeze_head(const HeadTensors& tensors, double eps) {
  const HeadTensors kept = readable(tensors);
  Step step = {};
  step.kind = StepKind::head;
  step.head = read_head(kept, eps);
  const Tensor& like = *kept.norm_weight;
  const Tensor packed = pack<HeadEval>(step.head, like);
  step.head.norm_weight = step.head.norm_bias = step.head.weight = step.head.bias = nullptr;
  return {to_bytes(step, like), packed};
}

// A step for maps of one size. position_table: of an attention half. -> the step, and the table for
// windows of that size (empty if there is none).
std::tuple<Tensor, Tensor> freeze_for_maps(const Tensor& step_bytes, const Placement& placement,
                                           std::optional<Tensor> position_table) {
  check_steps(step_bytes);
  STD_TORCH_CHECK(step_bytes.numel() == kStepBytes, "step must be one step, got ",
                  step_bytes.numel() / kStepBytes);
  const MapSize maps = {1, placement.channels, placement.height, placement.width};
  Step step = step_at(step_bytes, 0);
  Tensor table = float_buffer(step_bytes, 0);
  switch (step.kind) {
    case StepKind::stem:
      set_maps(maps, step.stem);
      break;
    case StepKind::mbconv:
      set_maps(maps, placement.block, step.mbconv);
      break;
    case StepKind::attention_half: {
      AttentionHalf& problem = step.attention_half;
      set_maps(maps, placement.block.pool_padding, placement.window_height, placement.window_width,
               problem);
      if (!position_table.has_value()) break;
      position_table = as_floats(*position_table);
      set_position_table(position_table, problem);
      table = float_buffer(step_bytes, AttentionHalfEval::table_size(problem));
      AttentionHalfEval::make_table(problem, data_of(table));
      problem.position_table = problem.bias_table = nullptr;
      break;
    }
    case StepKind::mlp:
      check_maps(maps, step.mlp);
      break;
    case StepKind::head:
      set_maps(maps, step.head);
      break;
  }
  return {to_bytes(step, step_bytes), table};
}

// A pass through all steps.
class Sequence {
 public:
  Sequence(const Tensor& x, const std::vector<Tensor>& packed)
      : maps_(x), size_(map_size("x", x)), packed_(packed) {
    STD_TORCH_CHECK(size_.height > 0 && size_.width > 0, "x must have H, W >= 1");
    element_type("x", x.scalar_type());
  }

  const Tensor& result() const { return maps_; }
  bool used_all_tensors() const { return next_ == packed_.size(); }

  // keeps: the caller gets the result.
  void compute(const Step& step, bool keeps) {
    switch (step.kind) {
      case StepKind::stem:
        return compute(step.stem, keeps);
      case StepKind::mbconv:
        return compute(step.mbconv, keeps);
      case StepKind::attention_half:
        return compute(step.attention_half, keeps);
      case StepKind::mlp:
        return compute(step.mlp, keeps);
      case StepKind::head:
        return compute(step.head);
    }
    STD_TORCH_CHECK(false, "unknown step");
  }

 private:
  void compute(StemProblem problem, bool keeps) {
    expect(problem.in_channels, problem.height, problem.width);
    STD_TORCH_CHECK(first_, "a stem must be the first step");
    check_stem_input(maps_);
    problem.batch = size_.batch;
    StemEval eval(problem, take_packed(StemEval::packed_size(problem)));
    eval.read(maps_);
    const Tensor output = make_output(output_map(problem), scalar_type(problem.output_type), keeps);
    run(
        output, [&](float* scratch) { eval.compute(output.mutable_data_ptr(), scratch); },
        [&] { return eval.scratch_size(); });
  }

  void compute(MBConvProblem problem, bool keeps) {
    expect(problem.in_channels, problem.height, problem.width);
    problem.batch = size_.batch;
    problem.x_type = problem.output_type;
    problem.x = readable_maps(problem.x_type);
    const float* packed = take_packed(MBConvEval::packed_size(problem));
    const Tensor output = make_output(output_map(problem), maps_.scalar_type(), keeps);
    problem.output = output.mutable_data_ptr();
    const MBConvEval eval(problem, packed);
    run(
        output, [&](float* scratch) { eval.compute(scratch); },
        [&] { return eval.scratch_size(); });
  }

  void compute(AttentionHalf problem, bool keeps) {
    expect(problem.in_channels, problem.in_height, problem.in_width);
    problem.batch = size_.batch;
    problem.y = readable_maps(problem.element);
    const float* packed = take_packed(AttentionHalfEval::packed_size(problem));
    const float* table = nullptr;
    if (problem.position_height > 0) {
      const int64_t places = (2 * problem.window_height - 1) * (2 * problem.window_width - 1);
      table = take_packed(problem.heads * places);
    }
    const MapSize size = {size_.batch, problem.channels, problem.height, problem.width};
    const Tensor output = make_output(size, maps_.scalar_type(), keeps);
    problem.result = output.mutable_data_ptr();
    const AttentionHalfEval eval(problem, packed, table);
    run(
        output, [&](float* scratch) { eval.compute(scratch); },
        [&] { return eval.scratch_size(); });
  }

  void compute(MlpProblem problem, bool keeps) {
    expect(problem.channels, size_.height, size_.width);
    problem.rows = size_.batch * size_.height * size_.width;
    problem.y = readable_maps(problem.element);
    const MlpEval eval(problem, take_packed(MlpEval::packed_size(problem)));
    const Tensor output = make_output(size_, maps_.scalar_type(), keeps);
    run(
        output, [&](float* scratch) { eval.compute(output.mutable_data_ptr(), scratch); },
        [&] { return eval.scratch_size(); });
  }

  void compute(HeadProblem problem) {
    expect(problem.channels, size_.height, size_.width);
    problem.batch = size_.batch;
    problem.pixels = size_.height * size_.width;
    problem.x_type = element_type("x", maps_.scalar_type());
    problem.x = readable_maps(problem.x_type);
    const HeadEval eval(problem, take_packed(HeadEval::packed_size(problem)));
    const Tensor output =
        torch::stable::new_empty(maps_, {problem.batch, eval.columns()}, ScalarType::Float);
    run(
        output, [&](float* scratch) { eval.compute(data_of(output), scratch); },
        [&] { return eval.scratch_size(); });
    size_ = {problem.batch, eval.columns(), 1, 1};
  }

  void expect(int64_t channels, int64_t height, int64_t width) const {
    STD_TORCH_CHECK(size_.channels == channels && size_.height == height && size_.width == width,
                    "the step is for maps of ", channels, " x ", height, " x ", width, ", got ",
                    size_.channels, " x ", size_.height, " x ", size_.width);
  }

  const float* take_packed(int64_t count) {
    STD_TORCH_CHECK(next_ < packed_.size(), "a frozen step has no weights");
    return float_data("packed weights", packed_[next_++], {count});
  }

  // Results of steps are dense already, whatever shape their memory has.
  const void* readable_maps(ElementType type) {
    STD_TORCH_CHECK(element_type("x", maps_.scalar_type()) == type, "the step reads ",
                    name_of(scalar_type(type)), ", got ", name_of(maps_.scalar_type()));
    if (first_) {
      maps_ = torch::stable::contiguous(maps_, torch::headeronly::MemoryFormat::ChannelsLast);
    }
    first_ = false;
    return maps_.const_data_ptr();
  }

  Tensor make_output(const MapSize& size, ScalarType type, bool keeps) {
    first_ = false;
    size_ = size;
    if (keeps) return empty_maps(maps_, size, type);
    return recycled_tensor(maps_, {size.batch * size.channels * size.height * size.width}, type);
  }

  template <class Compute, class ScratchSize>
  void run(const Tensor& output, const Compute& compute, const ScratchSize& scratch_size) {
    if (size_.batch > 0) {
      const Scratch memory(maps_, scratch_size());
      compute(memory.data());
    }
    maps_ = output;
  }

  Tensor maps_;
  MapSize size_;
  bool first_ = true;
  const std::vector<Tensor>& packed_;
  size_t next_ = 0;
};

// x: [B, C, H, W] in any format. steps: for its size, one behind the other. packed: the packed
// weights of each and, where it has one, its position table. kept: indices, ascending, of the steps
// whose results are returned.
std::vector<Tensor> frozen_forward(const Tensor& x, const Tensor& steps,
                                   const std::vector<Tensor>& packed,
                                   const std::vector<int64_t>& kept) {
  check_steps(steps);
  Sequence sequence(x, packed);
  std::vector<Tensor> results;
  for (int64_t index = 0; index < steps.numel() / kStepBytes; ++index) {
    const bool keeps = std::find(kept.begin(), kept.end(), index) != kept.end();
    sequence.compute(step_at(steps, index), keeps);
    if (keeps) results.push_back(sequence.result());
  }
  STD_TORCH_CHECK(results.size() == kept.size() && sequence.used_all_tensors(),
                  "steps, packed weights and kept results do not fit together");
  return results;
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CompositeExplicitAutograd, library) {
  library.impl("cpu_multiplies", TORCH_BOX(&moat_kernels::cpu::multiplies));
}

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  using namespace moat_kernels;
  using namespace moat_kernels::cpu;
  library.impl("cpu_freeze_stem", boxed<&freeze_stem>);
  library.impl("cpu_freeze_mbconv", boxed<&freeze_mbconv>);
  library.impl("cpu_freeze_attention_half", boxed<&freeze_attention_half>);
  library.impl("cpu_freeze_pooled_half", boxed<&freeze_pooled_half>);
  library.impl("cpu_freeze_mlp", boxed<&freeze_mlp>);
  library.impl("cpu_freeze_head", boxed<&freeze_head>);
  library.impl("cpu_freeze_for_maps", boxed<&freeze_for_maps>);
  library.impl("cpu_frozen_forward", TORCH_BOX(&frozen_forward));
}
