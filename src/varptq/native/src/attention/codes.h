// Queries, keys and values to codes: bias, unit vectors, rotary positions, affine ranges per token
// or per segment. Written on lanes.h, compiled once per instruction set.
//
//   s = (hi - lo) / (2^b - 1)   z = clamp(rint(-lo / s))   a = clamp(rint(x / s) + z)
//
// Rows are taken sixteen at a time, one step of the work for all of them: a row alone is a chain of
// sums, roots and quotients, each of which waits for the one before.
#pragma once

#include "attention/kernel.h"
#include "lanes/lanes.h"
#include "quantize/codebook.h"

namespace vq {
namespace {

constexpr int kRows = kLanes;
constexpr int64_t kAhead = 4;  // tokens whose input is fetched in advance

// Channels of up to kRows tokens, padded with zeros, which no range that contains zero notices.
struct Rows {
  alignas(64) float x[kRows][kMaxHeadWidth];
  int count;
  int64_t width, channels;  // padded to 16
};

// Of each row; of a codebook, `start` is what divides x when entries are chosen.
struct Grids {
  alignas(64) float scale[kRows];
  alignas(64) int32_t zero[kRows];
  alignas(64) float start[kRows];
};

// `from` + `bias` into row r; what it finds of sizes goes into `top`.
inline void load_row(Rows& rows, int r, const float* from, const float* bias, Ints& top) {
  alignas(64) float padded[kLanes] = {}, padded_bias[kLanes] = {};
  for (int64_t c = 0; c < rows.channels; c += kLanes) {
    const bool whole = c + kLanes <= rows.width;
    if (!whole) {
      for (int64_t i = c; i < rows.width; ++i) {
        padded[i - c] = from[i];
        padded_bias[i - c] = bias ? bias[i] : 0.0f;
      }
    }
    Floats y = load(whole ? from + c : padded);
    if (bias) y = y + load(whole ? bias + c : padded_bias);
    top = larger(top, bits_of(y) & all_int(0x7FFFFFFF));
    store(rows.x[r] + c, y);
  }
}

// Fills rows from `source(r)`, a pair of pointers to input and bias (or NULL); false where a value
// is not finite.
template <class Source>
inline bool load_rows(Rows& rows, int count, Source source) {
  rows.count = count;
  Ints top = all_int(0);
  for (int r = 0; r < count; ++r) {
    const auto [from, bias] = source(r);
    load_row(rows, r, from, bias, top);
  }
  return largest_of(top) < 0x7F800000;
}

// x / max(|x|, 1e-12), as torch's normalize.
inline void make_units(Rows& rows) {
  float norm[kRows];
  for (int r = 0; r < rows.count; ++r) {
    Floats squares = all(0.0f);
    for (int64_t c = 0; c < rows.channels; c += kLanes) {
      const Floats y = load(rows.x[r] + c);
      squares = squares + y * y;
    }
    norm[r] = sum_of(squares);
  }
  for (int r = 0; r < rows.count; ++r) {
    const float root = sqrtf(norm[r]);
    norm[r] = root > 1e-12f ? root : 1e-12f;
  }
  for (int r = 0; r < rows.count; ++r)
    for (int64_t c = 0; c < rows.channels; c += kLanes)
      store(rows.x[r] + c, load(rows.x[r] + c) / all(norm[r]));
}

inline void times(Rows& rows, float factor) {
  for (int r = 0; r < rows.count; ++r)
    for (int64_t c = 0; c < rows.channels; c += kLanes)
      store(rows.x[r] + c, load(rows.x[r] + c) * all(factor));
}

// Pairs of a row's channels turned by the angles of a token of the cache, where there are any.
inline void turn(Rows& rows, int r, const vq_attention_args& args, int64_t token) {
  if (!args.cosine) return;
  const int64_t pairs = args.width / 2;
  const float* cosine = args.cosine + token * pairs;
  const float* sine = args.sine + token * pairs;
  float* x = rows.x[r];
  for (int64_t n = 0; n < pairs; ++n) {
    const float even = x[2 * n], odd = x[2 * n + 1];
    x[2 * n] = even * cosine[n] - odd * sine[n];
    x[2 * n + 1] = even * sine[n] + odd * cosine[n];
  }
}

struct Range {
  Floats low = all(0.0f), high = all(0.0f);
};

inline void widen(Range& range, const Rows& rows, int r) {
  for (int64_t c = 0; c < rows.channels; c += kLanes) {
    const Floats y = load(rows.x[r] + c);
    range.low = smaller(range.low, y);
    range.high = larger(range.high, y);
  }
}

// Smallest and largest value of each row, or 0 on either side.
struct Ranges {
  alignas(64) float low[kRows] = {}, high[kRows] = {};

