#pragma once

// The weights of an inverted bottleneck with all batch norms folded in, packed block by block:
//   expand      a1 W1 a0            [channels/kPanel][words of C_in][kPanel]
//   its bias    a1 (W1 s0 + b - m1) + s1
//   depthwise   a2 w                [9][channels]
//   its bias    a2 (b - m2) + s2
//   project     a3 W2               [C_out/kPanel][words of the valid channels][kPanel]
// (words of the problem's product: product.h; but floats where a gate scales them at each call, and
// bfloat16 in the shortcut of int8). Bytes have a factor per column beside the bias.
// where a norm is x -> a x + s, or a (x - m) + s. A block is kBlock of the E channels. `channels`
// of the last one are rounded up to whole panels with zeros; the project convolution does not read
// those.

#include "cpu/common/mbconv_problem.h"
#include "cpu/isa/pack_bytes.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// With 32 registers and an L2 cache of 1 MiB or more fewer blocks pay: each reads and writes the
// sums of all output channels.
constexpr int64_t kBlock = kWidth == 16 ? 128 : 64;

inline int64_t block_count(const MBConvProblem& problem) {
  return divide_up(problem.wide_channels, kBlock);
}

// Channels of a block that exist, and the same rounded up to panels.
inline int64_t block_valid(const MBConvProblem& problem, int64_t block) {
  return smaller(kBlock, problem.wide_channels - block * kBlock);
}
inline int64_t block_channels(const MBConvProblem& problem, int64_t block) {
  return round_up(block_valid(problem, block), kPanel);
}

// What the project convolution is multiplied in: a gate is known too late for bytes.
inline Product project_product(const MBConvProblem& problem) {
  return problem.squeeze_excite.present ? side_of(problem.product) : problem.product;
}

// Words of a pixel of x, and of the channels of a block as the project convolution reads them.
inline int64_t input_words(const MBConvProblem& problem) {
  return words_of(problem.product, problem.in_channels);
}
inline int64_t block_words(const MBConvProblem& problem, int64_t block) {
  return words_of(project_product(problem), block_valid(problem, block));
}
inline int64_t shortcut_words(const MBConvProblem& problem) {
  return words_of(side_of(problem.product), problem.in_channels);
}

// Where things lie in the packed buffer, in floats. The blocks follow.
struct PackedLayout {
  int64_t pre_scale, pre_shift;  // [C_in]
  int64_t project_scale;         // [C_out]
  int64_t project_bias;          // [panelled C_out]
  int64_t project_factor;        // [panelled C_out] of bytes, and so the scales of the weights
  int64_t project_weight_scale;
  int64_t shortcut_bias;  // [panelled C_out]
  int64_t shortcut;       // panels, words of [C_in] deep
  int64_t blocks;
};

inline PackedLayout packed_layout(const MBConvProblem& problem) {
  PackedLayout layout;
  const int64_t out_columns = panelled(problem.out_channels);
  int64_t end = 0;
  const auto take = [&](int64_t floats) {
    const int64_t begin = end;
    end += round_up(floats, 16);
    return begin;
  };
  layout.pre_scale = take(problem.in_channels);
  layout.pre_shift = take(problem.in_channels);
  layout.project_scale = take(problem.out_channels);
  layout.project_bias = take(out_columns);
  const bool bytes = project_product(problem) == Product::int8;
  layout.project_factor = take(bytes ? out_columns : 0);
  layout.project_weight_scale = take(bytes ? out_columns : 0);
  layout.shortcut_bias = take(out_columns);
  layout.shortcut = take(problem.projects_shortcut ? out_columns * shortcut_words(problem) : 0);
  layout.blocks = end;
  return layout;
}

struct PackedBlock {
  float* expand;
  float* expand_bias;
  float* expand_factor;  // of bytes
  float* depthwise;
  float* depthwise_bias;
  float* project;
};

// Floats that one block takes.
inline int64_t block_floats(const MBConvProblem& problem) {
  const int64_t project =
      problem.squeeze_excite.present ? kBlock : words_of(problem.product, kBlock);
  return kBlock * (input_words(problem) + 3 + 9) + project * panelled(problem.out_channels);
}

// The parts of a block that lies in `memory`.
inline PackedBlock divide_block(const MBConvProblem& problem, float* memory) {
  PackedBlock result;
  result.expand = memory;
  result.expand_bias = result.expand + kBlock * input_words(problem);
  result.expand_factor = result.expand_bias + kBlock;
  result.depthwise = result.expand_factor + kBlock;
  result.depthwise_bias = result.depthwise + 9 * kBlock;
  result.project = result.depthwise_bias + kBlock;
  return result;
}

struct ScaleAndShift {
  float scale;
  float shift;
};

// A norm as value * scale + shift, for channel `i` of a value that lacks `bias` (null: zero).
inline ScaleAndShift fold_norm(const BatchNorm& norm, const float* bias, int64_t i) {
  const float offset = bias ? bias[i] : 0.0f;
  if (!norm.present) return {1.0f, offset};
  float scale = 1.0f / __builtin_sqrtf(norm.variance[i] + norm.eps);
  if (norm.weight) scale *= norm.weight[i];
  return {scale, (offset - norm.mean[i]) * scale + (norm.bias ? norm.bias[i] : 0.0f)};
}

