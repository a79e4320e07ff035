#pragma once

// Batch norms in training, in float64 vectors of channels. The passes see z, a convolution's output
// around some constant; a norm of z + constant is
//   y = (z - centre) * inverse_std * weight + bias = scale * z + shift.

#include <cmath>
#include <cstdint>
#include <vector>

namespace moat_kernels::cpu {

enum class NormMode : int64_t { absent, frozen, measured };

struct TrainNorm {
  NormMode mode = NormMode::absent;
  const float* weight = nullptr;  // null: ones
  const float* bias = nullptr;    // null: zeros
  const float* mean = nullptr;    // running statistics, of a frozen norm
  const float* variance = nullptr;
  double eps = 0;
};

// What the backward of a norm gives: the gradient of z is scale * dy + slope * z + constant.
struct NormGradient {
  double slope, constant;
  double weight;  // gradient of the norm's weight
  double sum;     // of the gradients of z: zero where the batch is measured
};

class Affine {
 public:
  Affine(const TrainNorm& norm, int64_t channels)
      : norm_(norm),
        centre_(channels),
        inverse_std_(channels),
        scale_(channels),
        shift_(channels) {}

  bool measured() const { return norm_.mode == NormMode::measured; }
  double scale(int64_t channel) const { return scale_[channel]; }
  double shift(int64_t channel) const { return shift_[channel]; }
  // The mean that is known without the batch: the running one of a frozen norm, else 0.
  double fixed_mean(int64_t channel) const {
    return norm_.mode == NormMode::frozen ? static_cast<double>(norm_.mean[channel]) : 0.0;
  }

  // mean, variance: of z in this batch, read only if the norm measures it.
  void fold(int64_t channel, double mean, double variance, double constant) {
    if (norm_.mode == NormMode::absent) {
      centre_[channel] = -constant;
      inverse_std_[channel] = 1.0;
      scale_[channel] = 1.0;
      shift_[channel] = constant;
      return;
    }
    if (norm_.mode == NormMode::frozen) {
      mean = static_cast<double>(norm_.mean[channel]) - constant;
      variance = static_cast<double>(norm_.variance[channel]);
    }
    centre_[channel] = mean;
    inverse_std_[channel] = 1.0 / std::sqrt(variance + norm_.eps);
    const double weight = norm_.weight ? static_cast<double>(norm_.weight[channel]) : 1.0;
    scale_[channel] = inverse_std_[channel] * weight;
    shift_[channel] = -mean * scale_[channel];
    if (norm_.bias) shift_[channel] += static_cast<double>(norm_.bias[channel]);
  }

  // From sum(dy) and sum(dy z) over `count` values.
  NormGradient gradient(int64_t channel, double total, double product, double count) const {
    const double weight = (product - centre_[channel] * total) * inverse_std_[channel];
    if (!measured()) return {0.0, 0.0, weight, scale_[channel] * total};
    const double slope = -scale_[channel] * inverse_std_[channel] * weight / count;
    return {slope, -scale_[channel] * total / count - slope * centre_[channel], weight, 0.0};
  }

 private:
  TrainNorm norm_;
  std::vector<double> centre_, inverse_std_, scale_, shift_;
};

}  // namespace moat_kernels::cpu
