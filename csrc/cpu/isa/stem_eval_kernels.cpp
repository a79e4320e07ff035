// The stem with fixed statistics:
//   output = conv3x3(act(norm(conv3x3 of stride 2(x)))) + bias
// A strip of rows of the first convolution's output stays in cache; memory moves x and the output
// once. On maps [row][column][channel] the three pixels that a row of a 3x3 kernel sees lie side by
// side, so a convolution is three matrix products, whose rows overlap: no im2col copy. The second
// one goes by Winograd's transform, two rows at a time, whose products alone are of the problem's
// kind, and only where that gives a value that is not finite by these products, in float. On tiles,
// where products are cheap, it goes by these products, of rows that are rounded once.

#include "cpu/common/stem_eval_kernels.h"

#include "cpu/isa/activation.h"
#include "cpu/isa/mbconv_pack.h"
#include "cpu/isa/stem_winograd.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

constexpr int64_t kSide = 3;  // of both kernels

// What the rows between the convolutions may take of an L2 cache, in floats.
constexpr int64_t kMiddleFloats = 60 * 1024;

// Channels between the convolutions, rounded up to vectors; those added are zero.
int64_t middle_channels(const StemProblem& problem) { return round_up(problem.channels, kWidth); }
// The same of the output.
int64_t output_channels(const StemProblem& problem) {
  return round_up(problem.out_channels, kWidth);
}
int64_t output_panels(const StemProblem& problem) {
  return divide_up(problem.out_channels, kPanel);
}
int64_t middle_row(const StemProblem& problem) {
  return (round_up(problem.out_width, 2) + 2) * middle_channels(problem);
}

// One row of x with its border, as floats [column][channel].
int64_t input_columns(const StemProblem& problem) { return 2 * problem.out_width + 1; }
int64_t input_row(const StemProblem& problem) {
  return input_columns(problem) * problem.in_channels;
}

int64_t first_depth(const StemProblem& problem) { return kSide * problem.in_channels; }
int64_t second_depth(const StemProblem& problem) { return kSide * middle_channels(problem); }

// Pairs of output rows, which Winograd's transform takes together, are divided among strips: an
// even number of these, for pairs of threads.
int64_t row_pairs(const StemProblem& problem) { return divide_up(problem.out_height, 2); }

int64_t strip_count(const StemProblem& problem) {
  const int64_t fitting = larger((kMiddleFloats / middle_row(problem) - 2) / 2, 2);
  const int64_t strips = divide_up(row_pairs(problem), fitting);
  return smaller(round_up(strips, 2), row_pairs(problem));
}

int64_t most_strip_rows(const StemProblem& problem) {
  return 2 * divide_up(row_pairs(problem), strip_count(problem));
}

// The weights of a panel of the channels of both: [kernel row][depth][kPanel] of both convolutions,
// and their biases [kPanel].
struct PackedPanel {
  float *first, *first_bias, *second, *second_bias;
};

// What a row between the convolutions holds for products of a kind.
template <class Kind, bool on_tiles = kOnTiles<Kind>>
struct Middle {
  using Element = float;
};
template <class Kind>
struct Middle<Kind, true> {
  using Element = typename Kind::Element;
};

// The weights of the second convolution for the problem's kind follow those of all panels.
int64_t panel_floats(const StemProblem& problem) {
  return (kSide * (first_depth(problem) + second_depth(problem)) + 2) * kPanel;
}

PackedPanel packed_panel(const StemProblem& problem, float* packed, int64_t panel) {
  PackedPanel result;
  result.first = packed + panel * panel_floats(problem);
  result.first_bias = result.first + kSide * first_depth(problem) * kPanel;
  result.second = result.first_bias + kPanel;
  result.second_bias = result.second + kSide * second_depth(problem) * kPanel;
  return result;
}

PackedPanel packed_panel(const StemProblem& problem, const float* packed, int64_t panel) {
  return packed_panel(problem, const_cast<float*>(packed), panel);
}

// to[kernel row][kernel column][channel][kPanel] = scale[out] * weight[out][channel][3][3] for the
// kPanel outputs from `first` on; `padded` channels, those from `channels` on and outputs from
// `outputs` on zero.
void pack_kernel(const float* weight, int64_t first, int64_t outputs, int64_t channels,
                 int64_t padded, const float* scale, float* to) {
  for (int64_t row = 0; row < kSide; ++row) {
    for (int64_t column = 0; column < kSide; ++column) {
      for (int64_t channel = 0; channel < padded; ++channel) {
        for (int64_t i = 0; i < kPanel; ++i) {
          const bool exists = channel < channels && first + i < outputs;
          const int64_t at = (((first + i) * channels + channel) * kSide + row) * kSide + column;
          *to++ = exists ? weight[at] * scale[i] : 0.0f;
        }
      }
    }
  }
}

