// Queries, keys and values to codes: bias, unit vectors, rotary positions, affine ranges per token
// or per segment, and the entry of keys and values into the cache. Written on lanes.h, compiled once
// per instruction set.
//
//   s = (hi - lo) / (2^b - 1)   z = clamp(rint(-lo / s))   a = clamp(rint(x / s) + z)
#pragma once

#include "attention/kernel.h"
#include "lanes/lanes.h"
#include "quantize/codebook.h"

namespace vq {
namespace {

constexpr int64_t kAhead = 4;  // tokens whose input is fetched in advance

struct Grid {
  float scale;
  int32_t zero;
  float start = 0.0f;  // of a codebook: what divides x when entries are chosen
};

// One token's channels, padded with zeros, which no range that contains zero notices.
struct Channels {
  float v[kMaxHeadWidth];
};

// x + bias into `out`; false where a value is not finite.
inline bool load_channels(Channels& out, const float* x, const float* bias, int64_t width,
                          int64_t channels) {
  alignas(64) float padded[kLanes] = {}, padded_bias[kLanes] = {};
  Ints top = all_int(0);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const bool whole = c + kLanes <= width;
    if (!whole) {
      for (int64_t i = c; i < width; ++i) {
        padded[i - c] = x[i];
        padded_bias[i - c] = bias ? bias[i] : 0.0f;
      }
    }
    Floats y = load(whole ? x + c : padded);
    if (bias) y = y + load(whole ? bias + c : padded_bias);
    top = larger(top, bits_of(y) & all_int(0x7FFFFFFF));
    store(out.v + c, y);
  }
  return largest_of(top) < 0x7F800000;
}

// x / max(|x|, 1e-12), as torch's normalize.
inline void make_unit(Channels& x, int64_t channels) {
  Floats squares = all(0.0f);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Floats y = load(x.v + c);
    squares = squares + y * y;
  }
  const float norm = sqrtf(sum_of(squares));
  const Floats divisor = all(norm > 1e-12f ? norm : 1e-12f);
  for (int64_t c = 0; c < channels; c += kLanes) store(x.v + c, load(x.v + c) / divisor);
}

struct Range {
  Floats low = all(0.0f), high = all(0.0f);
};

inline void widen(Range& range, const Channels& x, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Floats y = load(x.v + c);
    range.low = smaller(range.low, y);
    range.high = larger(range.high, y);
  }
}

inline Grid grid_of(const Range& range, int32_t num_bits) {
  const float low = smallest_of(range.low), high = largest_of(range.high);
  const float top = static_cast<float>((1 << num_bits) - 1);
  // Halves of both sides give the same float, and do not overflow where high - low would.
  float scale = (0.5f * high - 0.5f * low) / (0.5f * top);
  scale = scale < kLeastScale ? kEmptyScale : scale;
  float zero = nearbyintf(-(low / scale));
  zero = zero < 0.0f ? 0.0f : zero > top ? top : zero;
  return {scale, static_cast<int32_t>(zero)};
}

// How one operand becomes codes; with a codebook they are its entries plus 128.
struct Coding {
  int32_t num_bits;
  Codebook book;

  Grid grid(const Range& range, const Channels& x, int64_t width) const {
    if (!book) return grid_of(range, num_bits);
    const float low = smallest_of(range.low), high = largest_of(range.high);
    alignas(64) float room[kMaxHeadWidth];
    const Fit fit = codebook_fit(width, -low > high ? -low : high, book, room,
                                 [&](int64_t i) { return load(x.v + i); },
                                 [](int64_t, Floats) {});
    return {fit.scale, kCodebookZero, fit.start};
  }
  // Of 16 channels.
  Ints codes(Floats x, Grid grid) const;
};

inline Ints affine_codes_of(Floats x, Grid grid, int32_t num_bits) {
  const Ints steps = to_int(x / all(grid.scale)) + all_int(grid.zero);
  return smaller(larger(steps, all_int(0)), all_int((1 << num_bits) - 1));
}

inline Ints Coding::codes(Floats x, Grid grid) const {
  if (!book) return affine_codes_of(x, grid, num_bits);
  return to_int(book.nearest(x, all(divisor_of(grid.start)))) + all_int(kCodebookZero);
}

// code - zero point on a grid 2^order times finer, in its units.
inline Ints fine_steps(Floats x, Grid grid, int32_t num_bits, int32_t order) {
  const float copies = static_cast<float>(1 << order);
  const Ints steps = to_int(x / all(grid.scale / copies));
  const int32_t low = -grid.zero * (1 << order);
  const int32_t high = ((1 << num_bits) - 1 - grid.zero) * (1 << order);
  return smaller(larger(steps, all_int(low)), all_int(high));
}

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
        query_coding{args.query_bits, Codebook(args.query_book)},
        key_coding{args.key_bits, Codebook(args.key_book)},
        value_coding{args.value_bits, Codebook(args.value_book)} {
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
  // Rows of a head lie a multiple of a page apart, where no hardware fetches ahead.
  void fetch(const Operand& operand, int64_t t) const {
    if (t >= operand.tokens) return;
    for (int64_t c = 0; c < args.width; c += kLanes) __builtin_prefetch(operand.token(t) + c);
  }
  int64_t index() const { return row * args.heads + head; }
};

