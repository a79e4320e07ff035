#include "cpu/common/moment_kernels.h"

#include "cpu/isa/lane_moments.h"
#include "cpu/isa/lanes.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

namespace {

// moments of the channels from `channel` on, as far as whole groups of vectors reach.
template <int vectors, class Element>
int64_t moments_of_vectors(const Element* x, int64_t pixels, int64_t channels, int64_t channel,
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

template <class Element>
void moments_of(const Element* x, int64_t pixels, int64_t channels, double* moments) {
  int64_t channel = moments_of_vectors<kLanes>(x, pixels, channels, 0, moments);
  channel = moments_of_vectors<1>(x, pixels, channels, channel, moments);
  for (; channel < channels; ++channel) {
    const auto value_at = [&](int64_t pixel) {
      float value;
      widen(x + pixel * channels + channel, 1, &value);
      return static_cast<double>(value);
    };
    const double shift = value_at(0);
    double sum = 0.0;
    double square = 0.0;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const double value = value_at(pixel) - shift;
      sum += value;
      square += value * value;
    }
    const double offset = sum / static_cast<double>(pixels);
    moments[channel] = shift + offset;
    moments[channels + channel] = square - offset * sum;
  }
}

}  // namespace

void channel_moments(const void* x, ElementType type, int64_t first, int64_t pixels,
                     int64_t channels, double* moments) {
  with_elements(type, x, [&](auto* elements) __attribute__((always_inline)) {
    moments_of(elements + first * channels, pixels, channels, moments);
  });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
