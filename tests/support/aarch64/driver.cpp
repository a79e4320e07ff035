// Runs kernels of csrc/cpu/isa without PyTorch: `driver mbconv|window_attention NUMBERS...`,
// with the tensors as bytes on stdin, results as bytes on stdout. One thread; the order of numbers
// and tensors is that of the code.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/common/mbconv_eval_kernels.h"
#include "cpu/common/window_attention_kernels.h"

namespace {

using namespace moat_kernels::cpu;

// Exactly as large as needed and uninitialised but for its NaNs, so that a read too many shows.
std::vector<float> floats(int64_t count) {
  return std::vector<float>(static_cast<size_t>(count), __builtin_nanf(""));
}

class Arguments {
 public:
  explicit Arguments(char** next) : next_(next) {}

  int64_t integer() { return std::atoll(*next_++); }
  float number() { return std::strtof(*next_++, nullptr); }

  // The next tensor of stdin.
  char* bytes(int64_t count) {
    tensors_.emplace_back(static_cast<size_t>(count));
    if (std::fread(tensors_.back().data(), 1, tensors_.back().size(), stdin) !=
        tensors_.back().size()) {
      std::fputs("stdin ended too early\n", stderr);
      std::exit(1);
    }
    return tensors_.back().data();
  }
  float* tensor(int64_t count) {
    return reinterpret_cast<float*>(bytes(count * static_cast<int64_t>(sizeof(float))));
  }