// Pairs of channels turned by the angles of token `token` of the cache, where there are any.
inline void turn(Channels& x, const vq_attention_args& args, int64_t token) {
  if (!args.cosine) return;
  const int64_t pairs = args.width / 2;
  const float* cosine = args.cosine + token * pairs;
  const float* sine = args.sine + token * pairs;
  for (int64_t n = 0; n < pairs; ++n) {
    const float even = x.v[2 * n], odd = x.v[2 * n + 1];
    x.v[2 * n] = even * cosine[n] - odd * sine[n];
    x.v[2 * n + 1] = even * sine[n] + odd * cosine[n];
  }
}

// Place of cached token `token` in values.
inline int64_t place_of(const AttentionCall& call, int64_t token) {
  const Piece* piece = call.pieces;
  while (token >= piece->end) ++piece;
  return piece->place + token - piece->start;
}

inline void put_key(const Head& head, int64_t token, const Channels& x, Grid grid) {
  const CacheLayout& layout = head.call.layout;
  alignas(64) uint8_t codes[kMaxHeadWidth];
  for (int64_t c = 0; c < layout.channels; c += kLanes)
    store_bytes(codes + c, head.key_coding.codes(load(x.v + c), grid));
  int32_t sum = 0;
  for (int64_t c = 0; c < head.args.width; ++c) sum += codes[c];
  // Channels beyond c must not count: their stored code is 0.
  for (int64_t c = 0; c < 4 * layout.quads; ++c)
    codes[c] = c < head.args.width ? codes[c] ^ 0x80 : 0;
  uint8_t* keys = head.at<uint8_t>(layout.keys) + token / 16 * layout.quads * 64 + token % 16 * 4;
  for (int64_t quad = 0; quad < layout.quads; ++quad)
    std::memcpy(keys + quad * 64, codes + quad * 4, 4);
  int16_t* pair = head.at<int16_t>(layout.pairs) + 2 * token;
  pair[0] = static_cast<int16_t>(sum - 128 * head.args.width);
  pair[1] = static_cast<int16_t>(grid.zero - 128);
  head.at<float>(layout.key_scale)[token] = grid.scale;
}

// The byte of place % 4 in each channel's group of four.
template <int byte>
inline void put_value_bytes(int32_t* group, const Channels& x, Grid grid, const Head& head) {
  // A codebook has no finer grid: its entries are what either way stores.
  const bool fine = head.args.theta >= 0 && !head.value_coding.book;
  for (int64_t c = 0; c < head.call.layout.channels; c += kLanes) {
    const Floats y = load(x.v + c);
    const Ints code = fine ? fine_steps(y, grid, head.args.value_bits, head.args.max_order)
                           : head.value_coding.codes(y, grid) - all_int(128);
    const Ints others = load(group + c) & all_int(static_cast<int32_t>(~(0xFFu << (8 * byte))));
    store(group + c, others | shift_left<8 * byte>(code & all_int(0xFF)));
  }
}

inline void put_value(const Head& head, int64_t token, const Channels& x, Grid grid) {
  const CacheLayout& layout = head.call.layout;
  const int64_t place = place_of(head.call, token);
  auto* group = head.at<int32_t>(layout.values) + place / 4 * layout.channels;
  switch (place % 4) {
    case 0:
      put_value_bytes<0>(group, x, grid, head);
      break;
    case 1:
      put_value_bytes<1>(group, x, grid, head);
      break;
    case 2:
      put_value_bytes<2>(group, x, grid, head);
      break;
    default:
      put_value_bytes<3>(group, x, grid, head);
  }
  head.at<int8_t>(layout.value_zero)[place] =
      static_cast<int8_t>(head.args.theta >= 0 ? 0 : grid.zero - 128);
  head.at<float>(layout.value_scale)[token] = grid.scale;
}

inline void trace_key(const Head& head, int64_t token, Grid grid) {
  const vq_attention_trace* trace = head.args.trace;
  const CacheLayout& layout = head.call.layout;
  const int64_t at = head.index() * head.args.capacity + token;
  trace->key_scale[at] = grid.scale;
  trace->key_zero[at] = grid.zero;
  const uint8_t* keys =
      head.at<uint8_t>(layout.keys) + token / 16 * layout.quads * 64 + token % 16 * 4;
  for (int64_t c = 0; c < head.args.width; ++c)
    trace->key_codes[at * head.args.width + c] = keys[c / 4 * 64 + c % 4] ^ 0x80;
}

