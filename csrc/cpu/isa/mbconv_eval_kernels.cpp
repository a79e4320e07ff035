// The inverted bottleneck with fixed statistics,
//   output = shortcut(x) + s W2' (gate * act(dw3x3(act(x W1' + b1'), b2'))) + b3'
// with every batch norm folded into its neighbour (mbconv_pack.h). For each strip of output rows
// and each block of the E channels: expand into a tile, depthwise into a second tile, project
// into a sum over the blocks; tiles and sum together take about half an L2 cache. Memory moves x
// and the output once (each strip but the first reuses the last rows of the one before) and the
// weights; of the E channels only squeeze-excite, which needs them twice, stores one image's. Its
// first pass goes over groups of columns where whole rows are too long for that cache.

#include "cpu/common/mbconv_eval_kernels.h"

#include "cpu/isa/mbconv_finish.h"
#include "cpu/isa/mbconv_strip.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {
namespace {

Tiles carve(const MBConvProblem& problem, float* scratch) {
  Tiles tiles;
  tiles_size(problem, scratch, &tiles);
  return tiles;
}

const float* packed_block(const MBConvProblem& problem, const float* packed, int64_t block) {
  return packed + packed_layout(problem).blocks + block * block_floats(problem);
}

PackedBlock block_weights(const MBConvProblem& problem, const float* packed, int64_t block) {
  return divide_block(problem, const_cast<float*>(packed_block(problem, packed, block)));
}

// What tiles of a part of the columns take: every part has the columns of an inner one at most.
int64_t parts_size(const MBConvProblem& problem) {
  MBConvProblem part = part_of(problem, 0, part_columns(problem));
  part.left = 0;
  part.width = smaller((part.out_width - 1) * problem.stride + 3, problem.width);
  return tiles_size(part, nullptr, nullptr);
}

// sums [pixels][panelled C_out] (+)= stencil [pixels][kPitchOf<Kind>] times a block's project
// weights.
template <class Kind>
void project(const MBConvProblem& problem, int64_t block, const float* stencil, int64_t pixels,
             const float* weights, bool accumulate, float* sums) {
  const int64_t depth = block_words(problem, block);
  gemm<Kind>(pixels, problem.out_channels, depth, {stencil, kPitchOf<Kind>, 1}, weights,
             depth * kPanel, kPanel, sums, panelled(problem.out_channels), accumulate);
}

// sums += part, both of a product.
template <class Kind>
void add_sums(const float* part, int64_t count, float* sums) {
  using Sum = typename Kind::Sum;
  for (int64_t i = 0; i < count; i += kWidth) {  // rows are whole panels
    store(sums + i, load_as<Sum>(sums + i) + load_as<Sum>(part + i));
  }
}

// Walks the strips of a task and calls done(first_row, last_row, sums) after each. The sums of a
// strip are at sums_of(first_row).
template <class Kind, class SumsOf, class Done>
void walk(const MBConvProblem& problem, const float* packed, const MBConvTask& task,
          const Tiles& tiles, SumsOf&& sums_of, Done&& done) {
  StripWalk<Kind, Kind> strips(problem, tiles, task.image, task.images);
  const int64_t step = strip_rows(problem);
  for (int64_t first = task.first_row; first < task.last_row; first += step) {
    const int64_t last = smaller(first + step, task.last_row);
    const int64_t pixels = task.images * (last - first) * problem.out_width;
    const bool carries = last < task.last_row;
    strips.enter(first, last);
    float* sums = sums_of(first);
    for (int64_t block = task.first_block; block < task.last_block; ++block) {
      PackedBlock weights = block_weights(problem, packed, block);
      if (task.packs) {
        pack_block<Kind>(problem, packed, block, tiles.weights);
        weights = divide_block(problem, tiles.weights);
      }
      strips.compute(block, weights, block - task.first_block, carries, problem.out_width,
                     tiles.stencil);
      project<Kind>(problem, block, tiles.stencil, pixels, weights.project,
                    block > task.first_block, sums);
    }
    strips.has_carried = true;
    done(first, last, sums);
  }
}

}  // namespace

