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
#include "cpu/host/products.h"
#include "cpu/host/recycled_memory.h"
#include "cpu/host/tensors.h"

namespace moat_kernels::cpu {
namespace {

constexpr int64_t kMultiple = 16;  // of both sides of the weight: the widest vector
constexpr int64_t kTasks = 16;     // tasks at least, for threads to finish together

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x [rows, depth], weight [columns, depth], and what is multiplied.
struct Sizes {
  int64_t rows, columns, depth;
  Product product;

  int64_t words(int64_t elements) const { return words_of(product, elements); }
};

// Rows of a matrix in the type that is multiplied.
struct Rows {
  const char* data;
  int64_t columns;
  int64_t element_bytes;

  Rows(const char* name, const Tensor& tensor, const Sizes& sizes,
       const std::vector<int64_t>& shape)
      : columns(shape.back()) {
    const ScalarType type = operand_type(sizes.product);
    data =
        static_cast<const char*>(checked_data(name, "", tensor, type, shape.data(), shape.size()));
    element_bytes = type == ScalarType::Float ? 4 : 2;
  }
  const char* at(int64_t row, int64_t column = 0) const {
    return data + (row * columns + column) * element_bytes;
  }
};

Sizes read_sizes(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0 && weight.size(0) % kMultiple == 0 &&
                      weight.size(1) % kMultiple == 0,
                  "weight must be [N, K] with multiples of ", kMultiple, ", got ",
                  shape_of(weight));
  const int64_t depth = weight.size(1);
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == depth && x.numel() > 0, "x must be [.., ",
                  depth, "] with at least one row, got ", shape_of(x));
  const Product product = product_of(x.scalar_type());
  STD_TORCH_CHECK(x.scalar_type() == operand_type(product),
                  "x must be float32, or bfloat16 if this CPU multiplies it, got ",
                  name_of(x.scalar_type()));
  return {x.numel() / depth, weight.size(0), depth, product};
}

// Memory of floats for each worker.
struct WorkerScratch {
  int64_t size = MOAT_KERNELS_DISPATCH(linear_scratch)();
  int64_t workers = thread_count();
  Tensor memory;

  explicit WorkerScratch(const Tensor& like) : memory(recycled_floats(like, {workers * size})) {}
  float* of(int64_t worker) const { return data_of(memory) + worker * size; }
};

// out [rows, columns] = x [rows, depth] times what pack(first column, columns) has packed, + bias.
template <class Pack>
void multiply_rows(const Sizes& sizes, const Rows& x, const float* bias, const Tensor& out,
                   const WorkerScratch& scratch, const Pack& pack) {
  const int64_t words = sizes.words(sizes.depth);
  const int64_t blocks = divide_up(sizes.columns, kLinearColumns);
  const Tensor packed = recycled_floats(out, {blocks * kLinearColumns, words});
  for_each_task(blocks, scratch.workers, [&](int64_t block, int64_t) {
    const int64_t first = block * kLinearColumns;
    pack(first, std::min(kLinearColumns, sizes.columns - first), data_of(packed) + first * words);
  });
  const int64_t strips = divide_up(sizes.rows, kLinearTileRows);
  const int64_t chunks = divide_up(sizes.columns, kLinearTileColumns);
  const ElementType type = element_type("out", out.scalar_type());
  const int64_t bytes = type == ElementType::float32 ? 4 : 2;
  const auto compute = MOAT_KERNELS_DISPATCH(linear_rows);
  for_each_task(strips * chunks, scratch.workers, [&](int64_t task, int64_t worker) {
    const int64_t strip = task % strips;
    const int64_t row = sizes.rows * strip / strips;
    const int64_t column = task / strips * kLinearTileColumns;
    compute(sizes.product, sizes.rows * (strip + 1) / strips - row,
            std::min(kLinearTileColumns, sizes.columns - column), sizes.depth, x.at(row),
            data_of(packed) + column * words, bias ? bias + column : nullptr,
            static_cast<char*>(out.mutable_data_ptr()) + (row * sizes.columns + column) * bytes,
            type, sizes.columns, scratch.of(worker));
  });
}

// x's sizes, but for the last.
std::vector<int64_t> shape_with(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis + 1 < x.dim(); ++axis) shape.push_back(x.size(axis));
  shape.push_back(last);
  return shape;
}

// x [.., K], weight [N, K], bias [N] -> x weight^T + bias [.., N] in x's dtype, in which it is
// multiplied.
Tensor linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Sizes sizes = read_sizes(x, weight);
  const Rows rows("x", x, sizes, shape_with(x, sizes.depth));
  const float* weights = float_data("weight", weight, {sizes.columns, sizes.depth});
  const float* biases = float_data("bias", bias, {sizes.columns});
  const Tensor output = recycled_tensor(x, shape_with(x, sizes.columns), x.scalar_type());
  const auto pack = MOAT_KERNELS_DISPATCH(pack_panels);
  multiply_rows(sizes, rows, biases, output, WorkerScratch(x),
                [&](int64_t first, int64_t count, float* packed) {
                  pack(sizes.product, weights + first * sizes.depth, sizes.depth, count,
                       sizes.depth, nullptr, packed);
                });
  return output;
}

