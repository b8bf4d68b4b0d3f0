// A slice of floats on a codebook, in lanes of 16: the definitions of varptq.quant.codebook, to the
// bit, the order of its sums included.
//
//   start = rms(x) reach   c = entry nearest to x / start   s = <x, c> / <c, c>
//   stored code = 128 + c, zero point 128
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "lanes/lanes_more.h"
#include "quantize/scales.h"
#include "varptq.h"

namespace vq {
namespace {

constexpr int32_t kCodebookZero = 128;

VQ_INLINE Floats size_of(Floats x) { return floats_of(bits_of(x) & all_int(0x7FFFFFFF)); }

// Floats that `codebook_fit` needs room for: a power of two.
inline int64_t codebook_room(int64_t n) {
  int64_t size = kLanes;
  while (size < n) size *= 2;
  return size;
}

// Entries of 4 bits, which most codebooks have: loops over so many are unrolled.
constexpr int32_t kUsualEntries = 8;

// So many halvings of a sum are done in registers, of which they need two to that power. Lanes that
// are loops have code enough with one, and with one way to the entries.
#if defined(VQ_LANES512)
constexpr int kMostHalvings = 3;
#elif defined(__AVX2__) || defined(VQ_NEON)
constexpr int kMostHalvings = 2;
#else
constexpr int kMostHalvings = 1;
#endif
constexpr bool kTwoWays = kMostHalvings > 1;

struct Codebook {
  const float* entries;
  int32_t count;
  float reach;
  float borders[VQ_MOST_ENTRIES] = {};  // between entry i - 1 and i

  explicit Codebook(const vq_codebook& book)
      : entries(book.entries), count(book.count), reach(book.reach) {
    for (int32_t i = 1; i < count; ++i) borders[i] = 0.5f * (entries[i - 1] + entries[i]);
  }
  explicit operator bool() const { return count > 0; }

  // function(std::integral_constant<int32_t, known>{}) with the number of entries, where code is
  // made for it, or 0.
  template <class Function>
  VQ_INLINE auto with_known(Function function) const {
    if constexpr (kTwoWays) {
      if (count == kUsualEntries)
        return function(std::integral_constant<int32_t, kUsualEntries>{});
    }
    return function(std::integral_constant<int32_t, 0>{});
  }