inline void trace_value(const Head& head, int64_t token, Grid grid) {
  const vq_attention_trace* trace = head.args.trace;
  const CacheLayout& layout = head.call.layout;
  const int64_t at = head.index() * head.args.capacity + token, place = place_of(head.call, token);
  const bool fine = head.args.theta >= 0;
  trace->value_scale[at] = grid.scale;
  trace->value_zero[at] = fine ? 0 : grid.zero;
  const int8_t* values =
      head.at<int8_t>(layout.values) + place / 4 * layout.channels * 4 + place % 4;
  for (int64_t c = 0; c < head.args.width; ++c)
    trace->value_codes[at * head.args.width + c] = values[4 * c] + (fine ? 0 : 128);
}

// Heads whose keys and values enter together: a token's are one piece of memory, and heads of one
// token lie a page away from those of the next.
struct Heads {
  const Head* of;
  int64_t count;
};

inline bool append_key(const Head& head, int64_t t) {
  const vq_attention_args& args = head.args;
  const int64_t channels = head.call.layout.channels;
  Channels x;
  head.fetch(head.key, t + kAhead);
  if (!load_channels(x, head.key.token(t), nullptr, args.width, channels)) return false;
  if (args.l2_norm) make_unit(x, channels);
  turn(x, args, args.start + t);
  Range range;
  widen(range, x, channels);
  const Grid grid = head.key_coding.grid(range, x, args.width);
  put_key(head, args.start + t, x, grid);
  if (args.trace) trace_key(head, args.start + t, grid);
  return true;
}

// One value; `shared`: the range of its segment, or NULL for one of its own.
inline bool append_value(const Head& head, int64_t t, const Grid* shared) {
  const vq_attention_args& args = head.args;
  const int64_t channels = head.call.layout.channels;
  const float* bias = args.value_bias + head.head * args.width;
  Channels x;
  head.fetch(head.value, t + kAhead);
  if (!load_channels(x, head.value.token(t), bias, args.width, channels)) return false;
  Grid grid;
  if (shared) {
    grid = *shared;
  } else {
    Range range;
    widen(range, x, channels);
    grid = head.value_coding.grid(range, x, args.width);
  }
  put_value(head, args.start + t, x, grid);
  if (args.trace) trace_value(head, args.start + t, grid);
  return true;
}

// The range of tokens `t` to `last` - 1 of a segment.
inline bool segment_grid(const Head& head, int64_t t, int64_t last, Grid& grid) {
  const vq_attention_args& args = head.args;
  const int64_t channels = head.call.layout.channels;
  const float* bias = args.value_bias + head.head * args.width;
  Channels x;
  Range range;
  for (; t < last; ++t) {
    head.fetch(head.value, t + kAhead);
    if (!load_channels(x, head.value.token(t), bias, args.width, channels)) return false;
    widen(range, x, channels);
  }
  grid = grid_of(range, args.value_bits);
  return true;
}

inline bool append_keys(const Heads& heads) {
  const int64_t tokens = heads.of->args.tokens;
  for (int64_t t = 0; t < tokens; ++t)
    for (const Head* head = heads.of; head < heads.of + heads.count; ++head)
      if (!append_key(*head, t)) return false;
  return true;
}

inline bool append_values(const Heads& heads) {
  const vq_attention_args& args = heads.of->args;
  const bool segments = args.policy == VQ_POLICY_SEGMENT;
  int64_t t = 0;
  for (const Piece* piece = heads.of->call.pieces; t < args.tokens; ++piece) {
    if (piece->end <= args.start) continue;
    // A range of its own for every token, or one for those of this piece.
    const int64_t behind = piece->end - args.start;
    const int64_t last = behind < args.tokens ? behind : args.tokens;
    Grid grids[kMostHeads];
    for (int64_t h = 0; segments && h < heads.count; ++h)
      if (!segment_grid(heads.of[h], t, last, grids[h])) return false;
    for (; t < last; ++t)
      for (int64_t h = 0; h < heads.count; ++h)
        if (!append_value(heads.of[h], t, segments ? grids + h : nullptr)) return false;
  }
  return true;
}

bool append(const AttentionCall& call, int64_t row, int64_t head, int64_t count) {
  static_assert(kMostHeads == 4, "one Head for each below");
  const int64_t last = head + count - 1;
  auto at = [&](int64_t i) { return Head(call, row, head + i < last ? head + i : last); };
  const Head all_of[kMostHeads] = {at(0), at(1), at(2), at(3)};
  const Heads heads = {all_of, count};
  return append_keys(heads) && append_values(heads);
}

}  // namespace
}  // namespace vq
