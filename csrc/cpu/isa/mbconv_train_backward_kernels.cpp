// The backward passes of the inverted bottleneck's training. With g = dout and y = scale z + shift
// (the depthwise and expand norm with the batch's statistics):
//   backward_project        dy2 = (g W2) act'(y2), dW2 = act(y2)^T g
//   backward_gate           with squeeze-excite only: dy2 in place
//   backward_depthwise      dz2 from dy2 and z2, dpre = dw^T(dz2) act'(y1)
//   backward_expand_weight  dz1 from dpre and z1 in place, dW1 = dz1^T x
//   backward_expand_input   dx = dz1 W1
// Of the wide tensors z1 and z2 cross memory; the gradients are those of one wave of blocks.
// A pass whose result is a sum over pixels is divided by blocks of channels, never by pixels alone,
// so that its sums have one order whatever the number of threads.

#include "cpu/common/mbconv_train_kernels.h"
#include "cpu/isa/depthwise.h"
#include "cpu/isa/stencil_tile.h"
#include "cpu/isa/wide.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

// One cache line of channels at a time.
constexpr int kPair = 16 / kWidth > 1 ? 2 : 1;

// Words from one group of kPerWord pixels to the next in tiles that products read along the pixels.
constexpr int64_t kPairPitch = kTilePitch;

// The plain case: gradient [pixel][kTilePitch] of act(y) becomes dy2; act(y) goes to `values`, in
// words along the pixels.
template <class Kind, Activation kind>
void activation_backward(const typename Kind::Element* z2, int64_t pixels, const float* scale,
                         const float* shift, const float* gradient, float* values,
                         typename Kind::Element* dy2, double* sums, double* products) {
  float totals[2 * kWideBlock] = {};
  for_pixel_runs(pixels, [&](int64_t first, int64_t last) __attribute__((always_inline)) {
    for (int64_t lane = 0; lane < kWideBlock; lane += kPair * kWidth) {
      Vec a[kPair], b[kPair], sum[kPair], product[kPair];
      unroll<kPair>([&](auto i) __attribute__((always_inline)) {
        a[i] = load(scale + lane + i * kWidth);
        b[i] = load(shift + lane + i * kWidth);
        sum[i] = load(totals + lane + i * kWidth);
        product[i] = load(totals + kWideBlock + lane + i * kWidth);
      });
      for_words<Kind>(first, last, [&](int64_t pixel, auto count) __attribute__((always_inline)) {
        unroll<kPair>([&](auto i) __attribute__((always_inline)) {
          const int64_t at = lane + i * kWidth;
          Vec rows[Kind::kPerWord] = {};
          unroll<count>([&](auto j) __attribute__((always_inline)) {
            const Vec z = load(z2 + (pixel + j) * kWideBlock + at);
            const ValueAndSlope y = activate_and_slope<kind>(fma(z, a[i], b[i]));
            const Vec d = load(gradient + (pixel + j) * kTilePitch + at) * y.slope;
            rows[j] = y.value;
            store(dy2 + (pixel + j) * kWideBlock + at, d);
            sum[i] += d;
            product[i] = fma(d, z, product[i]);
          });
          store(values + pixel / Kind::kPerWord * kPairPitch + at, Kind::word_of(rows));
        });
      });
      unroll<kPair>([&](auto i) __attribute__((always_inline)) {
        store(totals + lane + i * kWidth, sum[i]);
        store(totals + kWideBlock + lane + i * kWidth, product[i]);
      });
    }
  });
  for (int64_t i = 0; i < kWideBlock; ++i) {
    sums[i] += static_cast<double>(totals[i]);
    products[i] += static_cast<double>(totals[kWideBlock + i]);
  }
}

