// Keys and values into the cache. Written on lanes.h, compiled once per instruction set.
#pragma once

#include <utility>

#include "attention/codes.h"
#include "lanes/products.h"

namespace vq {
namespace {

// One head's channels of the tokens of one operand.
struct Operand {
  const float* first = nullptr;
  int64_t stride = 0, tokens = 0;
  const float* token(int64_t t) const { return first + t * stride; }
};

struct Head {
  const AttentionCall& call;
  const vq_attention_args& args;
  int64_t row, head;
  uint8_t* cache;
  Operand query, key, value;
  Coding query_coding, key_coding, value_coding;

  Head(const AttentionCall& all_of, int64_t b, int64_t h)
      : call(all_of), args(*all_of.args), row(b), head(h),
        query_coding(args.query_bits, args.query_book, false),
        key_coding(args.key_bits, args.key_book, args.packed_keys != 0),
        value_coding(args.value_bits, args.value_book, args.packed_values != 0) {
    cache = args.cache + (b * args.heads + h) * call.layout.bytes;
    query = operand(args.query, args.query_stride, args.queries);
    key = operand(args.key, args.key_stride, args.tokens);
    value = operand(args.value, args.key_stride, args.tokens);
  }
  Operand operand(const float* all_heads, int64_t stride, int64_t tokens) const {
    if (tokens == 0) return {};
    return {all_heads + row * tokens * stride + head * args.width, stride, tokens};
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(cache + offset);
  }
  // The first four channels of a token's key; the next lie 64 bytes on.
  uint8_t* key_at(int64_t token) const {
    return at<uint8_t>(call.layout.keys) + token / 16 * call.layout.stored_quads * 64 +
           token % 16 * 4;
  }
  // Rows of a head lie a multiple of a page apart, where no hardware fetches ahead. Inlined by
  // order: GCC takes a function of prefetches alone for one without effect and drops its calls.
  VQ_INLINE void fetch(const Operand& operand, int64_t t) const {
    if (t >= operand.tokens) return;
    for (int64_t c = 0; c < args.width; c += kLanes) __builtin_prefetch(operand.token(t) + c);
  }
  int64_t index() const { return row * args.heads + head; }
};

// Place of cached token `token` in values.
inline int64_t place_of(const AttentionCall& call, int64_t token) {
  const Piece* piece = call.pieces;
  while (token >= piece->end) ++piece;
  return piece->place + token - piece->start;
}

inline void trace_key(const Head& head, int64_t token, float scale, int32_t zero) {
  const vq_attention_trace* trace = head.args.trace;
  const CacheLayout& layout = head.call.layout;
  const int64_t at = head.index() * head.args.capacity + token;
  trace->key_scale[at] = scale;
  trace->key_zero[at] = zero;
  const uint8_t* keys = head.key_at(token);
  for (int64_t c = 0; c < head.args.width; ++c) {
    const bool high = c / 4 >= layout.stored_quads;
    const uint8_t byte = keys[(c / 4 - (high ? layout.stored_quads : 0)) * 64 + c % 4];
    const int half = high ? byte >> 4 : byte & 0xF;
    trace->key_codes[at * head.args.width + c] = static_cast<uint8_t>(
        layout.packed_keys() ? head.key_coding.table[half] + 128 : byte ^ 0x80);
  }
}

inline void trace_value(const Head& head, int64_t token, float scale, int32_t zero) {
  const vq_attention_trace* trace = head.args.trace;
  const CacheLayout& layout = head.call.layout;
  const int64_t at = head.index() * head.args.capacity + token, place = place_of(head.call, token);
  const bool fine = head.args.theta >= 0;
  trace->value_scale[at] = scale;
  trace->value_zero[at] = fine ? 0 : zero;
  const int8_t* values =
      head.at<int8_t>(layout.values) + layout.group_of(place) * layout.channels * 4 + place % 4;
  for (int64_t c = 0; c < head.args.width; ++c) {
    const int half = static_cast<uint8_t>(values[4 * c]) >> layout.shift_of(place) & 0xF;
    const int32_t value = layout.packed_values ? head.value_coding.table[half] : values[4 * c];
    trace->value_codes[at * head.args.width + c] = value + (fine ? 0 : 128);
  }
}

// Heads whose keys and values enter together: a token's are one piece of memory, and heads of one
// token lie a page away from those of the next.
struct Heads {
  Head of[kMostHeads];
  int count;
  // Rows hold the heads of a token, then those of the next.
  uint8_t head_of[kRows], token_of[kRows];