int64_t mbconv_eval_blocks(const MBConvProblem& problem) { return block_count(problem); }

int64_t mbconv_eval_packed_size(const MBConvProblem& problem, bool with_blocks) {
  const int64_t blocks = with_blocks ? block_count(problem) : 0;
  return packed_layout(problem).blocks + blocks * block_floats(problem);
}

int64_t mbconv_eval_scratch_size(const MBConvProblem& problem) {
  const int64_t whole = tiles_size(problem, nullptr, nullptr);
  return problem.squeeze_excite.present ? larger(whole, parts_size(problem)) : whole;
}

int64_t mbconv_eval_result_columns(const MBConvProblem& problem) {
  return panelled(problem.out_channels);
}

int64_t mbconv_eval_gated_size(const MBConvProblem& problem) {
  int64_t pitch = 0;
  with_side_product(problem.product, [&](auto kind) { pitch = kPitchOf<decltype(kind)>; });
  return block_count(problem) * problem.out_height * problem.out_width * pitch;
}

int64_t mbconv_eval_gate_size(const MBConvProblem& problem) {
  return block_count(problem) * kBlock;
}

int64_t mbconv_eval_strip_rows(const MBConvProblem& problem) { return strip_rows(problem); }

bool mbconv_eval_groups(const MBConvProblem& problem) { return holds_whole_images(problem); }

void mbconv_eval_fold(const MBConvProblem& problem, float* packed) {
  with_product(problem.product, [&](auto kind) { fold_shared<decltype(kind)>(problem, packed); });
}

void mbconv_eval_pack(const MBConvProblem& problem, int64_t block, float* packed) {
  float* memory = const_cast<float*>(packed_block(problem, packed, block));
  with_product(problem.product,
               [&](auto kind) { pack_block<decltype(kind)>(problem, packed, block, memory); });
}

void mbconv_eval_fused(const MBConvProblem& problem, const float* packed, const MBConvTask& task,
                       float* scratch) {
  const Tiles tiles = carve(problem, scratch);
  with_product(problem.product, [&](auto kind) {
    using Kind = decltype(kind);
    walk<Kind>(
        problem, packed, task, tiles, [&](int64_t) { return tiles.result; },
        [&](int64_t first, int64_t last, float* sums) {
          const int64_t size = (last - first) * problem.out_width * panelled(problem.out_channels);
          for (int64_t i = 0; i < task.images; ++i) {
            finish_rows<Kind>(problem, packed, task.image + i, first, last, sums + i * size,
                              tiles.pooled);
          }
        });
  });
}

void mbconv_eval_bottleneck(const MBConvProblem& problem, const float* packed,
                            const MBConvTask& task, float* scratch, float* partial) {
  const Tiles tiles = carve(problem, scratch);
  const int64_t row = problem.out_width * panelled(problem.out_channels);
  with_product(problem.product, [&](auto kind) {
    walk<decltype(kind)>(
        problem, packed, task, tiles,
        [&](int64_t first) { return partial + (first - task.first_row) * row; },
        [](int64_t, int64_t, float*) {});
  });
}

void mbconv_eval_finish(const MBConvProblem& problem, const float* packed, const MBConvTask& task,
                        float* scratch, float* partials, int64_t parts, int64_t part_stride) {
  const Tiles tiles = carve(problem, scratch);
  const int64_t row = problem.out_width * panelled(problem.out_channels);
  const int64_t step = strip_rows(problem);
  for (int64_t first = task.first_row; first < task.last_row; first += step) {
    const int64_t last = smaller(first + step, task.last_row);
    float* sums = partials + first * row;
    with_product(problem.product, [&](auto kind) {
      for (int64_t part = 1; part < parts; ++part) {
        add_sums<decltype(kind)>(sums + part * part_stride, (last - first) * row, sums);
      }
      finish_rows<decltype(kind)>(problem, packed, task.image, first, last, sums, tiles.pooled);
    });
  }
}

