// Scores, softmax, probability codes and the value mix of the queries of one row and head. Written
// on lanes.h, compiled once per instruction set.
//
//   sum (q - zq)(k - zk) = sum q k' - zq sum k' + zk' (c zq - sum q)
//   sum p (v - zv)       = sum p v' - sum p zv',     x' = x - 128 for codes and zero points
//
// Products of int16 pairs give the second and third term of a score. A tile of the plan: up to six
// queries by kVectors vectors of 16 keys (or channels) in registers, over all channels (places).
#pragma once

#include "attention/append.h"
#include "lanes/products.h"
#include "lanes/vmath.h"

#define VQ_APART __attribute__((noinline))

namespace vq {
namespace {

#if defined(VQ_LANES512)
constexpr int kVectors = 4, kTileQueries = 6;
#elif defined(VQ_VNNI256)
constexpr int kVectors = 1, kTileQueries = 6;
#elif defined(VQ_NEON) || defined(__AVX2__)
constexpr int kVectors = 1, kTileQueries = 4;
#else
constexpr int kVectors = 1, kTileQueries = 2;
#endif
constexpr float kLowest = -3.0e38f;
// e^-60 is nothing beside the largest, which is 1, and keeps products with it normal.
constexpr float kFarBelow = -60.0f;

alignas(64) constexpr int32_t kIndex[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                8, 9, 10, 11, 12, 13, 14, 15};

// Queries as codes, from one on: codes (`stride` bytes apart), int16 pairs of kLeftShift - zq and
// c zq - sum q, and steps.
struct Queries {
  const uint8_t* codes;
  int64_t stride;
  const int32_t* pair;
  const float* scale;
};

inline void trace_query(const Head& head, int64_t query, const uint8_t* codes, float scale,
                        int32_t zero) {
  const vq_attention_args& args = head.args;
  const int64_t at = head.index() * args.queries + query;
  args.trace->query_scale[at] = scale;
  args.trace->query_zero[at] = zero;
  std::memcpy(args.trace->query_codes + at * args.width, codes, static_cast<size_t>(args.width));
}

// Codes of queries first .. last - 1 of a head into the buffers of `scratch`; false where one is
// not finite.
inline bool quantize_queries(const Head& head, int64_t first, int64_t last,
                             const AttentionScratch& scratch) {
  const vq_attention_args& args = head.args;
  const int64_t channels = head.call.layout.channels, width = args.width;
  const float* bias = args.query_bias ? args.query_bias + head.head * width : nullptr;
  Rows rows;
  rows.width = width;
  rows.channels = channels;
  for (int64_t query = first; query < last; query += kRows) {
    const int count = static_cast<int>(last - query < kRows ? last - query : kRows);
    const bool finite = load_rows(rows, count, [&](int r) {
      head.fetch(head.query, query + r + kAhead);
      return std::pair<const float*, const float*>{head.query.token(query + r), bias};
    });
    if (!finite) return false;
    if (args.l2_norm) make_units(rows);
    times(rows, args.query_factor[head.head]);
    for (int r = 0; r < count; ++r) turn(rows, r, args, args.start + query + r);
    Grids grids;
    head.query_coding.grids(rows, grids);
    for (int r = 0; r < count; ++r) {
      const int64_t i = query - first + r;
      uint8_t* codes = scratch.query_codes + i * channels;
      const int32_t sum = head.query_coding.store_codes(rows, r, grids, codes);
      const int32_t zero = grids.zero[r];
      const int16_t pair[2] = {static_cast<int16_t>(kLeftShift - zero),
                               static_cast<int16_t>(width * zero - sum)};
      std::memcpy(scratch.query_pairs + i, pair, sizeof pair);
      scratch.query_scale[i] = grids.scale[r];
      if (args.trace) trace_query(head, query + r, codes, grids.scale[r], zero);
    }
  }
  return true;
}

// Sums of a tile. `started`: they hold already what kLeftShift takes from them, else columns are
// added up for it.
template <bool started, int Q, int V>
struct Tile {
  Ints s[Q][V], columns[V];

  template <class Start>
  VQ_INLINE explicit Tile(Start start) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = all_int(0);
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) s[q][v] = start(q, v);
  }

  // += over 4 `count` products of u8 rows on the left, s8 vectors on the right that `decode` makes.
  template <class Decode>
  VQ_INLINE void add(const uint8_t* left, int64_t left_stride, const int8_t* right,
                     int64_t vector_stride, int64_t step, int64_t count, Decode decode) {
    add_products<Bytes>(s, left, left_stride, reinterpret_cast<const uint8_t*>(right), step, count,
                        [&](const uint8_t* at, int v) VQ_INLINED {
                          const auto* vector = at + v * vector_stride;
                          const Ints x = decode(load(reinterpret_cast<const int32_t*>(vector)));
                          if constexpr (!started) columns[v] = sum4(columns[v], x);
                          return x;
                        });
  }

