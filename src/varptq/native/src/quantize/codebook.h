// A slice of floats on a codebook, in lanes of 16: the definitions of varptq.quant.codebook, to the
// bit, the order of its sums included.
//
//   start = rms(x) reach   c = entry nearest to x / start   s = <x, c> / <c, c>
//   stored code = 128 + c, zero point 128
#pragma once

#include <cmath>
#include <cstring>

#include "lanes/lanes_more.h"
#include "quantize/scales.h"
#include "varptq.h"

namespace vq {
namespace {

constexpr int32_t kCodebookZero = 128;

// Floats that `codebook_fit` needs room for: a power of two.
inline int64_t codebook_room(int64_t n) {
  int64_t size = kLanes;
  while (size < n) size *= 2;
  return size;
}

struct Codebook {
  const float* entries;
  int32_t count;
  float reach;
  float borders[VQ_MOST_ENTRIES];  // between entry i - 1 and i

  explicit Codebook(const vq_codebook& book)
      : entries(book.entries), count(book.count), reach(book.reach) {
    for (int32_t i = 1; i < count; ++i) borders[i] = 0.5f * (entries[i - 1] + entries[i]);
  }
  explicit operator bool() const { return count > 0; }

  // The entry nearest to x in units of `scale`; on a border the larger, for 0 the smallest above.
  Floats nearest(Floats x, Floats scale) const { return nearest(x, scale, x); }
  // With the sign of another number, which x may have lost.
  Floats nearest(Floats x, Floats scale, Floats sign) const {
    const Floats size = floats_of(bits_of(x) & all_int(0x7FFFFFFF)) / scale;
    Floats found = all(entries[0]);
    for (int32_t i = 1; i < count; ++i)
      found = where_less(size, all(borders[i]), found, all(entries[i]));
    return where_less(sign, all(0.0f), all(0.0f) - found, found);
  }
};

inline float divisor_of(float start) { return start > 0.0f ? start : 1.0f; }

// Sum of n floats, which are overwritten; there is room for `codebook_room(n)`.
inline float halving_sum(float* x, int64_t n) {
  int64_t size = codebook_room(n);
  for (int64_t i = n; i < size; ++i) x[i] = 0.0f;
  while (size > kLanes) {
    size /= 2;
    for (int64_t i = 0; i < size; i += kLanes) store(x + i, load(x + i) + load(x + size + i));
  }
  return sum_of(load(x));
}

// s, and what x is divided by when its entries are chosen; both 0 where one is no normal float.
struct Fit {
  float scale, start;
};

// Of n floats whose largest size is `largest`; `load_at(i)` gives 16 of them, zeros behind the end.
// `chosen(i, entries)` gets their entries, which are final unless the fit is 0.
template <class LoadAt, class Chosen>
inline Fit codebook_fit(int64_t n, float largest, const Codebook& book, float* room,
                        LoadAt load_at, Chosen chosen) {
  int32_t bits;
  std::memcpy(&bits, &largest, sizeof bits);
  bits &= 0x7F800000;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  // A power of two whose inverse is a normal float, so that products are the quotients.
  const float unit = largest < kLeastScale ? 1.0f : power < 0x1p126f ? power : 0x1p126f;
  const Floats inverse = all(1.0f / unit);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats x = load_at(i) * inverse;
    store(room + i, x * x);
  }
  const float start = std::sqrt(halving_sum(room, n) / static_cast<float>(n)) * book.reach;
  const Floats starts = all(divisor_of(start));
  Ints squares = all_int(0);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats given = load_at(i), x = given * inverse, c = book.nearest(x, starts, given);
    chosen(i, c);
    store(room + i, x * c);
    squares = squares + to_int(c * c);
  }
  // Behind the end are zeros on the smallest entry.
  const int32_t smallest = static_cast<int32_t>(book.entries[0]);
  const int32_t behind = static_cast<int32_t>((kLanes - n % kLanes) % kLanes);
  const int32_t energy = sum_of(squares) - behind * smallest * smallest;
  const float scale = halving_sum(room, n) / static_cast<float>(energy) * unit;
  const Fit fit{scale, start * unit};
  return fit.scale >= kLeastScale && fit.start >= kLeastScale ? fit : Fit{0.0f, 0.0f};
}

}  // namespace
}  // namespace vq