namespace {

// totals[0 .. kPanel) += a stencil's pixels, of the channels from `channel` on.
template <class Kind>
void add_pixels(float* stencil, int64_t pixels, int64_t channel, float* totals) {
  constexpr int kChains = 2;  // hide the latency of the additions
  Vec sums[kChains][kVectors] = {};
  const auto add_pixel = [&](int64_t pixel, Vec(&chain)[kVectors]) __attribute__((always_inline)) {
    const auto* from = elements_of<Kind>(stencil + pixel * kPitchOf<Kind>) + channel;
    unroll<kVectors>([&](auto v)
                         __attribute__((always_inline)) { chain[v] += load(from + v * kWidth); });
  };
  int64_t pixel = 0;
  for (; pixel + kChains <= pixels; pixel += kChains) {
    unroll<kChains>([&](auto i) __attribute__((always_inline)) { add_pixel(pixel + i, sums[i]); });
  }
  if (pixel < pixels) add_pixel(pixel, sums[0]);
  unroll<kVectors>([&](auto v) __attribute__((always_inline)) {
    float* total = totals + v * kWidth;
    store(total, load(total) + (sums[0][v] + sums[1][v]));
  });
}

// Of the output columns [first_column, last_column).
template <class Kind, class Next>
void make_gated_part(const MBConvProblem& problem, const float* packed, const MBConvTask& task,
                     int64_t first_column, int64_t last_column, float* scratch, float* gated,
                     float* sums) {
  constexpr int64_t kGatedPitch = kPitchOf<Next>;
  const int64_t pixels = problem.out_height * problem.out_width;
  const MBConvProblem part = part_of(problem, first_column, last_column);
  const Tiles tiles = carve(part, scratch);
  const int64_t step = strip_rows(part);
  StripWalk<Kind, Next> strips(part, tiles, task.image, 1);
  for (int64_t first = task.first_row; first < task.last_row; first += step) {
    const int64_t last = smaller(first + step, task.last_row);
    strips.enter(first, last);
    for (int64_t block = task.first_block; block < task.last_block; ++block) {
      float* stencil =
          gated + (block * pixels + first * problem.out_width + first_column) * kGatedPitch;
      strips.compute(block, block_weights(problem, packed, block), block - task.first_block,
                     last < task.last_row, problem.out_width, stencil);
      const int64_t runs = part.skipped_columns > 0 ? last - first : 1;
      for (int64_t run = 0; run < runs; ++run) {
        float* pixel = stencil + run * problem.out_width * kGatedPitch;
        const int64_t count = (last - first) / runs * part.out_width;
        for (int64_t channel = 0; channel < block_channels(problem, block); channel += kPanel) {
          add_pixels<Next>(pixel, count, channel, sums + block * kBlock + channel);
        }
      }
    }
    strips.has_carried = true;
  }
}

template <class Kind, class Next>
void make_gated(const MBConvProblem& problem, const float* packed, const MBConvTask& task,
                float* scratch, float* gated, float* sums) {
  clear(sums, mbconv_eval_gate_size(problem));
  const int64_t step = part_columns(problem);
  for (int64_t first = 0; first < problem.out_width; first += step) {
    const int64_t last = smaller(first + step, problem.out_width);
    make_gated_part<Kind, Next>(problem, packed, task, first, last, scratch, gated, sums);
  }
}

// Rows of the project convolution's weights [C_out/kPanel][depth][kPanel] times a gate, as a
// product reads them.
template <class Kind>
void gate_weights(const float* weights, int64_t panels, int64_t depth, const float* gate,
                  float* words) {
  constexpr int64_t kPerWord = Kind::kPerWord;
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t k = 0; k < depth; k += kPerWord) {
      unroll<kVectors>([&](auto v) __attribute__((always_inline)) {
        Vec rows[kPerWord];
        unroll<kPerWord>([&](auto i) __attribute__((always_inline)) {
          const bool exists = k + i < depth;
          const Vec row = exists ? load(weights + i * kPanel + v * kWidth) : Vec{};
          rows[i] = exists ? row * gate[k + i] : row;
        });
        store(words + v * kWidth, Kind::word_of(rows));
      });
      weights += smaller(kPerWord, depth - k) * kPanel;
      words += kPanel;
    }
  }
}