  // After the loops: what follows is not to decide about registers within them.
  VQ_INLINE void settle() {
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        pin(s[q][v]);
        if constexpr (!started) s[q][v] = s[q][v] + times(columns[v], all_int(kLeftShift));
      }
  }
};

// Scores of Q queries with V vectors of keys; `best` keeps the running maximum of each query. A
// function of its own with unrolled loops: only then do compilers keep all sums in registers.
template <bool packed, int Q, int V>
VQ_APART void score_tile(const Head& head, const Queries& queries, int q0, int64_t vector,
                         int64_t keys, float* scores, Floats* best) {
  const CacheLayout& layout = head.call.layout;
  const int64_t stride = layout.stored_quads * 64;
  const int8_t* codes = head.at<int8_t>(layout.keys) + vector * stride;
  const int32_t* pairs = head.at<int32_t>(layout.pairs) + vector * kLanes;
  const float* scale = head.at<float>(layout.key_scale) + vector * kLanes;
  Tile<true, Q, V> tile([&](int q, int v) VQ_INLINED {
    return dot2(all_int(0), load(pairs + v * kLanes), all_int(queries.pair[q0 + q]));
  });
  const uint8_t* left = queries.codes + q0 * queries.stride;
  if constexpr (packed) {
    const Ints table = all_entries(head.key_coding.table);
    tile.add(left, queries.stride, codes, stride, 64, layout.stored_quads,
             [&](Ints x) VQ_INLINED { return entries_at(table, low_half(x)); });
    tile.add(left + 4 * layout.stored_quads, queries.stride, codes, stride, 64,
             layout.quads - layout.stored_quads,
             [&](Ints x) VQ_INLINED { return entries_at(table, high_half(x)); });
  } else {
    tile.add(left, queries.stride, codes, stride, 64, layout.quads,
             [](Ints x) VQ_INLINED { return x; });
  }
  tile.settle();
  // Lanes behind the last key hold whatever the cache held.
  const int64_t at = vector * kLanes;
  const bool whole = at + V * kLanes <= keys;
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
    Floats top = best[q0 + q];
    float* row = scores + (q0 + q) * head.call.stride + at;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Floats step = all(queries.scale[q0 + q]) * load(scale + v * kLanes);
      Floats x = to_float(tile.s[q][v]) * step;
      if (!whole)
        x = where_less(to_float(load(kIndex)), all(static_cast<float>(keys - at - v * kLanes)), x,
                       all(kLowest));
      top = larger(top, x);
      store(row + v * kLanes, x);
    }
    best[q0 + q] = top;
  }
}

template <bool packed, int Q>
inline void score_queries(const Head& head, const Queries& queries, int q0, int64_t keys,
                          float* scores, Floats* best) {
  const int64_t vectors = (keys + kLanes - 1) / kLanes;
  int64_t v = 0;
  for (; v + kVectors <= vectors; v += kVectors)
    score_tile<packed, Q, kVectors>(head, queries, q0, v, keys, scores, best);
  if constexpr (kVectors > 2)
    for (; v + 2 <= vectors; v += 2)
      score_tile<packed, Q, 2>(head, queries, q0, v, keys, scores, best);
  for (; v < vectors; ++v) score_tile<packed, Q, 1>(head, queries, q0, v, keys, scores, best);
}

struct RowSums {
  float total;    // of exponentials
  float largest;  // of what the row now holds
};

// e^(s - max) in place of `count` scores (a multiple of 16), times `factors` unless NULL.
inline RowSums exponentials(float* row, int64_t count, float largest, const float* factors) {
  Floats sum = all(0.0f), best = all(0.0f);
  for (int64_t j = 0; j < count; j += kLanes) {
    const Floats e = exp_within(larger(load(row + j) - all(largest), all(kFarBelow)));
    const Floats x = factors ? e * load(factors + j) : e;
    sum = sum + e;
    best = larger(best, x);
    store(row + j, x);
  }
  return {sum_of(sum), largest_of(best)};
}

// row *= factors, in place; returns the largest product.
inline float times(float* row, int64_t count, const float* factors) {
  Floats best = all(0.0f);
  for (int64_t j = 0; j < count; j += kLanes) {
    const Floats x = load(row + j) * load(factors + j);
    best = larger(best, x);
    store(row + j, x);
  }
  return largest_of(best);
}