  // The entry whose limits `size` lies between, with the sign of another number; of `known`
  // entries, or as many as there are.
  template <int32_t known>
  VQ_INLINE Floats entry_at(Floats size, const float* limits, Floats sign) const {
    Floats found = all(entries[0]);
#pragma GCC unroll 8
    for (int32_t i = 1; i < (known ? known : count); ++i)
      found = where_less(size, all(limits[i]), found, all(entries[i]));
    return where_less(sign, all(0.0f), all(0.0f) - found, found);
  }
  // The entry nearest to x in units of `scale`; on a border the larger, for 0 the smallest above.
  Floats nearest(Floats x, Floats scale) const {
    return with_known([&](auto known) VQ_INLINED {
      return entry_at<known()>(size_of(x) / scale, borders, x);
    });
  }
};

// The smallest floats whose quotients with `scale` reach the borders: a float is below one just
// where its quotient is below the border, so that none has to be divided. A quotient rounds up by
// less than a step of the border, the product by half of one of its own: two steps are enough.
inline void limits_of(const Codebook& book, float scale, float* limits) {
  constexpr int32_t kSteps = 2;
  for (int32_t first = 0; first < book.count; first += kLanes) {
    const Floats border = load(book.borders + first), near = border * all(scale);
    Floats found = near;
    for (int32_t step = kSteps; step >= -kSteps; --step) {
      const Floats x = floats_of(bits_of(near) + all_int(step));
      found = where_less(x / all(scale), border, found, x);
    }
    store(limits + first, found);
  }
}

inline float divisor_of(float start) { return start > 0.0f ? start : 1.0f; }

// `to` gets the sums of vectors i, i + step, i + 2 step, ... for all i below step.
template <int halvings, class Term>
VQ_INLINE void halve(int64_t step, float* to, Term term) {
  constexpr int kCount = 1 << halvings;
  for (int64_t i = 0; i < step; ++i) {
    Floats v[kCount];
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) v[k] = term((i + k * step) * kLanes);
#pragma GCC unroll 8
    for (int half = kCount / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int k = 0; k < half; ++k) v[k] = v[k] + v[k + half];
    store(to + i * kLanes, v[0]);
  }
}

template <class Term>
VQ_INLINE int64_t halve_once(int64_t vectors, float* to, Term term) {
  if constexpr (kMostHalvings > 2) {
    if (vectors >= 8) return halve<3>(vectors / 8, to, term), vectors / 8;
  }
  if constexpr (kMostHalvings > 1) {
    if (vectors >= 4) return halve<2>(vectors / 4, to, term), vectors / 4;
  }
  if (vectors >= 2) return halve<1>(vectors / 2, to, term), vectors / 2;
  return halve<0>(1, to, term), 1;
}

// The sum of n numbers, of which `term(i)` makes 16 from i on, by halves: the second half is added
// to the first one, until 16 are left. In `room` there is room for `codebook_room(n)` floats.
template <class Term>
VQ_INLINE float halving_sum(int64_t n, float* room, Term term) {
  const auto first = [&](int64_t i) VQ_INLINED { return i < n ? term(i) : all(0.0f); };
  int64_t vectors = halve_once(codebook_room(n) / kLanes, room, first);
  // What is read lies at or behind what is written.
  while (vectors > 1)
    vectors = halve_once(vectors, room, [&](int64_t i) VQ_INLINED { return load(room + i); });
  return sum_of(load(room));
}

// s, and what x is divided by when its entries are chosen; both 0 where one is no normal float.
struct Fit {
  float scale, start;
};

// Of fewer numbers, limits take longer than quotients: those of a row of attention 0.04 s an image.
constexpr int64_t kManyNumbers = 256;

// Of n floats whose largest size is `largest`; `load_at(i)` gives 16 of them, zeros behind the end.
// `chosen(i, entries)` gets their entries, which are final unless the fit is 0. Inlined, so that
// what it adds up stays in registers.
template <int32_t known, class LoadAt, class Chosen>
VQ_INLINE Fit codebook_fit(int64_t n, float largest, const Codebook& book, float* room,
                           LoadAt load_at, Chosen chosen) {
  int32_t bits;
  std::memcpy(&bits, &largest, sizeof bits);
  bits &= 0x7F800000;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  // A power of two whose inverse is a normal float, so that products are the quotients.
  const float unit = largest < kLeastScale ? 1.0f : power < 0x1p126f ? power : 0x1p126f;
  const Floats inverse = all(1.0f / unit);
  const float energy_of_x = halving_sum(n, room, [&](int64_t i) VQ_INLINED {
    const Floats x = load_at(i) * inverse;
    return x * x;
  });
  const float start = std::sqrt(energy_of_x / static_cast<float>(n)) * book.reach;
  const float divisor = divisor_of(start);
  Ints squares = all_int(0);
  const auto products = [&](auto sizes, const float* between) VQ_INLINED {
    return halving_sum(n, room, [&](int64_t i) VQ_INLINED {
      const Floats given = load_at(i), x = given * inverse;
      const Floats c = book.entry_at<known>(sizes(size_of(x)), between, given);
      chosen(i, c);
      squares = squares + to_int(c * c);
      return x * c;
    });
  };
  float both;
  if (kTwoWays && n >= kManyNumbers) {
    float limits[VQ_MOST_ENTRIES];
    limits_of(book, divisor, limits);
    both = products([](Floats size) VQ_INLINED { return size; }, limits);
  } else {
    const auto quotients = [&](Floats size) VQ_INLINED { return size / all(divisor); };
    both = products(quotients, book.borders);
  }
  // Behind the end are zeros on the smallest entry.
  const int32_t smallest = static_cast<int32_t>(book.entries[0]);
  const int32_t behind = static_cast<int32_t>((kLanes - n % kLanes) % kLanes);
  const int32_t energy = sum_of(squares) - behind * smallest * smallest;
  const float scale = both / static_cast<float>(energy) * unit;
  const Fit fit{scale, start * unit};
  return fit.scale >= kLeastScale && fit.start >= kLeastScale ? fit : Fit{0.0f, 0.0f};
}

}  // namespace
}  // namespace vq