template <class Kind>
void project_gated(const MBConvProblem& problem, const float* packed, const MBConvTask& task,
                   const Tiles& tiles, const float* gated, const float* gate) {
  const int64_t pixels = problem.out_height * problem.out_width;
  const int64_t step = strip_rows(problem);
  for (int64_t first = task.first_row; first < task.last_row; first += step) {
    const int64_t last = smaller(first + step, task.last_row);
    for (int64_t block = 0; block < block_count(problem); ++block) {
      // The gate scales rows of the weights: fewer numbers than pixels of the strip.
      gate_weights<Kind>(block_weights(problem, packed, block).project,
                         panelled(problem.out_channels) / kPanel, block_valid(problem, block),
                         gate + block * kBlock, tiles.weights);
      const float* stencil = gated + (block * pixels + first * problem.out_width) * kPitchOf<Kind>;
      project<Kind>(problem, block, stencil, (last - first) * problem.out_width, tiles.weights,
                    block > 0, tiles.result);
    }
    finish_rows<Kind>(problem, packed, task.image, first, last, tiles.result, tiles.pooled);
  }
}

}  // namespace

void mbconv_eval_stencil(const MBConvProblem& problem, const float* packed, const MBConvTask& task,
                         float* scratch, float* gated, float* sums) {
  with_product(problem.product, [&](auto product) {
    using Kind = decltype(product);
    make_gated<Kind, typename Kind::Side>(problem, packed, task, scratch, gated, sums);
  });
}

void mbconv_eval_gate(const MBConvProblem& problem, const float* sums, int64_t parts,
                      int64_t part_stride, float* scratch, float* gate) {
  const SqueezeExcite& excite = problem.squeeze_excite;
  const int64_t wide = problem.wide_channels;
  const float factor = 1.0f / static_cast<float>(problem.out_height * problem.out_width);
  float* mean = gate;
  for (int64_t i = 0; i < wide; ++i) {
    float sum = 0.0f;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * part_stride + i];
    mean[i] = sum * factor;
  }
  float* reduced = scratch;
  for (int64_t i = 0; i < excite.channels; ++i) {
    float value = dot(excite.reduce.weight + i * wide, mean, wide);
    if (excite.reduce.bias) value += excite.reduce.bias[i];
    Vec activated[1] = {broadcast(value)};
    with_activation(excite.activation, [&](auto kind) __attribute__((always_inline)) {
      activate<decltype(kind)::value, 1>(activated);
    });
    reduced[i] = activated[0][0];
  }
  for (int64_t i = 0; i < wide; ++i) {
    const float value = dot(excite.expand.weight + i * excite.channels, reduced, excite.channels);
    gate[i] = value + (excite.expand.bias ? excite.expand.bias[i] : 0.0f);
  }
  for (int64_t i = 0; i < wide; i += kWidth) {  // the gate is padded to whole blocks
    store(gate + i, sigmoid(load(gate + i)));
  }
}

void mbconv_eval_project(const MBConvProblem& problem, const float* packed, const MBConvTask& task,
                         float* scratch, const float* gated, const float* gate) {
  const Tiles tiles = carve(problem, scratch);
  with_side_product(problem.product, [&](auto kind) {
    project_gated<decltype(kind)>(problem, packed, task, tiles, gated, gate);
  });
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
