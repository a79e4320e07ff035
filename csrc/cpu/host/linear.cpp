// The native ops of a linear layer: checks, memory and threads around the kernels.
// All divisions of work depend on the shape only, and partial sums are added in the order of their
// index, so results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/common/linear_kernels.h"
#include "cpu/common/pack_kernels.h"
#include "cpu/host/dispatch.h"
#include "cpu/host/parallel.h"
#include "cpu/host/recycled_memory.h"
#include "cpu/host/tensors.h"

namespace moat_kernels::cpu {
namespace {

constexpr int64_t kMultiple = 16;    // of both sides of the weight: the widest vector
constexpr int64_t kStripRows = 128;  // rows that stay in cache while a part of the weight passes
constexpr int64_t kColumns = 256;    // of a result that a task computes
constexpr int64_t kTasks = 16;       // tasks at least, for threads to finish together

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Sizes {
  int64_t rows, columns, depth;  // x [rows, depth], weight [columns, depth]
};

Sizes read_sizes(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0 && weight.size(0) % kMultiple == 0 &&
                      weight.size(1) % kMultiple == 0,
                  "weight must be [N, K] with multiples of ", kMultiple, ", got ",
                  shape_of(weight));
  const int64_t depth = weight.size(1);
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == depth && x.numel() > 0, "x must be [.., ",
                  depth, "] with at least one row, got ", shape_of(x));
  return {x.numel() / depth, weight.size(0), depth};
}

// out [rows, columns] = x [rows, depth] times what pack(first column, columns) has packed, + bias.
template <class Pack>
void multiply_rows(const Tensor& like, const Sizes& sizes, const float* x, const float* bias,
                   float* out, const Pack& pack) {
  const int64_t workers = thread_count();
  const Tensor packed = recycled_floats(
      like, {divide_up(sizes.columns, kLinearColumns) * kLinearColumns, sizes.depth});
  for_each_task(divide_up(sizes.columns, kLinearColumns), workers, [&](int64_t block, int64_t) {
    const int64_t first = block * kLinearColumns;
    pack(first, std::min(kLinearColumns, sizes.columns - first),
         data_of(packed) + first * sizes.depth);
  });
  const int64_t strips = divide_up(sizes.rows, kStripRows);
  const int64_t chunks = divide_up(sizes.columns, kColumns);
  const auto compute = MOAT_KERNELS_DISPATCH(linear_rows);
  for_each_task(strips * chunks, workers, [&](int64_t task, int64_t) {
    const int64_t strip = task % strips;
    const int64_t row = sizes.rows * strip / strips;
    const int64_t column = task / strips * kColumns;
    compute(sizes.rows * (strip + 1) / strips - row, std::min(kColumns, sizes.columns - column),
            sizes.depth, x + row * sizes.depth, data_of(packed) + column * sizes.depth,
            bias ? bias + column : nullptr, out + row * sizes.columns + column, sizes.columns);
  });
}

// x's sizes, but for the last.
std::vector<int64_t> shape_with(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis + 1 < x.dim(); ++axis) shape.push_back(x.size(axis));
  shape.push_back(last);
  return shape;
}

// x [.., K], weight [N, K], bias [N] -> x weight^T + bias [.., N]
Tensor linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Sizes sizes = read_sizes(x, weight);
  const float* rows = any_float_data("x", x, shape_with(x, sizes.depth));
  const float* weights = float_data("weight", weight, {sizes.columns, sizes.depth});
  const float* biases = float_data("bias", bias, {sizes.columns});
  const Tensor output = recycled_floats(x, shape_with(x, sizes.columns));
  const auto pack = MOAT_KERNELS_DISPATCH(pack_panels);
  multiply_rows(x, sizes, rows, biases, data_of(output),
                [&](int64_t first, int64_t count, float* packed) {
                  pack(Product::float32, weights + first * sizes.depth, sizes.depth, count,
                       sizes.depth, nullptr, packed);
                });
  return output;
}

