// The native ops of the norm and GELU in the stem's training: checks, memory and threads around the
// kernels. All divisions of work depend on the shape only, and partial sums are added in the order
// of their index, so results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/stem_train_kernels.h"
#include "cpu/host/batch_norm.h"
#include "cpu/host/dispatch.h"
#include "cpu/host/moments.h"
#include "cpu/host/recycled_memory.h"
#include "cpu/host/tensors.h"

namespace moat_kernels::cpu {
namespace {

// Of a map that a task takes: two maps fit the L2 cache.
constexpr int64_t kStripElements = 16 << 10;

// A map [B, H, W, C] as rows of a whole number of pixels and of groups of vectors.
struct Rows {
  int64_t pixels, channels, period;
  ElementType type;
  std::vector<int64_t> sizes;

  explicit Rows(const Tensor& map)
      : pixels(map.dim() == 4 ? map.size(0) * map.size(1) * map.size(2) : 0),
        channels(map.dim() == 4 ? map.size(3) : 0),
        period(std::lcm(channels, kStemGroup)),
        type(element_type("z", map.scalar_type())) {
    STD_TORCH_CHECK(elements() > 0, "z must be a map [B, H, W, C] with at least one element, got ",
                    shape_of(map));
    sizes = {map.size(0), map.size(1), map.size(2), map.size(3)};
  }
  int64_t elements() const { return pixels * channels; }
  int64_t bytes(int64_t count) const {
    return type == ElementType::float32 ? 4 * count : 2 * count;
  }
  int64_t strip() const { return period * std::max<int64_t>(1, kStripElements / period); }
  int64_t strips() const { return (elements() + strip() - 1) / strip(); }

  // Of a tensor that is like z.
  char* data(const char* name, const Tensor& map) const {
    checked_data(name, "", map, scalar_type(type), sizes.data(), sizes.size());
    return static_cast<char*>(map.mutable_data_ptr());
  }
};

// Calls compute(strip, rows, z, other) for all strips of two maps, each from its place in them on.
template <class Compute>
void for_each_strip(const Rows& rows, const char* z, char* other, const Compute& compute) {
  for_each_task(rows.strips(), thread_count(), [&](int64_t index, int64_t) {
    const int64_t first = index * rows.strip();
    const int64_t count = std::min(rows.strip(), rows.elements() - first);
    compute(index, count / rows.period, z + rows.bytes(first), other + rows.bytes(first));
    const int64_t rest = count % rows.period;
    if (rest == 0) return;
    // The last row may be cut short: it is computed in a whole one, whose other lanes are zero.
    const int64_t last = rows.bytes(first + count - rest);
    const int64_t part = rows.bytes(rest);
    std::vector<char> row(2 * rows.bytes(rows.period));
    char* second = row.data() + rows.bytes(rows.period);
    std::copy_n(z + last, part, row.data());
    std::copy_n(other + last, part, second);
    compute(index, 1, row.data(), second);
    std::copy_n(second, part, other + last);
  });
}

// One value per channel, repeated over the lanes of a row.
template <class Value>
std::vector<float> spread(const Rows& rows, const Value& value_of) {
  std::vector<float> lanes(rows.period);
  for (int64_t lane = 0; lane < rows.period; ++lane) {
    lanes[lane] = static_cast<float>(value_of(lane % rows.channels));
  }
  return lanes;
}

const double* statistics_data(const Rows& rows, const Tensor& statistics) {
  return double_data("statistics", statistics, {2, rows.channels});
}

// The norm as the passes take it. They see z less its mean in float32, so that a mean far from zero
// costs no precision; what the rounding of the mean leaves is in `shift`.
class Norm {
 public:
  Norm(const Rows& rows, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
       const Tensor& statistics, double eps)
      : affine_({NormMode::measured, float_data("norm.weight", weight, {rows.channels}),
                 float_data("norm.bias", bias, {rows.channels}), nullptr, nullptr, eps},
                rows.channels) {
    const double* mean = statistics_data(rows, statistics);
    centre_ = spread(rows, [&](int64_t channel) { return mean[channel]; });
    for (int64_t channel = 0; channel < rows.channels; ++channel) {
      affine_.fold(channel, mean[channel] - static_cast<double>(centre_[channel]),
                   mean[rows.channels + channel], 0.0);
    }
    scale_ = spread(rows, [&](int64_t channel) { return affine_.scale(channel); });
    shift_ = spread(rows, [&](int64_t channel) { return affine_.shift(channel); });
  }