// The same with squeeze-excite: dy2 takes the gradient of gate * act(y) as it is, `values` takes
// gate * act(y), and gate_sums the sum of gradient * act(y).
template <class Kind, Activation kind>
void gated_backward(const typename Kind::Element* z2, int64_t pixels, const float* scale,
                    const float* shift, const float* gate, const float* gradient, float* values,
                    typename Kind::Element* dy2, float* gate_sums) {
  using Element = typename Kind::Element;
  for (int64_t lane = 0; lane < kWideBlock; lane += kLaneFloats) {
    const Lanes a = load_lanes(scale + lane);
    const Lanes b = load_lanes(shift + lane);
    const Lanes factor = load_lanes(gate + lane);
    Lanes sum = {};
    for_words<Kind>(0, pixels, [&](int64_t pixel, auto count) __attribute__((always_inline)) {
      Vec rows[kLanes][Kind::kPerWord] = {};
      unroll<count>([&](auto j) __attribute__((always_inline)) {
        Lanes y = load_lanes(z2 + (pixel + j) * kWideBlock + lane);
        unroll<kLanes>(
            [&](auto i) __attribute__((always_inline)) { y.v[i] = fma(y.v[i], a.v[i], b.v[i]); });
        activate<kind, kLanes, Element>(y.v);
        const Lanes g = load_lanes(gradient + (pixel + j) * kTilePitch + lane);
        store_lanes(dy2 + (pixel + j) * kWideBlock + lane, g);
        unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
          sum.v[i] = fma(g.v[i], y.v[i], sum.v[i]);
          rows[i][j] = y.v[i] * factor.v[i];
        });
      });
      unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
        store(values + pixel / Kind::kPerWord * kPairPitch + lane + i * kWidth,
              Kind::word_of(rows[i]));
      });
    });
    unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
      float* total = gate_sums + lane + i * kWidth;
      store(total, load(total) + sum.v[i]);
    });
  }
}

// dy2 = (gate dy2 + grad_mean) act'(y) in place, and its sums.
template <Activation kind, class Element>
void gate_backward(const Element* z2, int64_t pixels, const float* scale, const float* shift,
                   const float* gate, const float* grad_mean, Element* dy2, double* sums,
                   double* products) {
  for (int64_t lane = 0; lane < kWideBlock; lane += kPair * kWidth) {
    Vec a[kPair], b[kPair], factor[kPair], offset[kPair];
    Vec sum[kPair] = {};
    Vec product[kPair] = {};
    unroll<kPair>([&](auto i) __attribute__((always_inline)) {
      a[i] = load(scale + lane + i * kWidth);
      b[i] = load(shift + lane + i * kWidth);
      factor[i] = load(gate + lane + i * kWidth);
      offset[i] = load(grad_mean + lane + i * kWidth);
    });
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      unroll<kPair>([&](auto i) __attribute__((always_inline)) {
        const int64_t at = pixel * kWideBlock + lane + i * kWidth;
        const Vec z = load(z2 + at);
        const Vec slope = activate_and_slope<kind>(fma(z, a[i], b[i])).slope;
        const Vec d = fma(factor[i], load(dy2 + at), offset[i]) * slope;
        store(dy2 + at, d);
        sum[i] += d;
        product[i] = fma(d, z, product[i]);
      });
    }
    for (int i = 0; i < kPair * kWidth; ++i) {
      sums[lane + i] += static_cast<double>(sum[i / kWidth][i % kWidth]);
      products[lane + i] += static_cast<double>(product[i / kWidth][i % kWidth]);
    }
  }
}