// Row `row` of x (possibly outside) -> [column][channel] with its border of zeros.
void read_row(const StemProblem& problem, int64_t image, int64_t row, float* to) {
  __builtin_memset(to, 0, static_cast<size_t>(input_row(problem)) * sizeof(float));
  if (row < 0 || row >= problem.height) return;
  const float* from = problem.x + image * problem.image_stride + row * problem.row_stride;
  const int64_t columns = smaller(problem.width, input_columns(problem) - problem.left);
  to += problem.left * problem.in_channels;
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t channel = 0; channel < problem.in_channels; ++channel) {
      *to++ = from[channel * problem.channel_stride];
    }
    from += problem.column_stride;
  }
}

// sums += the products of `rows` pixels with a kernel. Pixels are `pixel_stride` floats apart, the
// rows that the kernel sees `row_stride`.
template <int rows, int vectors>
[[gnu::always_inline]] inline void convolve(const float* from, int64_t pixel_stride,
                                            int64_t row_stride, const float* weights, int64_t depth,
                                            Vec (&sums)[rows][vectors]) {
  Ahead nothing = {weights, weights};
  for (int64_t row = 0; row < kSide; ++row) {
    multiply<FloatProduct, rows, vectors>({from + row * row_stride, pixel_stride, 1},
                                          weights + row * depth * kPanel, kPanel, depth, sums,
                                          nothing);
  }
}

template <class Kind>
int64_t words_of_row(const StemProblem& problem) {
  return second_depth(problem) / Kind::kPerWord;
}

float* second_weights(const StemProblem& problem, float* packed) {
  return packed + stem_eval_panels(problem) * panel_floats(problem);
}

int64_t second_weights_size(const StemProblem& problem) {
  int64_t size = 0;
  with_side_product(problem.product, [&](auto kind) {
    using Kind = decltype(kind);
    size = kOnTiles<Kind> ? output_panels(problem) * kSide * words_of_row<Kind>(problem) * kPanel
                          : winograd_weights_size(problem.product, middle_channels(problem),
                                                  output_channels(problem));
  });
  return size;
}

int64_t tiles_size(const StemProblem& problem) {
  int64_t size = 0;
  with_side_product(problem.product, [&](auto kind) {
    size = kOnTiles<decltype(kind)>
               ? 0
               : winograd_scratch_size(middle_channels(problem), output_channels(problem));
  });
  return size;
}

// The second convolution's kernels for one panel of outputs: [kernel row][words][kPanel].
template <class Kind>
void pack_words(const StemProblem& problem, const float* panel, float* to) {
  constexpr int kPerWord = Kind::kPerWord;
  for (int64_t word = 0; word < kSide * words_of_row<Kind>(problem); ++word) {
    for (int64_t i = 0; i < kPanel; i += kWidth) {
      Vec rows[kPerWord];
      unroll<kPerWord>([&](auto row) __attribute__((always_inline)) {
        rows[row] = load(panel + (word * kPerWord + row) * kPanel + i);
      });
      store(to + word * kPanel + i, Kind::word_of(rows));
    }
  }
}

// The same for Winograd's transform: see WinogradRows.
template <class Kind>
void pack_transformed(const StemProblem& problem, int64_t panel, float* transformed) {
  constexpr int64_t kPerWord = Kind::kPerWord;
  constexpr int64_t kWordValues = kPanel * kPerWord;
  const int64_t words = middle_channels(problem) / kPerWord;
  for (int64_t word = 0; word < words; ++word) {
    float points[kPoints * kWordValues] = {};
    for (int64_t i = 0; i < kWordValues; ++i) {
      const int64_t output = panel * kPanel + i / kPerWord;
      const int64_t channel = word * kPerWord + i % kPerWord;
      if (channel >= problem.channels || output >= problem.out_channels) continue;
      const float* kernel =
          problem.second.weight + (output * problem.channels + channel) * kSide * kSide;
      transform_kernel(kernel, kWordValues, points + i);
    }
    for (int64_t point = 0; point < kPoints; ++point) {
      const int64_t place = (point * output_panels(problem) + panel) * words + word;
      to_words<Kind>(points + point * kWordValues, kWordValues, transformed + place * kPanel);
    }
  }
}