  void set(int r, const Range& range) {
    low[r] = smallest_of(range.low);
    high[r] = largest_of(range.high);
  }
};

inline void affine_grids(const Ranges& ranges, int32_t num_bits, Grids& grids) {
  const Floats low = load(ranges.low), high = load(ranges.high);
  const float top = static_cast<float>((1 << num_bits) - 1);
  // Halves of both sides give the same float, and do not overflow where high - low would.
  Floats scale = (all(0.5f) * high - all(0.5f) * low) / all(0.5f * top);
  scale = where_less(scale, all(kLeastScale), all(kEmptyScale), scale);
  const Floats zero = smaller(larger(rounded(all(0.0f) - low / scale), all(0.0f)), all(top));
  store(grids.scale, scale);
  store(grids.zero, to_int(zero));
}

// How one operand becomes codes; with a codebook they are its entries plus 128. In halves of bytes
// are codes, or places in a codebook, and `table` has what they stand for: codes less 128.
struct Coding {
  int32_t num_bits;
  Codebook book;
  bool halves;
  alignas(16) int8_t table[2 * kHalfEntries];

  Coding(int32_t bits, const vq_codebook& given, bool in_halves)
      : num_bits(bits), book(given), halves(in_halves) {
    for (int32_t i = 0; i < 2 * kHalfEntries; ++i) {
      const int32_t place = i % kHalfEntries;
      const float entry = book && place < book.count ? book.entries[place] : 0.0f;
      const float either = i < kHalfEntries ? entry : -entry;
      table[i] = static_cast<int8_t>(book ? static_cast<int32_t>(either) : i - 128);
    }
  }
  // The code of a stored byte.
  int32_t code_of(uint8_t byte) const { return halves ? table[byte] + 128 : byte; }

  void grids(const Rows& rows, Grids& out) const {
    Ranges ranges;
    for (int r = 0; r < rows.count; ++r) {
      Range range;
      widen(range, rows, r);
      ranges.set(r, range);
    }
    if (!book) return affine_grids(ranges, num_bits, out);
    for (int r = 0; r < rows.count; ++r) {
      alignas(64) float room[kMaxHeadWidth];
      const float low = ranges.low[r], high = ranges.high[r];
      const Fit fit = book.with_known([&](auto known) {
        return codebook_fit<known()>(
            rows.width, -low > high ? -low : high, book, room,
            [&](int64_t i) VQ_INLINED { return load(rows.x[r] + i); },
            [](int64_t, Floats) VQ_INLINED {});
      });
      out.scale[r] = fit.scale;
      out.zero[r] = kCodebookZero;
      out.start[r] = fit.start;
    }
  }

  // Of 16 channels of row r.
  Ints codes(const Rows& rows, int r, int64_t channel, const Grids& grids) const {
    const Floats x = load(rows.x[r] + channel);
    if (book)
      return to_int(book.nearest(x, all(divisor_of(grids.start[r])))) + all_int(kCodebookZero);
    const Ints steps = to_int(x / all(grids.scale[r])) + all_int(grids.zero[r]);
    return smaller(larger(steps, all_int(0)), all_int((1 << num_bits) - 1));
  }

  // What is stored of 16 channels of row r: their codes, or what `halves` says.
  Ints bytes(const Rows& rows, int r, int64_t channel, const Grids& grids) const {
    if (!halves || !book) return codes(rows, r, channel, grids);
    // As Codebook::nearest, kHalfEntries more for a negative one.
    const Floats x = load(rows.x[r] + channel);
    const Floats start = all(divisor_of(grids.start[r]));
    const Floats size = floats_of(bits_of(x) & all_int(0x7FFFFFFF)) / start;
    Floats found = all(0.0f);
    for (int32_t i = 1; i < book.count; ++i)
      found = where_less(size, all(book.borders[i]), found, all(static_cast<float>(i)));
    const Floats behind = found + all(static_cast<float>(kHalfEntries));
    return to_int(where_less(x, all(0.0f), behind, found));
  }

  // Bytes of row r at `out`, zeros behind the last channel; returns the sum of their codes.
  int32_t store_codes(const Rows& rows, int r, const Grids& grids, uint8_t* out) const {
    const Ints entries = all_entries(table);
    Ints sums = all_int(0);
    for (int64_t c = 0; c < rows.channels; c += kLanes) {
      const Ints some = bytes(rows, r, c, grids);
      store_bytes(out + c, some);
      if (halves)
        sums = sums + (shift_right<24>(shift_left<24>(entries_at(entries, some))) + all_int(128));
      else
        sums = sums + some;
    }
    int32_t sum = sum_of(sums);
    for (int64_t c = rows.width; c < rows.channels; ++c) {
      sum -= code_of(out[c]);
      out[c] = 0;
    }
    return sum;
  }

  // code - zero point of 16 channels on a grid 2^order times finer, in its units.
  Ints fine_steps(const Rows& rows, int r, int64_t channel, const Grids& grids,
                  int32_t order) const {
    const int32_t copies = 1 << order, zero = grids.zero[r];
    const float scale = grids.scale[r] / static_cast<float>(copies);
    const Ints steps = to_int(load(rows.x[r] + channel) / all(scale));
    const int32_t low = -zero * copies, high = ((1 << num_bits) - 1 - zero) * copies;
    return smaller(larger(steps, all_int(low)), all_int(high));
  }
};

}  // namespace
}  // namespace vq