// Codes of one row of probabilities times `sums.total`, places behind a piece 0. Returns the scale.
inline float probability_codes(const Head& head, const float* row, int64_t keys, RowSums sums,
                               uint8_t* codes) {
  const float top = static_cast<float>((1 << head.args.probability_bits) - 1);
  const float floor = kProbabilityFloor * sums.total;
  const float peak = sums.largest > floor ? sums.largest : floor;
  const Floats inverse = all(top / peak);
  int64_t place = 0;
  for (const Piece* piece = head.call.pieces;; ++piece) {
    const int64_t end = piece->end < keys ? piece->end : keys;
    for (int64_t j = piece->start; j < end; j += kLanes)
      store_bytes(codes + piece->place + j - piece->start, to_int(load(row + j) * inverse));
    place = piece->place + end - piece->start;
    std::memset(codes + place, 0, static_cast<size_t>(-place & 3));
    if (end == keys) break;
  }
  std::memset(codes + place, 0, static_cast<size_t>(-place & 63));
  return peak / sums.total / top;
}

// sum p zv' over places first .. last - 1; `ends`: they are the last ones. Codes behind those are
// zeros, but only up to a multiple of 64.
inline int32_t zero_point_sum(const uint8_t* codes, const int8_t* zeros, int64_t first,
                              int64_t last, bool ends) {
  const bool zeros_behind = ends && first % 64 == 0;
  alignas(64) uint8_t tail[64] = {};
  Ints sum = all_int(0);
  for (int64_t place = first; place < last; place += 64) {
    const uint8_t* four = codes + place;
    if (!zeros_behind && place + 64 > last) {
      std::memcpy(tail, four, static_cast<size_t>(last - place));
      four = tail;
    }
    sum = dot4(sum, load(reinterpret_cast<const int32_t*>(four)),
               load(reinterpret_cast<const int32_t*>(zeros + place)));
  }
  return sum_of(sum);
}

// What the products of one piece are multiplied by, and where they go.
struct Mixture {
  const CacheLayout& layout;
  const int8_t* values;
  const int8_t* table;  // of packed values
  float scale[kQueryTile];
  int32_t zero_sum[kQueryTile];
  float* out;  // (kQueryTile, kMaxHeadWidth)
  bool first;
};

template <bool packed, int Q, int V>
VQ_APART void mix_tile(const Mixture& mix, const uint8_t* codes, int q0, int64_t channel,
                       int64_t first, int64_t last) {
  const CacheLayout& layout = mix.layout;
  const int64_t stride = layout.places, step = 4 * layout.channels;
  const uint8_t* left = codes + q0 * stride;
  const int8_t* values = mix.values + 4 * channel;
  Tile<kLeftShift == 0, Q, V> tile([&](int q, int) VQ_INLINED {
    return all_int(-mix.zero_sum[q0 + q]);
  });
  if constexpr (packed) {
    const Ints table = all_entries(mix.table);
    for (int64_t place = first; place < last;) {
      const int64_t border = (place / kHalfPlaces + 1) * kHalfPlaces;
      const int64_t end = last < border ? last : border;
      const int8_t* groups = values + layout.group_of(place) * step;
      const int64_t count = (end - place + 3) / 4;
      if (layout.shift_of(place))
        tile.add(left + place, stride, groups, 64, step, count,
                 [&](Ints x) VQ_INLINED { return entries_at(table, high_half(x)); });
      else
        tile.add(left + place, stride, groups, 64, step, count,
                 [&](Ints x) VQ_INLINED { return entries_at(table, low_half(x)); });
      place = end;
    }
  } else {
    tile.add(left + first, stride, values + first / 4 * step, 64, step, (last - first + 3) / 4,
             [](Ints x) VQ_INLINED { return x; });
  }
  tile.settle();
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
    float* out = mix.out + (q0 + q) * kMaxHeadWidth + channel;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Floats x = to_float(tile.s[q][v]) * all(mix.scale[q0 + q]);
      store(out + v * kLanes, mix.first ? x : load(out + v * kLanes) + x);
    }
  }
}

template <bool packed, int Q>
inline void mix_queries(const Mixture& mix, const uint8_t* codes, int q0, int64_t first,
                        int64_t last) {
  const int64_t channels = mix.layout.channels;
  int64_t channel = 0;
  for (; channel + kVectors * kLanes <= channels; channel += kVectors * kLanes)
    mix_tile<packed, Q, kVectors>(mix, codes, q0, channel, first, last);
  for (; channel < channels; channel += kLanes)
    mix_tile<packed, Q, 1>(mix, codes, q0, channel, first, last);
}

// Calls function(Size<Q>, q0) for tiles of queries that cover `count`.
template <int Q>
struct Size {
  static constexpr int value = Q;
};

template <class Function>
inline void by_tiles(int count, Function function) {
  int q = 0;
  for (; q + kTileQueries <= count; q += kTileQueries) function(Size<kTileQueries>(), q);
#if defined(__AVX2__) || defined(VQ_NEON)
  if constexpr (kTileQueries > 4)
    for (; q + 4 <= count; q += 4) function(Size<4>(), q);
  for (; q + 2 <= count; q += 2) function(Size<2>(), q);
#endif
  for (; q < count; ++q) function(Size<1>(), q);
}

}  // namespace
}  // namespace vq
