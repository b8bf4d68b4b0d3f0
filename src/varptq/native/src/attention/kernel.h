// One row and head of an attention call: layout of its cache, buffers, and the kernels that each
// instruction set provides. Plain data only: a function of the C++ library compiled with the flags
// of one instruction set must not end up in code for all.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "machine/isa.h"

namespace vq {

constexpr int64_t kMaxHeadWidth = 128;  // pairs of int16 hold sums of codes up to here
constexpr int kQueryTile = 6;           // queries whose scores are computed together
constexpr int64_t kHalfPlaces = 32;     // of packed values in low halves, before those in high ones
constexpr int32_t kHalfEntries = 8;     // the positive ones of a codebook of 4 bits
constexpr int64_t kMostHeads = 4;       // heads whose keys and values enter together

// Tokens that share a range of values: all of them under policy "token", those of a scale under
// "segment". `place` counts the padded places of values: a piece starts at a multiple of 4.
struct Piece {
  int64_t start, end, place;
};

// Byte offsets in the cache of one row and head.
//   keys    s8 [L/16][c/4][16][4]: code - 128, so that 16 tokens are one operand of dot4
//   pairs   int16 [L][2]: sum of a token's code - 128, and its zero point - 128
//   values  s8 [places/4][c16][4]: code - 128, or with theta the finest integer
// Packed, keys have half the groups of 4 channels, those of the second half in the high halves of
// bytes; and values half the groups of 4 places, of every kHalfPlaces the next as many in the high
// halves. What a half stands for: Coding::table.
//   value_zero  s8 [places]: zero point - 128, or 0 with theta
struct CacheLayout {
  int64_t quads;     // c / 4, rounded up
  int64_t stored_quads;  // of keys: the same, or half of them
  int64_t channels;  // c16: c rounded up to 16
  int64_t tokens;    // L rounded up to 16
  int64_t places;    // of values, a multiple of 64
  bool packed_values;
  int64_t keys, pairs, key_scale, values, value_zero, value_scale, bytes;

  bool packed_keys() const { return stored_quads < quads; }
  // Of the group of values that has a place, in groups; and where in its bytes, in bits.
  int64_t group_of(int64_t place) const {
    if (!packed_values) return place / 4;
    return place / (2 * kHalfPlaces) * (kHalfPlaces / 4) + place % kHalfPlaces / 4;
  }
  int shift_of(int64_t place) const {
    return packed_values && place % (2 * kHalfPlaces) >= kHalfPlaces ? 4 : 0;
  }
};

struct AttentionCall {
  const vq_attention_args* args;
  CacheLayout layout;
  const Piece* pieces;
  int64_t num_pieces;
  int64_t stride;    // floats from one row of scores to the next
};

// Buffers of one worker. `scores` has rows for a tile of queries, with theta for all of a span.
struct AttentionScratch {
  uint8_t* query_codes;  // of the queries of a block, c16 bytes each
  int32_t* query_pairs;
  float* query_scale;
  float* scores;
  float* relative;    // (stride): step of each key over the largest
  float* mean;        // (stride), with theta: probabilities summed over queries
  int32_t* orders;    // (stride), with theta
  uint8_t* codes;     // (kQueryTile, places) of probabilities
  int8_t* values;     // (places, c16), with theta: one head's values at their orders
};

// Queries first .. last - 1 of the call, all in span `span`; with theta all of that span.
struct QueryBlock {
  int64_t span, first, last;
};

struct AttentionKernels {
  // Keys and values of the call's tokens to codes, of up to kMostHeads heads from `head` on; false
  // where they are not finite.
  bool (*append)(const AttentionCall&, int64_t row, int64_t head, int64_t count);
  // False where a query is not finite.
  bool (*attend)(const AttentionCall&, int64_t row, int64_t head, const QueryBlock&,
                 const AttentionScratch&);
};

AttentionKernels attention_kernels(Set<Isa::portable>);
AttentionKernels attention_kernels(Set<Isa::avx2>);
AttentionKernels attention_kernels(Set<Isa::avx512vnni>);
AttentionKernels attention_kernels(Set<Isa::avxvnni>);
AttentionKernels attention_kernels(Set<Isa::avxvnni_evex>);
AttentionKernels attention_kernels(Set<Isa::neon_dotprod>);
AttentionKernels attention_kernels(Set<Isa::neon_i8mm>);

}  // namespace vq