// A row of the first convolution with norm and activation, from three rows of x, for one panel.
template <int vectors, Activation activation, class Element>
void first_convolution(const StemProblem& problem, const float* input, const PackedPanel& panel,
                       Element* middle) {
  const int64_t pitch = middle_channels(problem);
  for_row_blocks(problem.out_width, [&](auto count, int64_t pixel) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    Vec sums[kCount][vectors];
    unroll<kCount * vectors>([&](auto i) __attribute__((always_inline)) {
      sums[i / vectors][i % vectors] = load(panel.first_bias + (i % vectors) * kWidth);
    });
    convolve<kCount, vectors>(input + 2 * pixel * problem.in_channels, 2 * problem.in_channels,
                              input_row(problem), panel.first, first_depth(problem), sums);
    unroll<kCount>([&](auto i) __attribute__((always_inline)) {
      activate<activation, vectors, Element>(sums[i]);
      unroll<vectors>([&](auto v) __attribute__((always_inline)) {
        store(middle + (pixel + i) * pitch + v * kWidth, sums[i][v]);
      });
    });
  });
}

// Two rows of the second convolution for one panel; `middle` starts at the row above.
template <int vectors>
void second_convolution(const StemProblem& problem, const float* middle, const PackedPanel& panel,
                        float* result) {
  const int64_t pitch = middle_channels(problem);
  const int64_t result_pitch = output_channels(problem);
  for (int64_t row = 0; row < 2; ++row) {
    for_row_blocks(
        problem.out_width, [&](auto count, int64_t pixel) __attribute__((always_inline)) {
          constexpr int kCount = decltype(count)::value;
          float* out = result + (row * problem.out_width + pixel) * result_pitch;
          Vec sums[kCount][vectors];
          unroll<kCount * vectors>([&](auto i) __attribute__((always_inline)) {
            sums[i / vectors][i % vectors] = load(panel.second_bias + (i % vectors) * kWidth);
          });
          convolve<kCount, vectors>(middle + row * middle_row(problem) + pixel * pitch, pitch,
                                    middle_row(problem), panel.second, second_depth(problem), sums);
          unroll<kCount * vectors>([&](auto i) __attribute__((always_inline)) {
            constexpr int v = i % vectors;
            store(out + (i / vectors) * result_pitch + v * kWidth, sums[i / vectors][v]);
          });
        });
  }
}

void convolve_rows(const StemProblem& problem, const float* packed, const float* middle,
                   float* result) {
  for_panels(
      output_channels(problem), [&](auto vectors, int64_t channel) __attribute__((always_inline)) {
        second_convolution<decltype(vectors)::value>(
            problem, middle, packed_panel(problem, packed, channel / kPanel), result + channel);
      });
}

}  // namespace

int64_t stem_eval_panels(const StemProblem& problem) {
  return larger(divide_up(problem.channels, kPanel), output_panels(problem));
}

int64_t stem_eval_strips(const StemProblem& problem) { return strip_count(problem); }

int64_t stem_eval_packed_size(const StemProblem& problem) {
  return stem_eval_panels(problem) * panel_floats(problem) + second_weights_size(problem);
}

int64_t stem_eval_scratch_size(const StemProblem& problem) {
  const int64_t outputs = output_channels(problem);
  return round_up(kSide * input_row(problem), 16) +
         (most_strip_rows(problem) + 2) * middle_row(problem) + tiles_size(problem) +
         2 * problem.out_width * outputs + round_up(outputs, kPanel);
}

void stem_eval_pack(const StemProblem& problem, int64_t panel, float* packed) {
  const PackedPanel to = packed_panel(problem, packed, panel);
  const int64_t first = panel * kPanel;
  float scale[kPanel];
  for (int64_t i = 0; i < kPanel; ++i) {
    const bool exists = first + i < problem.channels;
    ScaleAndShift folded = {0.0f, 0.0f};
    if (exists) folded = fold_norm(problem.norm, problem.first.bias, first + i);
    scale[i] = folded.scale;
    to.first_bias[i] = folded.shift;
    const bool is_output = first + i < problem.out_channels;
    to.second_bias[i] = is_output && problem.second.bias ? problem.second.bias[first + i] : 0.0f;
  }
  pack_kernel(problem.first.weight, first, problem.channels, problem.in_channels,
              problem.in_channels, scale, to.first);
  for (float& value : scale) value = 1.0f;
  pack_kernel(problem.second.weight, first, problem.out_channels, problem.channels,
              middle_channels(problem), scale, to.second);
  if (panel >= output_panels(problem)) return;
  float* weights = second_weights(problem, packed);
  with_side_product(problem.product, [&](auto kind) {
    using Kind = decltype(kind);
    if constexpr (kOnTiles<Kind>) {
      const int64_t size = kSide * words_of_row<Kind>(problem) * kPanel;
      pack_words<Kind>(problem, to.second, weights + panel * size);
    } else {
      pack_transformed<Kind>(problem, panel, weights);
    }
  });
}