// The scale of the project convolution's bytes for output i, and what turns their sums to numbers.
inline void fold_bytes(const MBConvProblem& problem, const PackedLayout& layout, int64_t i,
                       ScaleAndShift folded, float* packed) {
  FactorAndShift number = {0.0f, 0.0f};
  float scale = 1.0f;
  if (i < problem.out_channels) {
    const WeightColumn column = {problem.project.weight + i * problem.wide_channels,
                                 problem.wide_channels, folded.scale, nullptr};
    scale = column.scale();
    number = to_number(problem.middle_quantization, scale, column.sum(scale), folded.shift);
  }
  packed[layout.project_weight_scale + i] = scale;
  packed[layout.project_factor + i] = number.factor;
  packed[layout.project_bias + i] = number.shift;
}

// What all blocks share.
template <class Kind>
inline void fold_shared(const MBConvProblem& problem, float* packed) {
  const PackedLayout layout = packed_layout(problem);
  for (int64_t i = 0; i < problem.in_channels; ++i) {
    const ScaleAndShift folded = fold_norm(problem.pre_norm, nullptr, i);
    packed[layout.pre_scale + i] = folded.scale;
    packed[layout.pre_shift + i] = folded.shift;
  }
  for (int64_t i = 0; i < panelled(problem.out_channels); ++i) {
    const bool valid = i < problem.out_channels;
    ScaleAndShift folded = {0.0f, 0.0f};
    if (valid) folded = fold_norm(problem.project_norm, problem.project.bias, i);
    if (valid) packed[layout.project_scale + i] = folded.scale;
    packed[layout.project_bias + i] = folded.shift;
    if (project_product(problem) == Product::int8) {
      fold_bytes(problem, layout, i, folded, packed);
    }
    packed[layout.shortcut_bias + i] =
        valid && problem.shortcut.bias ? problem.shortcut.bias[i] : 0.0f;
  }
  if (problem.projects_shortcut) {
    pack<typename Kind::Side>(problem.shortcut.weight, problem.in_channels, problem.out_channels,
                              problem.in_channels, nullptr, nullptr, packed + layout.shortcut);
  }
}

inline float dot(const float* a, const float* b, int64_t count) {
  constexpr int kSums = 4;  // hide the latency of the additions
  Vec sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= count; i += kSums * kWidth) {
    unroll<kSums>([&](auto j) __attribute__((always_inline)) {
      sums[j] = fma(load(a + i + j * kWidth), load(b + i + j * kWidth), sums[j]);
    });
  }
  float result = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) result += a[i] * b[i];
  return result;
}

// One block, to `memory`. packed: holds what fold_shared wrote.
template <class Kind>
inline void pack_block(const MBConvProblem& problem, const float* packed, int64_t block,
                       float* memory) {
  const PackedLayout layout = packed_layout(problem);
  const PackedBlock to = divide_block(problem, memory);
  const int64_t first = block * kBlock;
  const int64_t valid = block_valid(problem, block);
  const int64_t channels = block_channels(problem, block);
  const float* expand = problem.expand.weight + first * problem.in_channels;
  const float* pre_shift = packed + layout.pre_shift;
  float scale[kBlock];
  for (int64_t i = 0; i < channels; ++i) {
    ScaleAndShift folded = {0.0f, 0.0f};
    if (i < valid) {
      folded = fold_norm(problem.expand_norm, problem.expand.bias, first + i);
      if (problem.pre_norm.present) {
        const float* row = expand + i * problem.in_channels;
        folded.shift += folded.scale * dot(row, pre_shift, problem.in_channels);
      }
    }
    scale[i] = folded.scale;
    to.expand_bias[i] = folded.shift;
  }
  if constexpr (Kind::kScaled) {
    for (int64_t i = 0; i < channels; i += kPanel) {
      pack_scaled(problem.input_quantization, expand + i * problem.in_channels, valid - i,
                  problem.in_channels, scale + i, packed + layout.pre_scale,
                  to.expand + i * input_words(problem), to.expand_bias + i, to.expand_factor + i);
    }
  } else {
    pack<Kind>(expand, problem.in_channels, valid, problem.in_channels, scale,
               packed + layout.pre_scale, to.expand);
  }
  for (int64_t i = 0; i < channels; ++i) {
    ScaleAndShift folded = {0.0f, 0.0f};
    if (i < valid) folded = fold_norm(problem.depthwise_norm, problem.depthwise.bias, first + i);
    to.depthwise_bias[i] = folded.shift;
    for (int64_t tap = 0; tap < 9; ++tap) {
      to.depthwise[tap * channels + i] =
          i < valid ? problem.depthwise.weight[(first + i) * 9 + tap] * folded.scale : 0.0f;
    }
  }
  const float* project = problem.project.weight + first;
  const float* project_scale = packed + layout.project_scale;
  if (problem.squeeze_excite.present) {
    pack(project, problem.wide_channels, problem.out_channels, valid, project_scale, nullptr,
         to.project);
  } else if constexpr (Kind::kScaled) {
    const int64_t words = block_words(problem, block);
    for (int64_t i = 0; i < panelled(problem.out_channels); ++i) {
      float* panel = to.project + i / kPanel * words * kPanel;
      if (i >= problem.out_channels) {
        clear_column(valid, i % kPanel, panel);
        continue;
      }
      const WeightColumn column = {project + i * problem.wide_channels, valid, project_scale[i],
                                   nullptr};
      column.pack(packed[layout.project_weight_scale + i], i % kPanel, panel);
    }
  } else {
    pack<Kind>(project, problem.wide_channels, problem.out_channels, valid, project_scale, nullptr,
               to.project);
  }
}

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