// `rows` rows of dpre from a tile of dz2 at the resolution of z1, which starts two rows above. Row
// by row, so that all of its channels are read while they are in the L1 cache.
template <Activation kind, class Element>
void stencil_backward(const StencilTile& tile, const Element* z1, int64_t rows, int64_t width,
                      const float* scale, const float* shift, const float* taps, Element* dpre,
                      double* sums, double* products, double* grad_weights, int64_t tap_stride) {
  float totals[(kTaps + 2) * kWideBlock] = {};  // of the taps' gradients, dpre and dpre * z1
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t lane = 0; lane < kWideBlock; lane += kWidth) {
      const Vec a = load(scale + lane);
      const Vec b = load(shift + lane);
      const float* line = tile.data + row * tile.row_floats + lane;
      Vec sum[kTaps + 2];
      unroll<kTaps + 2>([&](auto i) __attribute__((always_inline)) {
        sum[i] = load(totals + i * kWideBlock + lane);
      });
      for (int64_t column = 0; column < width; ++column) {
        const int64_t at = (row * width + column) * kWideBlock + lane;
        const Vec z = load(z1 + at);
        const ValueAndSlope h = activate_and_slope<kind>(fma(z, a, b));
        Vec partial[3] = {};
        unroll<kTaps>([&](auto tap) __attribute__((always_inline)) {
          constexpr int64_t i = tap / 3;
          constexpr int64_t j = tap % 3;
          const Vec d = load(line + (2 - i) * tile.row_floats + (column + 2 - j) * kTilePitch);
          partial[j] = fma(d, load(taps + tap * kWideBlock + lane), partial[j]);
          sum[tap] = fma(d, h.value, sum[tap]);
        });
        const Vec d = (partial[0] + partial[1] + partial[2]) * h.slope;
        store(dpre + at, d);
        sum[kTaps] += d;
        sum[kTaps + 1] = fma(d, z, sum[kTaps + 1]);
      }
      unroll<kTaps + 2>([&](auto i) __attribute__((always_inline)) {
        store(totals + i * kWideBlock + lane, sum[i]);
      });
    }
  }
  for (int64_t i = 0; i < kWideBlock; ++i) {
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      grad_weights[tap * tap_stride + i] += static_cast<double>(totals[tap * kWideBlock + i]);
    }
    sums[i] += static_cast<double>(totals[kTaps * kWideBlock + i]);
    products[i] += static_cast<double>(totals[(kTaps + 1) * kWideBlock + i]);
  }
}

// weights_gradient [kWideBlock][columns] (+)= tile [words][kPairPitch]^T pairs [words][columns].
template <class Kind>
void accumulate_weight(const float* tile, const float* pairs, int64_t words, int64_t columns,
                       bool accumulate, float* weights_gradient) {
  gemm<Kind>(kWideBlock, columns, words, {tile, 1, kPairPitch}, pairs, kPanel, columns,
             weights_gradient, columns, accumulate);
}

// d = a d + b z + c of `pixels` pixels of a block in place, and the same to `tile`, in words along
// the pixels.
template <class Kind>
void combine_words(typename Kind::Element* d, const typename Kind::Element* z, int64_t pixels,
                   const float* a, const float* b, const float* c, float* tile) {
  for_pixel_runs(pixels, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t lane = 0; lane < kWideBlock; lane += kLaneFloats) {
      const Lanes wa = load_lanes(a + lane);
      const Lanes wb = load_lanes(b + lane);
      const Lanes wc = load_lanes(c + lane);
      for_words<Kind>(begin, end, [&](int64_t pixel, auto count) __attribute__((always_inline)) {
        unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
          Vec rows[Kind::kPerWord] = {};
          unroll<count>([&](auto j) __attribute__((always_inline)) {
            const int64_t at = (pixel + j) * kWideBlock + lane + i * kWidth;
            rows[j] = fma(load(d + at), wa.v[i], fma(load(z + at), wb.v[i], wc.v[i]));
            store(d + at, rows[j]);
          });
          store(tile + pixel / Kind::kPerWord * kPairPitch + lane + i * kWidth,
                Kind::word_of(rows));
        });
      });
    }
  });
}

// dx = sums + factor * row + offset + addend of one pixel; addend may be null.
template <class Row, class Element, class Output>
void finish_input(const float* sums, const Row* row, const InputEnd& end, int64_t channels,
                  const Element* addend, Output* dx) {
  const auto finished = [&](int64_t i) __attribute__((always_inline)) {
    const int64_t count = channels - i;
    return fma(load(row + i), load_part(end.factor + i, count),
               load(sums + i) + load_part(end.offset + i, count));
  };
  int64_t i = 0;
  for (; i + kWidth <= channels; i += kWidth) {
    store(dx + i, addend ? finished(i) + load(addend + i) : finished(i));
  }
  if (i < channels) {
    float rest[kWidth] = {};
    if (addend) widen(addend + i, channels - i, rest);
    store(rest, finished(i) + load(rest));
    narrow(rest, channels - i, dx + i);
  }
}

