#include "cpu/common/moment_kernels.h"

#include "cpu/isa/lane_moments.h"
#include "cpu/isa/lanes.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

namespace {

// moments of the channels from `channel` on, as far as whole groups of vectors reach.
template <int vectors>
int64_t moments_of_vectors(const float* x, int64_t pixels, int64_t channels, int64_t channel,
                           double* moments) {
  constexpr int64_t kFloats = Moments<vectors>::kFloats;
  for (; channel + kFloats <= channels; channel += kFloats) {
    Moments<vectors> sums;
    sums.start(x + channel);
    sums.add(x + channel, pixels, channels);
    sums.finish(pixels, moments + channel, moments + channels + channel);
  }
  return channel;
}

}  // namespace

void channel_moments(const float* x, int64_t pixels, int64_t channels, double* moments) {
  int64_t channel = moments_of_vectors<kLanes>(x, pixels, channels, 0, moments);
  channel = moments_of_vectors<1>(x, pixels, channels, channel, moments);
  for (; channel < channels; ++channel) {
    const double shift = static_cast<double>(x[channel]);
    double sum = 0.0;
    double square = 0.0;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const double value = static_cast<double>(x[pixel * channels + channel]) - shift;
      sum += value;
      square += value * value;
    }
    const double offset = sum / static_cast<double>(pixels);
    moments[channel] = shift + offset;
    moments[channels + channel] = square - offset * sum;
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