namespace {

// Rows `first` to `first + rows` of the first convolution's output, with those above and below:
// [row][column][channel] with a border of zeros.
template <class Element>
void make_middle(const StemProblem& problem, const float* packed, int64_t image, int64_t first,
                 int64_t rows, float* input, Element* middle) {
  const int64_t pitch = middle_channels(problem);
  const int64_t size = middle_row(problem);
  const auto clear = [](Element* begin, int64_t count) {
    __builtin_memset(begin, 0, static_cast<size_t>(count) * sizeof(Element));
  };
  for (int64_t row = 0; row < round_up(rows, 2) + 2; ++row) {
    Element* line = middle + row * size;
    const int64_t y = first + row - 1;
    if (y < 0 || y >= problem.out_height) {
      clear(line, size);
      continue;
    }
    for (int64_t i = 0; i < kSide; ++i) {
      read_row(problem, image, 2 * y - problem.top + i, input + i * input_row(problem));
    }
    clear(line, pitch);
    clear(line + (problem.out_width + 1) * pitch, size - (problem.out_width + 1) * pitch);
    with_activation(problem.activation, [&](auto activation) {
      for_panels(pitch, [&](auto vectors, int64_t channel) __attribute__((always_inline)) {
        first_convolution<decltype(vectors)::value, decltype(activation)::value>(
            problem, input, packed_panel(problem, packed, channel / kPanel),
            line + pitch + channel);
      });
    });
  }
}

// Two rows of the second convolution; `middle` starts at the row above.
template <class Kind>
void make_rows(const StemProblem& problem, const float* packed,
               const typename Middle<Kind>::Element* middle, const float* bias, float* tiles,
               float* result) {
  const float* weights = second_weights(problem, const_cast<float*>(packed));
  const int64_t pitch = middle_channels(problem);
  const int64_t outputs = output_channels(problem);
  if constexpr (kOnTiles<Kind>) {
    const int64_t words = words_of_row<Kind>(problem);
    for (int64_t row = 0; row < 2; ++row) {
      for (int64_t i = 0; i < kSide; ++i) {
        const auto* from = reinterpret_cast<const float*>(middle + (row + i) * middle_row(problem));
        gemm<Kind>(problem.out_width, outputs, words, {from, pitch / Kind::kPerWord, 1},
                   weights + i * words * kPanel, kSide * words * kPanel, kPanel,
                   result + row * problem.out_width * outputs, outputs, i > 0, bias);
      }
    }
  } else {
    const WinogradRows pair = {problem.out_width, pitch, outputs, middle_row(problem), weights};
    if (!winograd_rows<Kind>(pair, middle, bias, tiles, result)) {
      convolve_rows(problem, packed, middle, result);
    }
  }
}

}  // namespace

void stem_eval(const StemProblem& problem, const float* packed, int64_t image, int64_t strip,
               float* scratch) {
  const int64_t strips = strip_count(problem);
  const int64_t first = 2 * (row_pairs(problem) * strip / strips);
  const int64_t last = smaller(2 * (row_pairs(problem) * (strip + 1) / strips), problem.out_height);
  const int64_t rows = last - first;
  const int64_t outputs = output_channels(problem);
  float* input = scratch;  // the three rows of x that a row of the first convolution sees
  float* middle = input + round_up(kSide * input_row(problem), 16);
  float* tiles = middle + (most_strip_rows(problem) + 2) * middle_row(problem);
  float* result = tiles + tiles_size(problem);  // two rows
  float* bias = result + 2 * problem.out_width * outputs;
  for (int64_t panel = 0; panel < output_panels(problem); ++panel) {
    const float* from = packed_panel(problem, packed, panel).second_bias;
    __builtin_memcpy(bias + panel * kPanel, from, kPanel * sizeof(float));
  }
#if defined(__AMX_TILE__)
  const TileRegisters registers;  // configured once for all products
#endif
  with_side_product(problem.product, [&](auto kind) {
    using Kind = decltype(kind);
    auto* lines = reinterpret_cast<typename Middle<Kind>::Element*>(middle);
    make_middle(problem, packed, image, first, rows, input, lines);
    for (int64_t row = 0; row < rows; row += 2) {
      make_rows<Kind>(problem, packed, lines + row * middle_row(problem), bias, tiles, result);
      with_elements(problem.output_type, problem.output, [&](auto* out) {
        out +=
            (image * problem.out_height + first + row) * problem.out_width * problem.out_channels;
        for (int64_t pixel = 0; pixel < smaller(2, rows - row) * problem.out_width; ++pixel) {
          narrow(result + pixel * outputs, problem.out_channels,
                 out + pixel * problem.out_channels);
        }
      });
    }
  });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