// Calls function(image, images, pixel, count) over the images [first, last): strips of `count`
// pixels of one image, or several whole images that make up a strip.
template <class Function>
[[gnu::always_inline]] inline void for_wide_strips(int64_t first, int64_t last, int64_t pixels,
                                                   Function&& function) {
  const int64_t together = larger(kStripPixels / pixels, 1);
  for (int64_t image = first; image < last; image += together) {
    for (int64_t pixel = 0; pixel < pixels; pixel += kStripPixels) {
      function(image, smaller(together, last - image), pixel,
               smaller(kStripPixels, pixels - pixel));
    }
  }
}

}  // namespace

void train_backward_project(const TrainShape& shape, int64_t block, int64_t first, int64_t last,
                            const float* grad_rows, const float* grad_pairs, const Wide& z2,
                            const ScaleShift& norm, const float* gate, const float* packed,
                            float* scratch, const Wide& dy2, float* grad_weight, double* sums,
                            float* grad_gate) {
  const int64_t columns = round_up(shape.out_channels, kPanel);
  const int64_t channel = block * kWideBlock;
  const float* scale = norm.scale + channel;
  const float* shift = norm.shift + channel;
  float* gradient = scratch;
  float* values = gradient + kStripPixels * kTilePitch;
  float* line = values + kStripPixels * kPairPitch;
  const int64_t pixels = shape.out_pixels();
  with_unscaled_product(shape.product, [&](auto product) __attribute__((always_inline)) {
    using Kind = decltype(product);
    const int64_t depth = words_of<Kind>(shape.out_channels);
    const int64_t row_words = words_of<Kind>(columns);
    const auto activation_pass = [&](int64_t image, int64_t pixel, int64_t count, const float* g,
                                     float* h) __attribute__((always_inline)) {
      const int64_t z2_offset = plane_offset(z2, pixels, image, block) + pixel * kWideBlock;
      const auto* z = read_pixels<Kind>(z2, z2_offset, count, line);
      auto* d =
          elements_of<Kind>(dy2) + plane_offset(dy2, pixels, image, block) + pixel * kWideBlock;
      with_activation(shape.depthwise_activation, [&](auto kind) __attribute__((always_inline)) {
        constexpr Activation kKind = decltype(kind)::value;
        if (gate) {
          const int64_t at = image * shape.padded_wide() + channel;
          gated_backward<Kind, kKind>(z, count, scale, shift, gate + at, g, h, d, grad_gate + at);
        } else {
          activation_backward<Kind, kKind>(z, count, scale, shift, g, h, d, sums + channel,
                                           sums + shape.padded_wide() + channel);
        }
      });
    };
    for_wide_strips(
        first, last, pixels,
        [&](int64_t image, int64_t images, int64_t pixel, int64_t count)
            __attribute__((always_inline)) {
              const float* rows = grad_rows + (image * pixels + pixel) * row_words;
              gemm<Kind>(images * count, kWideBlock, depth, {rows, row_words, 1}, packed,
                         depth * kPanel, kPanel, gradient, kTilePitch, false);
              const int64_t words = words_of<Kind>(count);
              for (int64_t i = 0; i < images; ++i) {
                activation_pass(image + i, pixel, count, gradient + i * count * kTilePitch,
                                values + i * words * kPairPitch);
              }
              accumulate_weight<Kind>(
                  values,
                  grad_pairs + (image * words_of<Kind>(pixels) + words_of<Kind>(pixel)) * columns,
                  images * words, columns, image > first || pixel > 0, grad_weight);
            });
  });
}

