#pragma once

// The front half of the inverted bottleneck for a strip of output rows and one block of E channels:
// expand, activation and depthwise convolution, from x to a tile that stays in cache.

#include "cpu/isa/depthwise.h"
#include "cpu/isa/mbconv_pack.h"

namespace moat_kernels::cpu::MOAT_KERNELS_ISA {

// Words from one pixel to the next in tiles of E channels, which hold floats or what a product
// reads. A stride of exactly kBlock floats would map the pixels of a row to a quarter of the sets
// of an L1 cache.
template <class Kind>
constexpr int64_t kPitchOf = kBlock / Kind::kPerWord + 16;
constexpr int64_t kPitch = kPitchOf<FloatProduct>;

// What a tile of expanded rows may take of the L2 cache, in floats.
constexpr int64_t kExpandedFloats = 640 * kBlock;

// The rows [first, last) of a map.
struct Rows {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

inline int64_t tile_columns(const MBConvProblem& problem) {
  return larger(problem.left + problem.width, (problem.out_width - 1) * problem.stride + 3);
}

// The rows of the padded input that the output rows [first, last) see.
inline Rows input_rows(const MBConvProblem& problem, int64_t first, int64_t last) {
  const int64_t begin = first * problem.stride - problem.top;
  return {begin, begin + (last - first - 1) * problem.stride + 3};
}

// Rows that a strip hands to the next one.
inline int64_t carried_rows(const MBConvProblem& problem) { return 3 - problem.stride; }

// Output rows per strip: as many as kExpandedFloats allow, at least two, evenly divided.
inline int64_t strip_rows(const MBConvProblem& problem) {
  const int64_t row = tile_columns(problem) * kPitch;
  const int64_t fitting = larger((kExpandedFloats / row - 3) / problem.stride + 1, 2);
  return divide_up(problem.out_height, divide_up(problem.out_height, fitting));
}

// Output columns that squeeze-excite's first pass computes at a time: where two rows of all are
// more than kExpandedFloats, as many as fit, evenly divided.
inline int64_t part_columns(const MBConvProblem& problem) {
  const int64_t columns = kExpandedFloats / ((problem.stride + 3) * kPitch);
  const int64_t fitting = (columns - 3) / problem.stride + 1;
  return divide_up(problem.out_width, divide_up(problem.out_width, fitting));
}

// The problem of the output columns [first, last) alone.
inline MBConvProblem part_of(const MBConvProblem& problem, int64_t first, int64_t last) {
  const int64_t begin = first * problem.stride - problem.left;
  const int64_t first_column = larger(begin, 0);
  const int64_t end = begin + (last - first - 1) * problem.stride + 3;
  MBConvProblem part = problem;
  part.out_width = last - first;
  part.left = first_column - begin;
  part.width = smaller(end, problem.width) - first_column;
  part.skipped_columns = problem.width - part.width;
  const int64_t element = problem.x_type == ElementType::float32 ? 4 : 2;
  part.x = static_cast<const char*>(problem.x) + first_column * problem.in_channels * element;
  return part;
}

// Whether a tile may hold several images: all of each, so that their pixels follow one another.
inline bool holds_whole_images(const MBConvProblem& problem) {
  const Rows rows = input_rows(problem, 0, problem.out_height);
  return strip_rows(problem) >= problem.out_height && rows.first <= 0 &&
         rows.last >= problem.height;
}

// Scratch memory of one worker.
struct Tiles {
  float* expanded;  // [images][input rows of a strip][tile_columns][kPitch], zero outside the image
  float* stencil;   // [images][output pixels of a strip][kPitchOf its product]
  float* carried;   // [blocks][carried_rows][tile_columns][kPitch]
  float* input;     // [images][input pixels of a strip][words of C_in], unless x can be read
  float* pooled;    // [output pixels of a strip][C_in], floats or words
  float* result;    // [images][output pixels of a strip][panelled C_out]
  float* weights;   // one block's weights, where they are packed or scaled on the spot
  int32_t* offsets;  // [images][input pixels of a strip] -> their place in `expanded`
};

// Whether the pixels of x are what a product reads, as they lie in memory.
inline bool reads_in_place(const MBConvProblem& problem) {
  if (problem.skipped_columns > 0) return false;
  if (problem.product == Product::float32) return problem.x_type == ElementType::float32;
  return problem.product == Product::bfloat16 && problem.x_type == ElementType::bfloat16 &&
         problem.in_channels % 2 == 0;
}

inline int64_t tiles_size(const MBConvProblem& problem, float* memory, Tiles* tiles) {
  const int64_t rows = strip_rows(problem);
  const int64_t in_rows = (rows - 1) * problem.stride + 3;
  const int64_t row = tile_columns(problem) * kPitch;
  const int64_t pixels = rows * problem.out_width;
  int64_t end = 0;
  const auto take = [&](int64_t floats) {
    float* begin = memory + end;
    end += round_up(floats, 16);
    return begin;
  };
  const int64_t images = problem.images_per_tile;
  Tiles result;
  result.expanded = take(images * in_rows * row);
  result.stencil = take(images * pixels * kPitch);
  result.carried =
      take(rows < problem.out_height ? block_count(problem) * carried_rows(problem) * row : 0);
  result.input = take(reads_in_place(problem) ? 0
                                              : images * in_rows * problem.width *
                                                    round_up(problem.in_channels, kWidth));
  result.pooled = take(problem.residual ? pixels * problem.in_channels : 0);
  result.result = take(images * pixels * panelled(problem.out_channels));
  result.weights = take(block_floats(problem));
  result.offsets = reinterpret_cast<int32_t*>(take(images * in_rows * problem.width));
  if (tiles) *tiles = result;
  // Squeeze-excite keeps its reduced channels there.
  return larger(end, problem.squeeze_excite.channels);
}

// `rows` rows of x from `row` of an image on, those of `images` images, as a product reads them: in
// place, or converted to `tile`, where each pixel is floats before it is words, one behind the
// other. The rows of several images are all that they have.
template <class Kind>
inline const float* input_pixels(const MBConvProblem& problem, int64_t image, int64_t images,
                                 int64_t row, int64_t rows, float* tile) {
  const int64_t channels = problem.in_channels;
  const int64_t row_elements = (problem.width + problem.skipped_columns) * channels;
  const int64_t first = (image * problem.height + row) * row_elements;
  const float* result = tile;
  with_elements(problem.x_type, problem.x, [&](auto* x) __attribute__((always_inline)) {
    if (reads_in_place(problem)) {
      result = reinterpret_cast<const float*>(x + first);
      return;
    }
    for (int64_t y = 0; y < images * rows; ++y) {
      for (int64_t column = 0; column < problem.width; ++column) {
        widen(x + first + y * row_elements + column * channels, channels, tile);
        to_words<Kind>(tile, channels, tile, problem.input_quantization);
        tile += words_of<Kind>(channels);
      }
    }
  });
  return result;
}

// out[offsets[row]] = act(sums[row]) for a block's `column` and those behind it. Sums of bytes
// become numbers first.
template <class Kind, Activation kind, int rows>
[[gnu::always_inline]] inline void activate_sums(const typename Kind::Sum (&sums)[rows][kVectors],
                                                 const PackedBlock& weights, int64_t column,
                                                 const int32_t* offsets, float* out) {
  unroll<(rows + 1) / 2>([&](auto pair) __attribute__((always_inline)) {
    constexpr int kFirst = 2 * pair;
    constexpr int kRowsHere = rows - kFirst < 2 ? 1 : 2;
    Vec values[kRowsHere * kVectors];
    unroll<kRowsHere * kVectors>([&](auto i) __attribute__((always_inline)) {
      constexpr int v = i % kVectors;
      const typename Kind::Sum sum = sums[kFirst + i / kVectors][v];
      if constexpr (Kind::kScaled) {
        values[i] = fma(__builtin_convertvector(sum, Vec),
                        load(weights.expand_factor + column + v * kWidth),
                        load(weights.expand_bias + column + v * kWidth));
      } else {
        values[i] = sum;
      }
    });
    activate<kind, kRowsHere * kVectors, typename Kind::Element>(values);
    unroll<kRowsHere * kVectors>([&](auto i) __attribute__((always_inline)) {
      store(out + offsets[kFirst + i / kVectors] + (i % kVectors) * kWidth, values[i]);
    });
  });
}

// expanded[offsets[p]] = act(x[p] W + bias) for `pixels` rows of x [pixels][words].
template <class Kind, Activation kind>
inline void expand_pixels(const float* x, int64_t pixels, int64_t words, int64_t channels,
                          const PackedBlock& weights, const int32_t* offsets, float* expanded) {
  using Sum = typename Kind::Sum;
  const int64_t pieces = larger(divide_up(words, kDepth), 1);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = words * piece / pieces;
    const int64_t depth = words * (piece + 1) / pieces - first;
    for (int64_t column = 0; column < channels; column += kPanel) {
      const float* panel = weights.expand + column * words + first * kPanel;
      const float* bias = weights.expand_bias + column;
      Ahead ahead = after_piece(panel, depth, words, column + kPanel >= channels);
      for_row_blocks(pixels, [&](auto count, int64_t pixel) __attribute__((always_inline)) {
        constexpr int kCount = decltype(count)::value;
        float* out = expanded + column;
        Sum sums[kCount][kVectors];
        unroll<kCount * kVectors>([&](auto i) __attribute__((always_inline)) {
          constexpr int r = i / kVectors;
          constexpr int v = i % kVectors;
          if (piece > 0) {
            sums[r][v] = load_as<Sum>(out + offsets[pixel + r] + v * kWidth);
          } else if constexpr (Kind::kScaled) {
            sums[r][v] = Sum{};
          } else {
            sums[r][v] = load(bias + v * kWidth);
          }
        });
        multiply<Kind, kCount, kVectors>({x + pixel * words + first, words, 1}, panel, kPanel,
                                         depth, sums, ahead);
        if (piece < pieces - 1) {
          unroll<kCount * kVectors>([&](auto i) __attribute__((always_inline)) {
            constexpr int r = i / kVectors;
            constexpr int v = i % kVectors;
            store(out + offsets[pixel + r] + v * kWidth, sums[r][v]);
          });
          return;
        }
        activate_sums<Kind, kind>(sums, weights, column, offsets + pixel, out);
      });
    }
  }
}

#if defined(__AMX_TILE__)

// The same on tiles.
template <class Kind, Activation kind>
inline void expand_pixels_on_tiles(const float* x, int64_t pixels, int64_t words, int64_t channels,
                                   const PackedBlock& weights, const int32_t* offsets,
                                   float* expanded) {
  const float* start = Kind::kScaled ? nullptr : weights.expand_bias;
  finished_on_tiles<Kind>(
      pixels, channels, words, x, weights.expand, start,
      [&](int64_t column, int64_t pixel, const auto& sums) __attribute__((always_inline)) {
        activate_sums<Kind, kind>(sums, weights, column, offsets + pixel, expanded + column);
      });
}

#endif

inline void clear(float* values, int64_t count) {
  __builtin_memset(values, 0, static_cast<size_t>(count) * sizeof(float));
}

// A worker's way through consecutive strips of one image, or the one strip of several. Next: the
// kind of product that reads the results.
template <class Kind, class Next>
struct StripWalk {
  const MBConvProblem& problem;
  const Tiles& tiles;
  int64_t image;
  int64_t images;
  int64_t row_floats;
  bool has_carried = false;
  Rows expanded_rows = {};  // rows of x that this strip expands
  Rows tile_rows = {};      // rows of the padded input in the tile
  const float* x = nullptr;