 private:
  char** next_;
  std::vector<std::vector<char>> tensors_;
};

void write(const void* data, int64_t bytes) {
  std::fwrite(data, 1, static_cast<size_t>(bytes), stdout);
}

int64_t size_of(ElementType type) { return type == ElementType::float32 ? 4 : 2; }

BatchNorm read_norm(Arguments& arguments, int64_t channels, float eps) {
  BatchNorm norm;
  norm.present = true;
  norm.weight = arguments.tensor(channels);
  norm.bias = arguments.tensor(channels);
  norm.mean = arguments.tensor(channels);
  norm.variance = arguments.tensor(channels);
  norm.eps = eps;
  return norm;
}

Convolution read_convolution(Arguments& arguments, int64_t weights, int64_t biases) {
  const float* weight = arguments.tensor(weights);
  return {weight, biases ? arguments.tensor(biases) : nullptr};
}

// What TensorFlow's SAME puts before a map.
int64_t padding_before(int64_t size, int64_t out, int64_t kernel, int64_t stride) {
  const int64_t all = (out - 1) * stride + kernel - size;
  return all > 0 ? all / 2 : 0;
}

void mbconv(Arguments& arguments) {
  MBConvProblem problem;
  problem.batch = arguments.integer();
  problem.height = arguments.integer();
  problem.width = arguments.integer();
  problem.in_channels = arguments.integer();
  problem.out_channels = arguments.integer();
  problem.wide_channels = arguments.integer();
  problem.stride = arguments.integer();
  problem.squeeze_excite.channels = arguments.integer();
  problem.x_type = static_cast<ElementType>(arguments.integer());
  const float eps = arguments.number();
  problem.output_type = problem.x_type;
  problem.residual = true;
  problem.squeeze_excite.present = problem.squeeze_excite.channels > 0;

  const int64_t in = problem.in_channels, wide = problem.wide_channels, out = problem.out_channels;
  problem.out_height = (problem.height + problem.stride - 1) / problem.stride;
  problem.out_width = (problem.width + problem.stride - 1) / problem.stride;
  problem.top = padding_before(problem.height, problem.out_height, 3, problem.stride);
  problem.left = padding_before(problem.width, problem.out_width, 3, problem.stride);
  if (problem.stride == 2) {
    problem.pool.kind = PoolKind::average;
    problem.pool.size = problem.pool.stride = 2;
    problem.pool.top = padding_before(problem.height, problem.out_height, 2, 2);
    problem.pool.left = padding_before(problem.width, problem.out_width, 2, 2);
  }
  const int64_t element = size_of(problem.x_type);
  problem.x = arguments.bytes(problem.batch * problem.height * problem.width * in * element);
  problem.pre_norm = read_norm(arguments, in, eps);
  problem.expand_norm = read_norm(arguments, wide, eps);
  problem.depthwise_norm = read_norm(arguments, wide, eps);
  problem.expand = read_convolution(arguments, wide * in, 0);
  problem.depthwise = read_convolution(arguments, wide * 9, 0);
  problem.project = read_convolution(arguments, out * wide, out);
  SqueezeExcite& excite = problem.squeeze_excite;
  if (excite.present) {
    excite.reduce = read_convolution(arguments, excite.channels * wide, excite.channels);
    excite.expand = read_convolution(arguments, wide * excite.channels, wide);
  }
  problem.projects_shortcut = in != out;
  if (problem.projects_shortcut) problem.shortcut = read_convolution(arguments, out * in, out);
  const int64_t size = problem.batch * problem.out_height * problem.out_width * out * element;
  std::vector<char> output(static_cast<size_t>(size));
  problem.output = output.data();

  std::vector<float> packed = floats(baseline::mbconv_eval_packed_size(problem, true));
  std::vector<float> scratch = floats(baseline::mbconv_eval_scratch_size(problem));
  const int64_t blocks = baseline::mbconv_eval_blocks(problem);
  baseline::mbconv_eval_fold(problem, packed.data());
  for (int64_t block = 0; block < blocks; ++block) {
    baseline::mbconv_eval_pack(problem, block, packed.data());
  }
  for (int64_t image = 0; image < problem.batch; ++image) {
    const MBConvTask task = {image, 1, 0, problem.out_height, 0, blocks, false};
    if (!excite.present) {
      baseline::mbconv_eval_fused(problem, packed.data(), task, scratch.data());
      continue;
    }
    std::vector<float> gated = floats(baseline::mbconv_eval_gated_size(problem));
    std::vector<float> sums = floats(baseline::mbconv_eval_gate_size(problem));
    std::vector<float> gate = floats(baseline::mbconv_eval_gate_size(problem));
    baseline::mbconv_eval_stencil(problem, packed.data(), task, scratch.data(), gated.data(),
                                  sums.data());
    baseline::mbconv_eval_gate(problem, sums.data(), 1, 0, scratch.data(), gate.data());
    baseline::mbconv_eval_project(problem, packed.data(), task, scratch.data(), gated.data(),
                                  gate.data());
  }
  write(output.data(), size);
}

// A contiguous map.
AttentionMap map_at(char* data, const WindowAttention& problem, int64_t channels) {
  return {data, problem.height * problem.width * channels, problem.width * channels, channels};
}

void window_attention(Arguments& arguments) {
  WindowAttentionForward forward;
  forward.batch = arguments.integer();
  forward.height = arguments.integer();
  forward.width = arguments.integer();
  forward.heads = arguments.integer();
  forward.head_dim = arguments.integer();
  forward.window_height = arguments.integer();
  forward.window_width = arguments.integer();
  forward.element = static_cast<ElementType>(arguments.integer());
  forward.scale = arguments.number();
  forward.window_rows = (forward.height + forward.window_height - 1) / forward.window_height;
  forward.window_columns = (forward.width + forward.window_width - 1) / forward.window_width;
  forward.grid = false;
  forward.chunks = 1;
  forward.heads_per_unit = 1;
  forward.query_blocks = 1;
  forward.head_stride = forward.head_dim;
  const int64_t channels = forward.heads * forward.head_dim;
  forward.part_stride = channels;
  const int64_t pixels = forward.batch * forward.height * forward.width;
  const int64_t map_bytes = pixels * channels * size_of(forward.element);
  const int64_t table_size =
      forward.heads * (2 * forward.window_height - 1) * (2 * forward.window_width - 1);
  forward.qkv = map_at(arguments.bytes(3 * map_bytes), forward, 3 * channels);
  forward.bias_table = arguments.tensor(table_size);
  std::vector<char> output(static_cast<size_t>(map_bytes));
  forward.output = map_at(output.data(), forward, channels);
  std::vector<float> log_sum_exp = floats(pixels * forward.heads);
  forward.log_sum_exp = log_sum_exp.data();
  std::vector<float> scratch = floats(baseline::window_attention_forward_scratch(forward));
  baseline::window_attention_forward(forward, 0, forward.heads, scratch.data());
  write(output.data(), map_bytes);

  WindowAttentionBackward backward;
  static_cast<WindowAttention&>(backward) = forward;
  backward.output = forward.output;
  backward.output_gradient = map_at(arguments.bytes(map_bytes), forward, channels);
  std::vector<char> qkv_gradient(static_cast<size_t>(3 * map_bytes));
  backward.qkv_gradient = map_at(qkv_gradient.data(), forward, 3 * channels);
  std::vector<float> table_gradient = floats(table_size);
  backward.table_gradients = table_gradient.data();
  scratch = floats(baseline::window_attention_backward_scratch(backward));
  baseline::window_attention_backward(backward, 0, forward.heads, scratch.data());
  write(qkv_gradient.data(), 3 * map_bytes);
  write(table_gradient.data(), table_size * static_cast<int64_t>(sizeof(float)));
}

}  // namespace

int main(int count, char** words) {
  const std::string op = count > 1 ? words[1] : "";
  Arguments arguments(words + 2);
  if (op == "mbconv") {
    mbconv(arguments);
  } else if (op == "window_attention") {
    window_attention(arguments);
  } else {
    std::fputs("usage: driver mbconv|window_attention NUMBERS...\n", stderr);
    return 2;
  }
  return 0;
}