  const Affine& affine() const { return affine_; }
  StemNorm lanes() const { return {centre_.data(), scale_.data(), shift_.data()}; }

 private:
  Affine affine_;
  std::vector<float> centre_, scale_, shift_;
};

// z [B, H, W, C] -> gelu(norm(z)) in its dtype, and the statistics: mean and biased variance [2, C]
// in float64, measured unless they are given.
std::tuple<Tensor, Tensor> stem_train_forward(const Tensor& z, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias,
                                              const std::optional<Tensor>& given, double eps) {
  const Rows rows(z);
  const char* map = rows.data("z", z);
  const Tensor statistics = torch::stable::new_empty(z, {2, rows.channels}, ScalarType::Double);
  double* values = static_cast<double*>(statistics.mutable_data_ptr());
  if (given) {
    std::copy_n(statistics_data(rows, *given), 2 * rows.channels, values);
  } else {
    // Parts that stay in cache: channels are measured some vectors at a time.
    measure_moments(map, rows.type, rows.pixels, rows.channels, rows.strips(), thread_count(),
                    values);
  }
  const Norm norm(rows, weight, bias, statistics, eps);
  const Tensor output = recycled_tensor(z, rows.sizes, z.scalar_type());
  const auto compute = MOAT_KERNELS_DISPATCH(stem_train_forward);
  for_each_strip(rows, map, rows.data("output", output),
                 [&](int64_t, int64_t count, const char* from, char* to) {
                   compute(rows.type, count, rows.period, from, norm.lanes(), to);
                 });
  return {output, statistics};
}

// The gradient of z in place of `grad`, that of the output. -> gradients of weight and bias [C]
// frozen: the statistics do not depend on z.
std::tuple<Tensor, Tensor> stem_train_backward(const Tensor& grad, const Tensor& z,
                                               const std::optional<Tensor>& weight,
                                               const std::optional<Tensor>& bias,
                                               const Tensor& statistics, double eps, bool frozen) {
  const Rows rows(z);
  const char* map = rows.data("z", z);
  char* gradient_map = rows.data("grad", grad);
  const Norm norm(rows, weight, bias, statistics, eps);
  std::vector<double> sums(rows.strips() * 2 * rows.period);
  const auto add = MOAT_KERNELS_DISPATCH(stem_train_sums);
  for_each_strip(rows, map, gradient_map,
                 [&](int64_t strip, int64_t count, const char* from, char* gradient) {
                   add(rows.type, count, rows.period, from, norm.lanes(), gradient,
                       sums.data() + strip * 2 * rows.period);
                 });
  const Tensor grad_weight = recycled_floats(z, {rows.channels});
  const Tensor grad_bias = recycled_floats(z, {rows.channels});
  std::vector<NormGradient> gradients(rows.channels);
  for (int64_t channel = 0; channel < rows.channels; ++channel) {
    double total = 0.0;
    double product = 0.0;
    for (int64_t strip = 0; strip < rows.strips(); ++strip) {
      const double* part = sums.data() + strip * 2 * rows.period;
      for (int64_t lane = channel; lane < rows.period; lane += rows.channels) {
        total += part[lane];
        product += part[rows.period + lane];
      }
    }
    gradients[channel] =
        norm.affine().gradient(channel, total, product, static_cast<double>(rows.pixels));
    data_of(grad_weight)[channel] = static_cast<float>(gradients[channel].weight);
    data_of(grad_bias)[channel] = static_cast<float>(total);
  }
  const std::vector<float> a = spread(rows, [&](int64_t c) { return norm.affine().scale(c); });
  const std::vector<float> b =
      spread(rows, [&](int64_t c) { return frozen ? 0.0 : gradients[c].slope; });
  const std::vector<float> c =
      spread(rows, [&](int64_t i) { return frozen ? 0.0 : gradients[i].constant; });
  const auto combine = MOAT_KERNELS_DISPATCH(stem_train_backward);
  for_each_strip(rows, map, gradient_map,
                 [&](int64_t, int64_t count, const char* from, char* gradient) {
                   combine(rows.type, count, rows.period, from, norm.lanes(),
                           {a.data(), b.data(), c.data()}, gradient);
                 });
  return {grad_weight, grad_bias};
}

}  // namespace
}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CPU, library) {
  library.impl("cpu_stem_train_forward", TORCH_BOX(&moat_kernels::cpu::stem_train_forward));
  library.impl("cpu_stem_train_backward", TORCH_BOX(&moat_kernels::cpu::stem_train_backward));
}