  StripWalk(const MBConvProblem& problem, const Tiles& tiles, int64_t image, int64_t images)
      : problem(problem),
        tiles(tiles),
        image(image),
        images(images),
        row_floats(tile_columns(problem) * kPitch) {
    const int64_t rows = (strip_rows(problem) - 1) * problem.stride + 3;
    clear(tiles.expanded, images * rows * row_floats);
  }

  int64_t tile_floats() const { return tile_rows.count() * row_floats; }

  // Starts the strip of output rows [first, last), which follows the strip before it, if any.
  void enter(int64_t first, int64_t last) {
    tile_rows = input_rows(problem, first, last);
    const int64_t fresh = tile_rows.first + (has_carried ? carried_rows(problem) : 0);
    expanded_rows.first = smaller(larger(fresh, 0), problem.height);
    expanded_rows.last = larger(smaller(tile_rows.last, problem.height), expanded_rows.first);
    x = input_pixels<Kind>(problem, image, images, expanded_rows.first, expanded_rows.count(),
                           tiles.input);
    int32_t* offset = tiles.offsets;
    for (int64_t i = 0; i < images; ++i) {
      for (int64_t row = expanded_rows.first; row < expanded_rows.last; ++row) {
        const int64_t begin =
            i * tile_floats() + (row - tile_rows.first) * row_floats + problem.left * kPitch;
        for (int64_t column = 0; column < problem.width; ++column) {
          *offset++ = static_cast<int32_t>(begin + column * kPitch);
        }
      }
    }
  }

