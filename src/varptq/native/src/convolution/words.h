// Maps and kernels of 3 x 3 in words of 16 bits, which have room for sums of codes and of weights, and
// their products. For sets that widen bytes to words anyway: then fewer products are faster ones.
//
// Codes of 32 channels become 16 even ones and 16 odd ones, so that both sides of a product are made
// by shifts: a pair is of channels 4 q and 4 q + 2, or of 4 q + 1 and 4 q + 3. A kernel of words has
// the same order: for every pair 16 outputs of two words.
#pragma once

#include "convolution/tile.h"

namespace vq {
namespace {

using Words = int16_t __attribute__((vector_size(32)));
using Bits = uint16_t __attribute__((vector_size(32)));

constexpr int64_t kWords = 16;         // in a vector
constexpr int64_t kTogether = 32;      // channels
constexpr int64_t kPairWords = 2 * kLanes;
constexpr int kSide = 3;               // of a kernel

constexpr int64_t word_channels(int64_t inputs) {
  return (inputs + kTogether - 1) / kTogether * kTogether;
}

VQ_INLINE void put(int16_t* to, Words x) { std::memcpy(to, &x, sizeof x); }

struct EvenOdd {
  Words even, odd;
};

VQ_INLINE EvenOdd codes_at(const uint8_t* codes) {
  Bits both;
  std::memcpy(&both, codes, sizeof both);
  return {reinterpret_cast<Words>(both & 0xFF), reinterpret_cast<Words>(both >> 8)};
}
VQ_INLINE EvenOdd weights_at(const uint8_t* weights) {
  Bits both;
  std::memcpy(&both, weights, sizeof both);
  return {reinterpret_cast<Words>(both << 8) >> 8, reinterpret_cast<Words>(both) >> 8};
}

// function(g, place) for all 3 x 3 weights of two inputs and eight outputs of a vector of a panel, and
// where what they make starts in each part of a kernel of words. What the padding of channels meets
// is left as it is.
template <class Function>
VQ_INLINE void for_weights(const Convolution& job, const uint8_t* weights, Function function) {
  const int64_t row = padded(kSide * job.pixel) * kPanel;
  for (int64_t q = 0; q < job.pixel / 4; ++q)
    for (int64_t side = 0; side < 2; ++side) {
      Words even[kSide][kSide], odd[kSide][kSide];
      for (int64_t ky = 0; ky < kSide; ++ky)
        for (int64_t kx = 0; kx < kSide; ++kx) {
          const int64_t at = ky * row + kx * job.pixel * kPanel + q * kStep + side * 32;
          const EvenOdd both = weights_at(weights + at);
          even[ky][kx] = both.even, odd[ky][kx] = both.odd;
        }
      const int64_t pair = q / 8 * kWords + q % 8;
      function(even, pair * kPairWords + side * kWords);
      function(odd, (pair + 8) * kPairWords + side * kWords);
    }
}

// One or two runs of pairs, whose words start at an offset each and whose kernels follow each other.
struct WordRuns {
  int64_t offset[2], count, pairs;
};

// Products of R pixels, `stride` words apart, with 16 outputs.
template <int R>
__attribute__((noinline)) void multiply_words(const int16_t* words, int64_t stride,
                                              const WordRuns& runs, const int16_t* kernel,
                                              int32_t* sums) {
  Ints s[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) s[r] = all_int(0);
  for (int64_t i = 0; i < runs.count; ++i) {
    const int16_t* at = words + runs.offset[i];
    for (int64_t pair = 0; pair < runs.pairs; ++pair, at += 2, kernel += kPairWords) {
      const Ints w = load(reinterpret_cast<const int32_t*>(kernel));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t two;
        std::memcpy(&two, at + r * stride, sizeof two);
        s[r] = dot2(s[r], all_int(two), w);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) store(sums + r * kLanes, s[r]);
}

// function(std::integral_constant<int, R>, first) for `count` in pieces of four, two and one.
template <class Function>
VQ_INLINE void in_pieces(int64_t count, Function function) {
  int64_t first = 0;
  for (; first + 4 <= count; first += 4) function(std::integral_constant<int, 4>{}, first);
  if (first + 2 <= count) function(std::integral_constant<int, 2>{}, first), first += 2;
  if (first < count) function(std::integral_constant<int, 1>{}, first);
}

}  // namespace
}  // namespace vq
