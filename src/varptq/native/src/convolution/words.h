// Maps and kernels of 3 x 3 in words of 16 bits, which have room for sums of codes and of weights,
// and their products: a quarter as many, of which an instruction does half as many as of bytes.
//
// Codes, less 128, of 32 channels become 16 even ones and 16 odd ones, so that both sides of a
// product are made by shifts: a pair is of channels 4 q and 4 q + 2, or of 4 q + 1 and 4 q + 3. A
// part of a kernel has the same order: for every pair the outputs of a tile of registers, two words
// each.
#pragma once

#include "convolution/tile.h"
#include "linear/tile.h"

namespace vq {
namespace {

#if defined(VQ_LANES512)
constexpr int kWordBytes = 64;
constexpr int64_t kColumns = kPanel;  // outputs of a kernel side by side
#else
constexpr int kWordBytes = 32;
constexpr int64_t kColumns = kLanes;
#endif
using Words = int16_t __attribute__((vector_size(kWordBytes)));
using Bits = uint16_t __attribute__((vector_size(kWordBytes)));

constexpr int64_t kWords = kWordBytes / 2;     // in a vector
constexpr int64_t kTogether = 32;              // channels
constexpr int kHalves = kTogether / kWords;    // vectors of them
constexpr int kCentre = 128;                   // of the codes
constexpr int kSide = 3;                       // of a kernel
constexpr int64_t kPairWords = 2 * kColumns;
constexpr int64_t kPixels = 24;                // or squares, whose parts are computed together

constexpr int64_t word_channels(int64_t inputs) {
  return (inputs + kTogether - 1) / kTogether * kTogether;
}

VQ_INLINE void put(int16_t* to, Words x) { std::memcpy(to, &x, sizeof x); }

// 32 codes: the even ones first.
VQ_INLINE void codes_at(const uint8_t* codes, Words (&out)[kHalves]) {
  constexpr int kSigns = 0x8080;
#if defined(VQ_LANES512)
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m512i up = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(8), 0);
  const __m512i twice = _mm512_xor_si512(_mm512_broadcast_i64x4(bytes),
                                         _mm512_set1_epi16(static_cast<int16_t>(kSigns)));
  out[0] = reinterpret_cast<Words>(_mm512_srai_epi16(_mm512_sllv_epi16(twice, up), 8));
#else
  Bits both;
  std::memcpy(&both, codes, sizeof both);
  both ^= kSigns;
  out[0] = reinterpret_cast<Words>(both << 8) >> 8;
  out[1] = reinterpret_cast<Words>(both) >> 8;
#endif
}

struct EvenOdd {
  Words even, odd;
};

VQ_INLINE EvenOdd weights_at(const uint8_t* weights) {
  Bits both;
  std::memcpy(&both, weights, sizeof both);
  return {reinterpret_cast<Words>(both << 8) >> 8, reinterpret_cast<Words>(both) >> 8};
}

// function(g, channel, place) for all 3 x 3 weights of one or two inputs, of which `channel` is the
// first, and a vector of outputs; what they make has its place from a part's first pair on. Weights
// of channels that are padding are 0.
template <class Function>
VQ_INLINE void for_weights(const Convolution& job, const uint8_t* weights, Function function) {
  const int64_t row = padded(kSide * job.pixel) * kPanel;
  for (int64_t q = 0; q < word_channels(job.args->inputs) / 4; ++q)
    for (int64_t half = 0; half < kHalves; ++half) {
      Words even[kSide][kSide] = {}, odd[kSide][kSide] = {};
      for (int64_t tap = 0; tap < kSide * kSide && q < job.pixel / 4; ++tap) {
        const int64_t ky = tap / kSide, kx = tap % kSide;
        const EvenOdd both = weights_at(weights + ky * row + kx * job.pixel * kPanel + q * kStep +
                                        half * kWordBytes);
        even[ky][kx] = both.even, odd[ky][kx] = both.odd;
      }
      const int64_t channel = q / 8 * kTogether, place = q % 8 * kPairWords + half * kWords;
      function(even, channel, place);
      function(odd, channel, place + 8 * kPairWords);
    }
}

// A pair of words on both sides.
struct WordPairs : ByRows<WordPairs> {
  template <int step>
  VQ_INLINE static Ints dot(Ints sum, Left pair, Ints weights) {
    return dot2(sum, pair, weights);
  }
};

// What is multiplied: rows of words, `stride` words apart, and a part of a kernel.
struct Product {
  const int16_t* words;
  int64_t stride, pairs;
  const int16_t* kernel;
  int32_t* sums;      // of the first row; 16 times V of each
  int64_t sums_stride;
};

template <int R, int V>
__attribute__((noinline)) void multiply_words(const Product& p) {
  Registers<WordPairs, R, V> registers;
  registers.template begin<false>({});
  add_products<WordPairs>(registers.s, reinterpret_cast<const uint8_t*>(p.words), p.stride * 2,
                          reinterpret_cast<const uint8_t*>(p.kernel), kPairWords * 2, p.pairs,
                          [](const uint8_t* at, int v) VQ_INLINED {
                            __builtin_prefetch(at + v * 64 + kAhead);
                            return load_weights(at + v * 64);
                          });
  registers.settle();
  each<R, V>([&](int r, int v) {
    store(p.sums + r * p.sums_stride + v * kLanes, registers.at(r, v));
  });
}

// The same for `rows` of them, R at a time, the rest in a lower tile.
template <int R, int V>
void product_rows(Product p, int64_t rows) {
  for (; rows >= R; rows -= R) {
    multiply_words<R, V>(p);
    p.words += R * p.stride, p.sums += R * p.sums_stride;
  }
  constexpr int kNext = R > 2 ? (R - 1) / 2 * 2 : 1;
  if constexpr (R > 1) {
    if (rows > 0) product_rows<kNext, V>(p, rows);
  }
}

// function(first vector, product of `rows`) for the vectors of a panel in tiles of registers.
template <class Function>
VQ_INLINE void in_tiles(int64_t vectors, Function function) {
#if defined(VQ_LANES512)
  if (vectors == 4) return function(0, product_rows<6, 4>);
  if (vectors == 3) return function(0, product_rows<8, 3>);
  if (vectors == 2) return function(0, product_rows<12, 2>);
  function(0, product_rows<12, 1>);
#elif defined(VQ_VNNI256)
  for (int64_t v = 0; v < vectors; ++v) function(v, product_rows<6, 1>);
#else
  for (int64_t v = 0; v < vectors; ++v) function(v, product_rows<4, 1>);
#endif
}

// Where a vector of the outputs starts in a panel's kernel of `parts`.
constexpr int64_t vector_start(int64_t vector, int64_t parts, int64_t channels) {
  const int64_t tile = vector * kLanes / kColumns;
  return tile * parts * channels * kColumns + (vector * kLanes - tile * kColumns) * 2;
}

// A panel within a strip.
struct WordPanel {
  const int16_t* kernel;
  PanelMoments* moments;
  int64_t column, vectors;  // first output; of 16 outputs
};

struct WordStrip {
  const Convolution& job;
  int64_t image, first, end;  // rows
  int64_t channels;           // of words