  // stencil[pixel][kPitchOf<Next>] of this strip for one block of E channels, row_pixels from one
  // row to the next. carry_slot: the block's place among those that this worker computes.
  void compute(int64_t block, const PackedBlock& weights, int64_t carry_slot, bool carries,
               int64_t row_pixels, float* stencil) {
    const int64_t channels = block_channels(problem, block);
    const int64_t carried_floats = carried_rows(problem) * row_floats;
    float* carried = tiles.carried + carry_slot * carried_floats;
    const size_t carried_bytes = static_cast<size_t>(carried_floats) * sizeof(float);
    int64_t cleared = tile_rows.first;
    if (has_carried) {
      __builtin_memcpy(tiles.expanded, carried, carried_bytes);
      cleared += carried_rows(problem);
    }
    // The borders of several images are left as they were cleared at the start.
    for (int64_t row = cleared; row < tile_rows.last && images == 1; ++row) {
      if (row < expanded_rows.first || row >= expanded_rows.last) {
        clear(tiles.expanded + (row - tile_rows.first) * row_floats, row_floats);
      }
    }
    with_activation(problem.expand_activation, [&](auto kind) __attribute__((always_inline)) {
      constexpr Activation kKind = decltype(kind)::value;
      const int64_t pixels = images * expanded_rows.count() * problem.width;
      const int64_t words = input_words(problem);
#if defined(__AMX_TILE__)
      if constexpr (kOnTiles<Kind>) {
        return expand_pixels_on_tiles<Kind, kKind>(x, pixels, words, channels, weights,
                                                   tiles.offsets, tiles.expanded);
      }
#endif
      expand_pixels<Kind, kKind>(x, pixels, words, channels, weights, tiles.offsets,
                                 tiles.expanded);
    });
    if (carries) {
      const int64_t first = tile_rows.count() - carried_rows(problem);
      __builtin_memcpy(carried, tiles.expanded + first * row_floats, carried_bytes);
    }
    const int64_t rows = (tile_rows.count() - 3) / problem.stride + 1;
    constexpr int64_t kOutPitch = kPitchOf<Next>;
    constexpr int64_t kOutPixel = kOutPitch * Next::kPerWord;
    const DepthwiseShape shape = {rows,      problem.out_width,     channels, kPitch, row_floats,
                                  kOutPixel, row_pixels * kOutPixel};
    for (int64_t i = 0; i < images; ++i) {
      auto* out = elements_of<Next>(stencil + i * rows * row_pixels * kOutPitch);
      depthwise(shape, problem.stride, problem.depthwise_activation,
                tiles.expanded + i * tile_floats(), weights.depthwise, weights.depthwise_bias,
                typename Next::Writer(out, problem.middle_quantization));
    }
  }
};

}  // namespace moat_kernels::cpu::MOAT_KERNELS_ISA