// Gradients of weight and bias: one block of the weight's rows and one group of x's rows at a time.
std::tuple<Tensor, Tensor> parameter_gradients(const Tensor& like, const Sizes& sizes,
                                               const float* grad, const float* x) {
  const Tensor grad_weight = recycled_floats(like, {sizes.columns, sizes.depth});
  const Tensor grad_bias = recycled_floats(like, {sizes.columns});
  const int64_t workers = thread_count();
  const int64_t blocks = divide_up(sizes.columns, kLinearColumns);
  const int64_t groups =
      std::clamp<int64_t>(divide_up(kTasks, blocks), 1, divide_up(sizes.rows, kStripRows));
  const int64_t part = sizes.columns * sizes.depth;
  const bool whole = groups == 1;
  const Tensor parts = recycled_floats(like, {whole ? 0 : groups * part});
  const Tensor sums = recycled_floats(like, {groups * sizes.columns});
  const int64_t scratch_size = MOAT_KERNELS_DISPATCH(linear_scratch)();
  const Tensor scratch = recycled_floats(like, {workers * scratch_size});
  float* products = whole ? data_of(grad_weight) : data_of(parts);
  const auto compute = MOAT_KERNELS_DISPATCH(linear_weight);
  for_each_task(blocks * groups, workers, [&](int64_t task, int64_t worker) {
    const int64_t column = task / groups * kLinearColumns;
    const int64_t group = task % groups;
    const int64_t first = sizes.rows * group / groups;
    compute(
        sizes.rows * (group + 1) / groups - first, std::min(kLinearColumns, sizes.columns - column),
        sizes.depth, grad + first * sizes.columns + column, sizes.columns, x + first * sizes.depth,
        data_of(scratch) + worker * scratch_size, products + group * part + column * sizes.depth,
        data_of(sums) + group * sizes.columns + column);
  });
  const auto add = MOAT_KERNELS_DISPATCH(linear_add_parts);
  for_each_task(whole ? 0 : blocks, workers, [&](int64_t block, int64_t) {
    const int64_t first = block * kLinearColumns * sizes.depth;
    add(products + first, groups, part, std::min(kLinearColumns * sizes.depth, part - first),
        data_of(grad_weight) + first);
  });
  add(data_of(sums), groups, sizes.columns, sizes.columns, data_of(grad_bias));
  return {grad_weight, grad_bias};
}

// -> gradients of x, of the weight and of the bias; empty where they are not needed
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& weight, bool needs_input,
                                                   bool needs_parameters) {
  const Sizes sizes = read_sizes(x, weight);
  const float* gradient = any_float_data("grad", grad, shape_with(x, sizes.columns));
  const float* rows = any_float_data("x", x, shape_with(x, sizes.depth));
  const float* weights = float_data("weight", weight, {sizes.columns, sizes.depth});
  const Tensor nothing = recycled_floats(x, {0});
  std::tuple<Tensor, Tensor> parameters = {nothing, nothing};
  if (needs_parameters) parameters = parameter_gradients(x, sizes, gradient, rows);
  const auto [grad_weight, grad_bias] = parameters;
  if (!needs_input) return {nothing, grad_weight, grad_bias};
  const Tensor grad_input = recycled_floats(x, shape_with(x, sizes.depth));
  const auto pack = MOAT_KERNELS_DISPATCH(pack_panels_transposed);
  multiply_rows(x, {sizes.rows, sizes.depth, sizes.columns}, gradient, nullptr, data_of(grad_input),
                [&](int64_t first, int64_t count, float* packed) {
                  pack(Product::float32, weights + first, sizes.depth, count, sizes.columns,
                       nullptr, packed);
                });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_linear_forward", TORCH_BOX(&moat_kernels::cpu::linear_forward));
  library.impl("cpu_linear_backward", TORCH_BOX(&moat_kernels::cpu::linear_backward));
}