// x as words along its rows: itself, or a copy.
Tensor pairs_of(const Tensor& x, const Rows& rows, const Sizes& sizes, int64_t workers) {
  if (sizes.product == Product::float32) return x;
  const Tensor pairs = recycled_floats(x, {sizes.words(sizes.rows), sizes.depth});
  const auto convert = MOAT_KERNELS_DISPATCH(pair_rows);
  for_each_task(divide_up(sizes.rows, kLinearTileRows), workers, [&](int64_t strip, int64_t) {
    const int64_t first = strip * kLinearTileRows;
    convert(rows.at(first), std::min(kLinearTileRows, sizes.rows - first), sizes.depth,
            data_of(pairs) + sizes.words(first) * sizes.depth);
  });
  return pairs;
}

// Gradients of weight and bias: one block of the weight's rows and one group of x's rows at a time.
std::tuple<Tensor, Tensor> parameter_gradients(const Sizes& sizes, const Rows& grad,
                                               const Tensor& x, const Tensor& pairs,
                                               const WorkerScratch& scratch) {
  const Tensor grad_weight = recycled_floats(x, {sizes.columns, sizes.depth});
  const Tensor grad_bias = recycled_floats(x, {sizes.columns});
  const int64_t blocks = divide_up(sizes.columns, kLinearColumns);
  const int64_t strips = divide_up(sizes.rows, kLinearTileRows);
  const int64_t groups = std::clamp<int64_t>(divide_up(kTasks, blocks), 1, strips);
  const int64_t part = sizes.columns * sizes.depth;
  const bool whole = groups == 1;
  const Tensor parts = recycled_floats(x, {whole ? 0 : groups * part});
  const Tensor sums = recycled_floats(x, {groups * sizes.columns});
  float* products = whole ? data_of(grad_weight) : data_of(parts);
  const int64_t words = sizes.words(sizes.rows);
  const int64_t rows_per_word = sizes.product == Product::bfloat16 ? 2 : 1;
  const auto compute = MOAT_KERNELS_DISPATCH(linear_weight);
  for_each_task(blocks * groups, scratch.workers, [&](int64_t task, int64_t worker) {
    const int64_t column = task / groups * kLinearColumns;
    const int64_t group = task % groups;
    const int64_t word = words * group / groups;
    const int64_t first = word * rows_per_word;
    const int64_t last = std::min(words * (group + 1) / groups * rows_per_word, sizes.rows);
    compute(sizes.product, last - first, std::min(kLinearColumns, sizes.columns - column),
            sizes.depth, grad.at(first, column), sizes.columns,
            static_cast<const float*>(pairs.const_data_ptr()) + word * sizes.depth,
            scratch.of(worker), products + group * part + column * sizes.depth,
            data_of(sums) + group * sizes.columns + column);
  });
  const auto add = MOAT_KERNELS_DISPATCH(linear_add_parts);
  for_each_task(whole ? 0 : blocks, scratch.workers, [&](int64_t block, int64_t) {
    const int64_t first = block * kLinearColumns * sizes.depth;
    add(products + first, groups, part, std::min(kLinearColumns * sizes.depth, part - first),
        data_of(grad_weight) + first);
  });
  add(data_of(sums), groups, sizes.columns, sizes.columns, data_of(grad_bias));
  return {grad_weight, grad_bias};
}

// -> gradients of x, in input_dtype, of the weight and of the bias; empty where they are not needed
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& weight, ScalarType input_dtype,
                                                   bool needs_input, bool needs_parameters) {
  const Sizes sizes = read_sizes(x, weight);
  const Rows gradient("grad", grad, sizes, shape_with(x, sizes.columns));
  const Rows rows("x", x, sizes, shape_with(x, sizes.depth));
  const float* weights = float_data("weight", weight, {sizes.columns, sizes.depth});
  element_type("input_dtype", input_dtype);
  const WorkerScratch scratch(x);
  const Tensor nothing = recycled_floats(x, {0});
  std::tuple<Tensor, Tensor> parameters = {nothing, nothing};
  if (needs_parameters) {
    const Tensor pairs = pairs_of(x, rows, sizes, scratch.workers);
    parameters = parameter_gradients(sizes, gradient, x, pairs, scratch);
  }
  const auto [grad_weight, grad_bias] = parameters;
  if (!needs_input) return {nothing, grad_weight, grad_bias};
  const Tensor grad_input = recycled_tensor(x, shape_with(x, sizes.depth), input_dtype);
  const auto pack = MOAT_KERNELS_DISPATCH(pack_panels_transposed);
  multiply_rows({sizes.rows, sizes.depth, sizes.columns, sizes.product}, gradient, nullptr,
                grad_input, scratch, [&](int64_t first, int64_t count, float* packed) {
                  pack(sizes.product, weights + first, sizes.depth, count, sizes.columns, nullptr,
                       packed);
                });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_linear_forward", TORCH_BOX(&moat_kernels::cpu::linear_forward));
  library.impl("cpu_linear_backward", TORCH_BOX(&moat_kernels::cpu::linear_backward));
}