void train_backward_gate(const TrainShape& shape, int64_t image, int64_t block, const Wide& z2,
                         const ScaleShift& norm, const float* gate, const float* grad_mean,
                         float* scratch, const Wide& dy2, double* sums) {
  const int64_t channel = block * kWideBlock;
  const int64_t z2_offset = plane_offset(z2, shape.out_pixels(), image, block);
  const int64_t dy2_offset = plane_offset(dy2, shape.out_pixels(), image, block);
  gate += image * shape.padded_wide() + channel;
  grad_mean += image * shape.padded_wide() + channel;
  with_unscaled_product(shape.product, [&](auto product) __attribute__((always_inline)) {
    using Kind = decltype(product);
    for (int64_t first = 0; first < shape.out_pixels(); first += kStripPixels) {
      const int64_t count = smaller(kStripPixels, shape.out_pixels() - first);
      const auto* z = read_pixels<Kind>(z2, z2_offset + first * kWideBlock, count, scratch);
      with_activation(shape.depthwise_activation, [&](auto kind) __attribute__((always_inline)) {
        gate_backward<decltype(kind)::value>(
            z, count, norm.scale + channel, norm.shift + channel, gate, grad_mean,
            elements_of<Kind>(dy2) + dy2_offset + first * kWideBlock, sums + channel,
            sums + shape.padded_wide() + channel);
      });
    }
  });
}

void train_backward_depthwise(const TrainShape& shape, int64_t image, int64_t block,
                              const Wide& dy2, const Wide& z2, const Wide& z1,
                              const Combination& factors, const ScaleShift& norm,
                              const float* weights, float* scratch, const Wide& dpre, double* sums,
                              double* grad_weights) {
  const int64_t channel = block * kWideBlock;
  const int64_t z1_offset = plane_offset(z1, shape.in_pixels(), image, block);
  const int64_t z2_offset = plane_offset(z2, shape.out_pixels(), image, block);
  const int64_t dy2_offset = plane_offset(dy2, shape.out_pixels(), image, block);
  const int64_t dpre_offset = plane_offset(dpre, shape.in_pixels(), image, block);
  const int64_t stride = shape.stride;
  float taps[kTaps * kWideBlock];
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    __builtin_memcpy(taps + tap * kWideBlock, weights + tap * shape.padded_wide() + channel,
                     kWideBlock * sizeof(float));
  }
  const StencilScratch memory = backward_scratch(shape, scratch);
  StencilTile tile(memory.tile, backward_columns(shape));
  // Output column q is at q * stride - left + 2 of the tile; the first and last that are inside.
  const int64_t first_column = larger(divide_up(shape.left - 2, stride), 0);
  const int64_t last_column =
      smaller((tile.columns - 1 + shape.left - 2) / stride + 1, shape.out_width);
  const auto inside = [&](int64_t row) {
    return row >= 0 && row % stride == 0 && row / stride < shape.out_height;
  };
  const int64_t step = strip_rows(shape.height, 1, tile.columns);
  with_unscaled_product(shape.product, [&](auto product) __attribute__((always_inline)) {
    using Kind = decltype(product);
    const auto* gradient = elements_of<Kind>(dy2) + dy2_offset;
    for (int64_t first = 0; first < shape.height; first += step) {
      const int64_t last = smaller(first + step, shape.height);
      tile.move_to(first + shape.top - 2, last + shape.top);
      tile.fill(inside, [&](int64_t row, float* line) __attribute__((always_inline)) {
        const int64_t at = (row / stride * shape.out_width + first_column) * kWideBlock;
        const int64_t pixels = last_column - first_column;
        float* out = line + (first_column * stride - shape.left + 2) * kTilePitch;
        combine_pixels(gradient + at, read_pixels<Kind>(z2, z2_offset + at, pixels, memory.line),
                       pixels, factors.a + channel, factors.b + channel, factors.c + channel,
                       [&](int64_t pixel, int64_t lane, const Lanes& dz2)
                           __attribute__((always_inline)) {
                             store_lanes(out + pixel * stride * kTilePitch + lane, dz2);
                           });
      });
      const int64_t at = first * shape.width * kWideBlock;
      const auto* z =
          read_pixels<Kind>(z1, z1_offset + at, (last - first) * shape.width, memory.strip);
      with_activation(shape.expand_activation, [&](auto kind) __attribute__((always_inline)) {
        stencil_backward<decltype(kind)::value>(
            tile, z, last - first, shape.width, norm.scale + channel, norm.shift + channel, taps,
            elements_of<Kind>(dpre) + dpre_offset + at, sums + channel,
            sums + shape.padded_wide() + channel, grad_weights + channel, shape.padded_wide());
      });
    }
  });
}