  const uint8_t* map() const { return job.args->codes + image * job.image; }
};

// function(std::integral_constant<int, R>, first) for `count` in pieces of four, two and one.
template <class Function>
VQ_INLINE void in_pieces(int64_t count, Function function) {
  int64_t first = 0;
  for (; first + 4 <= count; first += 4) function(std::integral_constant<int, 4>{}, first);
  if (first + 2 <= count) function(std::integral_constant<int, 2>{}, first), first += 2;
  if (first < count) function(std::integral_constant<int, 1>{}, first);
}

// Outputs of row y from x on, `step` apart, from sums of a panel each.
inline void finish_row(const WordStrip& strip, const WordPanel& panel, int64_t y, int64_t x,
                       int64_t step, int64_t count, const int32_t* sums) {
  const Convolution& job = strip.job;
  const int64_t outputs = job.args->outputs;
  Tile tile{nullptr, 0, 0, step * outputs, strip.image, panel.column, kCentre};
  const int64_t start = ((strip.image * job.out_height + y) * job.out_width + x) * outputs;
  in_pieces(count, [&](auto together, int64_t first) VQ_INLINED {
    tile.y = start + first * tile.y_stride;
    for (int64_t v = 0; v < panel.vectors; ++v)
      finish_vector<together()>(job, tile, sums + first * kPanel + v * kLanes, kPanel,
                                panel.column + v * kLanes, panel.moments);
  });
}

}  // namespace
}  // namespace vq