  Heads(const AttentionCall& call, int64_t row, int64_t head, int64_t some)
      : of{at(call, row, head, 0, some), at(call, row, head, 1, some),
           at(call, row, head, 2, some), at(call, row, head, 3, some)},
        count(static_cast<int>(some)) {
    static_assert(kMostHeads == 4, "one Head for each above");
    for (int r = 0; r < kRows; ++r) {
      head_of[r] = static_cast<uint8_t>(r % count);
      token_of[r] = static_cast<uint8_t>(r / count);
    }
  }
  static Head at(const AttentionCall& call, int64_t row, int64_t head, int64_t i, int64_t some) {
    return Head(call, row, head + (i < some ? i : 0));
  }
  const Head& head(int r) const { return of[head_of[r]]; }
  int64_t token(int r) const { return token_of[r]; }
  int rows(int64_t tokens) const { return static_cast<int>(tokens) * count; }
  int64_t most_tokens() const { return kRows / count; }
};

inline uint32_t four_at(const uint8_t* bytes) {
  uint32_t four;
  std::memcpy(&four, bytes, sizeof four);
  return four;
}
inline void put_four(uint8_t* bytes, uint32_t four) { std::memcpy(bytes, &four, sizeof four); }

inline void put_key(const Head& head, int64_t token, const Rows& rows, int r, const Grids& grids) {
  const CacheLayout& layout = head.call.layout;
  alignas(64) uint8_t codes[kMaxHeadWidth];
  const int32_t sum = head.key_coding.store_codes(rows, r, grids, codes);
  // Channels beyond c must not count: their stored code is 0.
  for (int64_t c = rows.width; c < 4 * layout.quads; ++c) codes[c] = 0x80;
  uint8_t* keys = head.key_at(token);
  if (layout.packed_keys()) {
    std::memset(codes + layout.channels, 0, sizeof codes - static_cast<size_t>(layout.channels));
    for (int64_t quad = 0; quad < layout.stored_quads; ++quad)
      put_four(keys + quad * 64, four_at(codes + quad * 4) |
                                     four_at(codes + (quad + layout.stored_quads) * 4) << 4);
  } else {
    for (int64_t quad = 0; quad < layout.quads; ++quad)
      put_four(keys + quad * 64, four_at(codes + quad * 4) ^ 0x80808080u);
  }
  int16_t* pair = head.at<int16_t>(layout.pairs) + 2 * token;
  pair[0] = static_cast<int16_t>(sum - 128 * head.args.width);
  pair[1] = static_cast<int16_t>(grids.zero[r] - 128);
  head.at<float>(layout.key_scale)[token] = grids.scale[r];
  if (head.args.trace) trace_key(head, token, grids.scale[r], grids.zero[r]);
}

// Keys of `count` tokens of the call from `t` on.
inline bool append_keys(const Heads& heads, int64_t t, int64_t count, Rows& rows) {
  const vq_attention_args& args = heads.of[0].args;
  const auto source = [&](int r) {
    const Head& head = heads.head(r);
    head.fetch(head.key, t + heads.token(r) + kAhead);
    return std::pair<const float*, const float*>{head.key.token(t + heads.token(r)), nullptr};
  };
  if (!load_rows(rows, heads.rows(count), source)) return false;
  if (args.l2_norm) make_units(rows);
  for (int r = 0; r < rows.count; ++r) turn(rows, r, args, args.start + t + heads.token(r));
  Grids grids;
  heads.of[0].key_coding.grids(rows, grids);
  for (int r = 0; r < rows.count; ++r)
    put_key(heads.head(r), args.start + t + heads.token(r), rows, r, grids);
  return true;
}

// What is stored of 16 channels of row r, in the low byte or half of it.
inline Ints value_codes(const Head& head, const Rows& rows, int r, int64_t channel,
                        const Grids& grids) {
  // A codebook has no finer grid: its entries are what either way stores.
  if (head.args.theta >= 0 && !head.value_coding.book)
    return head.value_coding.fine_steps(rows, r, channel, grids, head.args.max_order);
  if (head.value_coding.halves) return head.value_coding.bytes(rows, r, channel, grids);
  return head.value_coding.codes(rows, r, channel, grids) - all_int(128);
}

// Bytes first .. last - 1, or halves of them, of the groups of four that have `place`, from row r
// on, `step` rows apart; what else is in the groups stays.
template <int first, int last>
inline void put_value_bytes(const Head& head, int64_t place, const Rows& rows, int r, int step,
                            const Grids& grids) {
  const CacheLayout& layout = head.call.layout;
  const bool whole = last - first == 4 && !layout.packed_values;
  const int shift = layout.shift_of(place);
  const uint32_t bytes = (0xFFFFFFFFu >> (32 - 8 * (last - first))) << (8 * first);
  const uint32_t taken = layout.packed_values ? (bytes & 0x0F0F0F0Fu) << shift : bytes;
  int32_t* group = head.at<int32_t>(layout.values) + layout.group_of(place) * layout.channels;
  for (int64_t c = 0; c < rows.channels; c += kLanes) {
    Ints four = all_int(0);
    unrolled(std::make_integer_sequence<int, last - first>{}, [&](auto i) VQ_INLINED {
      constexpr int kByte = first + decltype(i)::value;
      const Ints code = value_codes(head, rows, r + decltype(i)::value * step, c, grids);
      four = four | shift_left<8 * kByte>(code & all_int(0xFF));
    });
    if (shift) four = shift_left<4>(four);
    if (!whole) four = four | (load(group + c) & all_int(static_cast<int32_t>(~taken)));
    store(group + c, four);
  }
}

inline void put_value_byte(const Head& head, int64_t place, const Rows& rows, int r,
                           const Grids& grids) {
  switch (place % 4) {
    case 0:
      return put_value_bytes<0, 1>(head, place, rows, r, 0, grids);
    case 1:
      return put_value_bytes<1, 2>(head, place, rows, r, 0, grids);
    case 2:
      return put_value_bytes<2, 3>(head, place, rows, r, 0, grids);
    default:
      return put_value_bytes<3, 4>(head, place, rows, r, 0, grids);
  }
}

// Values of `count` tokens of one head, whose rows are `step` apart from r on.
inline void put_values(const Head& head, int64_t token, int64_t count, const Rows& rows, int r,
                       int step, const Grids& grids) {
  const CacheLayout& layout = head.call.layout;
  const int64_t place = place_of(head.call, token);
  for (int64_t i = 0; i < count;) {
    const int first = r + static_cast<int>(i) * step;
    const bool whole = (place + i) % 4 == 0 && i + 4 <= count;
    if (whole)
      put_value_bytes<0, 4>(head, place + i, rows, first, step, grids);
    else
      put_value_byte(head, place + i, rows, first, grids);
    i += whole ? 4 : 1;
  }
  for (int64_t i = 0; i < count; ++i, r += step) {
    const int32_t zero = grids.zero[r];
    head.at<int8_t>(layout.value_zero)[place + i] =
        static_cast<int8_t>(head.args.theta >= 0 ? 0 : zero - 128);
    head.at<float>(layout.value_scale)[token + i] = grids.scale[r];
    if (head.args.trace) trace_value(head, token + i, grids.scale[r], zero);
  }
}

inline bool load_values(const Heads& heads, int64_t t, int64_t count, Rows& rows) {
  const vq_attention_args& args = heads.of[0].args;
  return load_rows(rows, heads.rows(count), [&](int r) {
    const Head& head = heads.head(r);
    head.fetch(head.value, t + heads.token(r) + kAhead);
    return std::pair<const float*, const float*>{head.value.token(t + heads.token(r)),
                                                 args.value_bias + head.head * args.width};
  });
}

// The range of tokens `t` to `last` - 1 of a segment, of each head.
inline bool segment_ranges(const Heads& heads, int64_t t, int64_t last, Rows& rows,
                           Ranges& ranges) {
  Range found[kMostHeads];
  for (int64_t count; t < last; t += count) {
    count = last - t < heads.most_tokens() ? last - t : heads.most_tokens();
    if (!load_values(heads, t, count, rows)) return false;
    for (int r = 0; r < rows.count; ++r) widen(found[heads.head_of[r]], rows, r);
  }
  for (int r = 0; r < kRows; ++r) ranges.set(r, found[heads.head_of[r]]);
  return true;
}

// Values of tokens `t` to `last` - 1 of the call, all of one piece: with its grids, or NULL and
// grids of their own.
inline bool append_piece(const Heads& heads, int64_t t, int64_t last, Rows& rows,
                         const Grids* shared) {
  const int64_t start = heads.of[0].args.start;
  for (int64_t count; t < last; t += count) {
    count = last - t;
    if (count > heads.most_tokens()) {
      count = heads.most_tokens();
      // The next ones begin a group of four.
      const int64_t beyond = (place_of(heads.of[0].call, start + t) + count) % 4;
      if (beyond < count) count -= beyond;
    }
    if (!load_values(heads, t, count, rows)) return false;
    Grids own;
    if (!shared) heads.of[0].value_coding.grids(rows, own);
    for (int h = 0; h < heads.count; ++h)
      put_values(heads.of[h], start + t, count, rows, h, heads.count, shared ? *shared : own);
  }
  return true;
}

inline bool append_values(const Heads& heads, Rows& rows) {
  const vq_attention_args& args = heads.of[0].args;
  int64_t t = 0;
  for (const Piece* piece = heads.of[0].call.pieces; t < args.tokens; ++piece) {
    if (piece->end <= args.start) continue;
    const int64_t behind = piece->end - args.start;
    const int64_t last = behind < args.tokens ? behind : args.tokens;
    // A range of its own for every token, or one for those of this piece.
    Grids grids;
    const bool shared = args.policy == VQ_POLICY_SEGMENT;
    if (shared) {
      Ranges ranges;
      if (!segment_ranges(heads, t, last, rows, ranges)) return false;
      affine_grids(ranges, args.value_bits, grids);
    }
    if (!append_piece(heads, t, last, rows, shared ? &grids : nullptr)) return false;
    t = last;
  }
  return true;
}

bool append(const AttentionCall& call, int64_t row, int64_t head, int64_t count) {
  const Heads heads(call, row, head, count);
  Rows rows;
  rows.width = call.args->width;
  rows.channels = call.layout.channels;
  const int64_t tokens = call.args->tokens;
  for (int64_t t = 0, some; t < tokens; t += some) {
    some = tokens - t < heads.most_tokens() ? tokens - t : heads.most_tokens();
    if (!append_keys(heads, t, some, rows)) return false;
  }
  return append_values(heads, rows);
}

}  // namespace
}  // namespace vq