void train_backward_expand_weight(const TrainShape& shape, int64_t block, int64_t first,
                                  int64_t last, const Wide& dpre, const Wide& z1,
                                  const Combination& factors, const float* pairs, float* scratch,
                                  float* grad_weight) {
  const int64_t columns = round_up(shape.in_channels, kPanel);
  const int64_t channel = block * kWideBlock;
  const int64_t pixels = shape.in_pixels();
  float* line = scratch + kStripPixels * kPairPitch;
  with_unscaled_product(shape.product, [&](auto product) __attribute__((always_inline)) {
    using Kind = decltype(product);
    for_wide_strips(
        first, last, pixels,
        [&](int64_t image, int64_t images, int64_t pixel,
            int64_t count) __attribute__((always_inline)) {
          const int64_t words = words_of<Kind>(count);
          for (int64_t i = 0; i < images; ++i) {
            const int64_t z1_offset =
                plane_offset(z1, pixels, image + i, block) + pixel * kWideBlock;
            const auto* z = read_pixels<Kind>(z1, z1_offset, count, line);
            auto* d = elements_of<Kind>(dpre) + plane_offset(dpre, pixels, image + i, block) +
                      pixel * kWideBlock;
            combine_words<Kind>(d, z, count, factors.a + channel, factors.b + channel,
                                factors.c + channel, scratch + i * words * kPairPitch);
          }
          accumulate_weight<Kind>(
              scratch, pairs + (image * words_of<Kind>(pixels) + words_of<Kind>(pixel)) * columns,
              images * words, columns, image > first || pixel > 0, grad_weight);
        });
  });
}

void train_backward_expand_input(const TrainShape& shape, const PixelRange& range,
                                 const Blocks& blocks, const Wide& dz1, const float* packed,
                                 bool accumulate, float* sums, const InputEnd* end) {
  const int64_t channels = shape.in_channels;
  const int64_t columns = round_up(channels, kPanel);
  const int64_t count = range.last - range.first;
  const int64_t first = range.image * shape.in_pixels() + range.first;
  sums += first * columns;
  with_unscaled_product(shape.product, [&](auto product) __attribute__((always_inline)) {
    using Kind = decltype(product);
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const auto* d = elements_of<Kind>(dz1) +
                      plane_offset(dz1, shape.in_pixels(), range.image, block) +
                      range.first * kWideBlock;
      const int64_t depth = words_of<Kind>(valid_channels(shape.wide_channels, block));
      gemm<Kind>(count, channels, depth,
                 {reinterpret_cast<const float*>(d), words_of<Kind>(kWideBlock), 1},
                 packed + words_of<Kind>(block * kWideBlock) * columns, depth * kPanel, kPanel,
                 sums, columns, accumulate || block > blocks.first);
    }
    if (!end) return;
    const auto* rows = elements_of<Kind>(const_cast<float*>(end->rows)) + first * columns;
    with_elements(end->dx.type, end->dx.data, [&](auto* dx) {
      with_elements(end->addend.type, end->addend.data, [&](auto* addend) {
        for (int64_t pixel = 0; pixel < count; ++pixel) {
          const int64_t at = (first + pixel) * channels;
          finish_input(sums + pixel * columns, rows + pixel * columns, *end, channels,
                       addend ? addend + at : addend, dx + at);
        }
      });
    });
  });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
