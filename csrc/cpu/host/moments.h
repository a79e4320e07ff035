#pragma once

// Mean and variance over the pixels of a map, in parts that threads measure side by side.

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/common/moment_kernels.h"
#include "cpu/host/dispatch.h"
#include "cpu/host/parallel.h"

namespace moat_kernels::cpu {

// The mean over all parts, and the biased variance, from each part's mean and deviations [part][2]
// over count_of(part) values.
template <class Count>
std::pair<double, double> merge_moments(const double* moments, int64_t parts, int64_t stride,
                                        const Count& count_of) {
  double values = 0.0;
  double mean = 0.0;
  for (int64_t part = 0; part < parts; ++part) {
    const double count = static_cast<double>(count_of(part));
    values += count;
    mean += count * moments[part * 2 * stride];
  }
  mean /= values;
  double total = 0.0;
  for (int64_t part = 0; part < parts; ++part) {
    const double offset = moments[part * 2 * stride] - mean;
    total +=
        moments[(part * 2 + 1) * stride] + static_cast<double>(count_of(part)) * offset * offset;
  }
  return {mean, total / values};
}

// Mean [C] and, after it, biased variance [C] of x [pixels][C]. The parts are of the same size but
// for one pixel; results depend on their number, not on the threads.
inline void measure_moments(const void* x, ElementType type, int64_t pixels, int64_t channels,
                            int64_t parts, int64_t workers, double* statistics) {
  parts = std::min(pixels, parts);
  const auto first_of = [&](int64_t part) { return pixels * part / parts; };
  const auto count_of = [&](int64_t part) { return first_of(part + 1) - first_of(part); };
  std::vector<double> moments(parts * 2 * channels);
  const auto compute = MOAT_KERNELS_DISPATCH(channel_moments);
  for_each_task(parts, workers, [&](int64_t part, int64_t) {
    compute(x, type, first_of(part), count_of(part), channels,
            moments.data() + part * 2 * channels);
  });
  for (int64_t channel = 0; channel < channels; ++channel) {
    std::tie(statistics[channel], statistics[channels + channel]) =
        merge_moments(moments.data() + channel, parts, channels, count_of);
  }
}

}  // namespace moat_kernels::cpu
