// A row of floats to codes, in lanes of 16; compiled once per instruction set.
//
//   row -> prologue -> minus mean -> rotation -> range, scale, codes and sums per group
//
// The definitions are those of varptq.quant.affine, sign_split and transforms, to the bit: true
// division, rounding half to even, and their order of operations. Tails of fewer than 16 numbers go
// through a small buffer filled with a number that does not matter where they end up.
#include "quantize/kernel.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "lanes/lanes_more.h"
#include "lanes/vmath.h"
#include "quantize/codebook.h"
#include "quantize/scales.h"

namespace vq {
namespace {

inline Floats load_tail(const float* x, int64_t count, float fill) {
  float buffer[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) buffer[i] = i < count ? x[i] : fill;
  return load(buffer);
}

// function(Floats) over n floats, the last vector filled up with `fill`.
template <class Function>
inline void for_lanes(const float* x, int64_t n, float fill, Function function) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) function(load(x + i));
  if (i < n) function(load_tail(x + i, n - i, fill));
}

// Sum over n floats of term(x), in four interleaved sums of 16 lanes: the order is part of the
// definition, and four are needed to keep the adders busy.
template <class Term>
inline float ordered_sum(const float* x, int64_t n, float fill, Term term) {
  Floats sums[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) sums[j] = sums[j] + term(load(x + i + j * kLanes));
  int next = 0;
  for_lanes(x + i, n - i, fill, [&](Floats v) {
    sums[next] = sums[next] + term(v);
    ++next;
  });
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// 16 of n floats from i on, filled up with zeros.
inline Floats lanes_at(const float* x, int64_t i, int64_t n) {
  return i + kLanes <= n ? load(x + i) : load_tail(x + i, n - i, 0.0f);
}

// LayerNorm of one row, modulated as its image is.
struct Norm {
  const float *gain, *shift;
  Floats centre, factor;

  Norm(const vq_quantize_args& a, int64_t m, const float* row) {
    const int64_t n = a.width, image = m / a.rows_per_image;
    gain = a.gain + image * a.modulation_stride;
    shift = a.shift + image * a.modulation_stride;
    const float width = static_cast<float>(n);
    const float mean = ordered_sum(row, n, 0.0f, [](Floats v) { return v; }) / width;
    centre = all(mean);
    const float squares = ordered_sum(row, n, mean, [&](Floats v) {
      const Floats d = v - centre;
      return d * d;
    });
    factor = all(1.0f / std::sqrt(squares / width + a.eps));
  }
  Floats of(Floats x, int64_t i, int64_t n) const {
    return (x - centre) * factor * (all(1.0f) + lanes_at(gain, i, n)) + lanes_at(shift, i, n);
  }
};

template <int stride>
inline Floats butterfly(Floats x) {
  float signs[kLanes];
#if defined(__AVX2__)
  // A product with 1 or -1 is exact, so this is the same sum, in one instruction.
  for (int i = 0; i < kLanes; ++i) signs[i] = i & stride ? -1.0f : 1.0f;
  return fused(x, load(signs), exchanged<stride>(x));
#else
  for (int i = 0; i < kLanes; ++i) signs[i] = i & stride ? -0.0f : 0.0f;
  return exchanged<stride>(x) + flipped(x, load(signs));
#endif
}

// Strides 1 to 8, as far as they are shorter than the block.
inline Floats small_butterflies(Floats x, int64_t block) {
  if (block > 1) x = butterfly<1>(x);
  if (block > 2) x = butterfly<2>(x);
  if (block > 4) x = butterfly<4>(x);
  if (block > 8) x = butterfly<8>(x);
  return x;
}

// So many strides are done while what they combine, two to that power of vectors, is in registers.
#if defined(VQ_LANES512)
constexpr int kMostLevels = 3;
#else
constexpr int kMostLevels = 2;
#endif

// Vectors `levels` strides of a rotation combine; `at` reads, `put` writes the k-th of them.
template <int levels, class At, class Put>
VQ_INLINE void combine(At at, Put put) {
  constexpr int kCount = 1 << levels;
  Floats v[kCount];
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) v[k] = at(k);
#pragma GCC unroll 8
  for (int stride = 1; stride < kCount; stride *= 2)
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k)
      if (!(k & stride)) {
        const Floats a = v[k], b = v[k + stride];
        v[k] = a + b;
        v[k + stride] = a - b;
      }
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) put(k, v[k]);
}

template <class Function>
VQ_INLINE void with_levels(int levels, Function function) {
  if (levels == 0) return function(std::integral_constant<int, 0>());
  if (levels == 1) return function(std::integral_constant<int, 1>());
  if (kMostLevels == 2 || levels == 2) return function(std::integral_constant<int, 2>());
  return function(std::integral_constant<int, kMostLevels>());
}

// `at(i)`: 16 values from i on. Strides come in the order of their lengths; the last pass scales.
template <class At>
inline void rotate(float* row, int64_t n, int64_t block, const float* signs, At at) {
  const int64_t span = block < kLanes ? kLanes : block;
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  int left = 0;
  while (kLanes << left < span) ++left;
  for (int64_t stride = kLanes, first = 1; first || left; first = 0) {
    const int levels = left < kMostLevels ? left : kMostLevels;
    left -= levels;
    const Floats factor = all(left ? 1.0f : scale);
    with_levels(levels, [&](auto count) VQ_INLINED {
      constexpr int kLevels = decltype(count)::value;
      const int64_t step = stride << kLevels;
      for (int64_t i = 0; i < n; i += step)
        for (int64_t j = i; j < i + stride; j += kLanes) {
          const auto put = [&](int k, Floats v) VQ_INLINED {
            store(row + j + k * stride, v * factor);
          };
          if (first)
            combine<kLevels>(
                [&](int k) VQ_INLINED {
                  const int64_t from = j + k * stride;
                  const Floats v = flipped(at(from), load(signs + (from & (span - 1))));
                  return small_butterflies(v, block);
                },
                put);
          else
            combine<kLevels>([&](int k) VQ_INLINED { return load(row + j + k * stride); }, put);
        }
    });
    stride <<= levels;
  }
}

inline const float* load_row(const vq_quantize_args& a, int64_t m, float* room) {
  if (a.x_type == VQ_FLOAT32) return static_cast<const float*>(a.x) + m * a.row_stride;
  const uint16_t* x = static_cast<const uint16_t*>(a.x) + m * a.row_stride;
  int64_t i = 0;
  for (; i + kLanes <= a.width; i += kLanes) store(room + i, load_bfloat16(x + i));
  for (; i < a.width; ++i) room[i] = from_bfloat16(x[i]);
  return room;
}

// x after `prologue`, less its mean and rotated, at `row`, which may be where x is.
template <class Prologue>
inline void prepare(const vq_quantize_args& a, int64_t m, const float* x, float* row,
                    const float* signs, Prologue prologue) {
  const int64_t n = a.width;
  const float* mean = nullptr;
  if (a.means) mean = a.means + (a.mean_row ? a.mean_row[m % a.rows_per_image] : 0) * n;
  const auto at = [&](int64_t i) VQ_INLINED {
    const Floats v = prologue(lanes_at(x, i, n), i);
    return mean ? v - lanes_at(mean, i, n) : v;
  };
  if (a.hadamard > 1) return rotate(row, n, a.hadamard, signs, at);
  for (int64_t i = 0; i < n; i += kLanes) store(row + i, at(i));
}

// The row that is quantized: the caller's own where nothing changes it.
inline const float* prepared(const vq_quantize_args& a, int64_t m, float* row,
                             const float* signs) {
  const float* x = load_row(a, m, row);
  if (a.prologue == VQ_NORM) {
    const Norm norm(a, m, x);
    prepare(a, m, x, row, signs,
            [&](Floats v, int64_t i) VQ_INLINED { return norm.of(v, i, a.width); });
  } else if (a.prologue == VQ_GELU) {
    prepare(a, m, x, row, signs, [](Floats v, int64_t) VQ_INLINED { return gelu_of(v); });
  } else if (a.means || a.hadamard > 1) {
    prepare(a, m, x, row, signs, [](Floats v, int64_t) VQ_INLINED { return v; });
  } else {
    return x;
  }
  return row;
}

// Where the codes of one group go: codes and sums of its first segment, and what divides.
struct Target {
  uint8_t* codes;
  int32_t* sum;
  float scale, zero, low, high;  // code = clamp(rint(x / scale) + zero, low, high)
  bool negate;                   // codes are the negatives of these numbers
};

// The codes of one segment, its padding and its sum.
template <class CodeOf>
inline void segment_codes(const float* x, int64_t n, uint8_t* codes, int32_t* sum, CodeOf code_of) {
  Ints sums = all_int(0);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Ints code = code_of(load(x + i));
    sums = sums + code;
    store_bytes(codes + i, code);
  }
  int32_t rest = 0;
  if (i < n) {
    uint8_t buffer[kLanes];
    store_bytes(buffer, code_of(load_tail(x + i, n - i, 0.0f)));
    for (int64_t j = i; j < n; ++j) {
      codes[j] = buffer[j - i];
      rest += buffer[j - i];
    }
  }
  for (int64_t j = n; j % 64; ++j) codes[j] = 0;
  *sum = sum_of(sums) + rest;
}

// Those of a group, whose first segment has these codes and this sum.
template <class CodeOf>
inline void segments(const vq_quantize_args& a, const float* x, uint8_t* codes, int32_t* sum,
                     CodeOf code_of) {
  const int64_t stride = (a.segment + 63) / 64 * 64;
  for (int64_t s = 0; s < a.group / a.segment; ++s)
    segment_codes(x + s * a.segment, a.segment, codes + s * stride, sum + s, code_of);
}

inline void group_codes(const vq_quantize_args& a, const float* x, const Target& t) {
  const Floats scale = all(t.scale), zero = all(t.zero), low = all(t.low), high = all(t.high);
  segments(a, x, t.codes, t.sum, [&](Floats v) {
    const Floats q = larger(smaller(rounded(v / scale) + zero, high), low);
    return t.negate ? to_int(all(0.0f) - q) : to_int(q);
  });
}

struct Range {
  float low, high;  // with 0 inside
  bool finite;
};

inline Range range_of(const float* x, int64_t n) {
  Floats low = all(0.0f), high = all(0.0f);
  FiniteCheck check;
  for_lanes(x, n, 0.0f, [&](Floats v) {
    low = smaller(low, v);
    high = larger(high, v);
    check.see(v);
  });
  return {smallest_of(low), largest_of(high), !check.failed()};
}

// Rows of the outputs: index of the first of row m's, and how many group and segment entries a row
// has.
struct Place {
  int64_t row, groups, segments, stride;
};

inline void affine_group(const vq_quantize_args& a, const Place& p, int64_t g, const float* x,
                         const Range& range) {
  const float top = static_cast<float>((1 << a.num_bits) - 1);
  // Halves of both sides, as affine_grid has them: high - low may overflow.
  float scale = (0.5f * range.high - 0.5f * range.low) / (0.5f * top);
  scale = scale < kLeastScale ? kEmptyScale : scale;
  float zero = -std::nearbyint(range.low / scale);
  zero = zero < 0.0f ? 0.0f : zero > top ? top : zero;
  const int64_t first = g * (a.group / a.segment);
  a.scale[p.row * p.groups + g] = scale;
  a.zero_point[p.row * p.groups + g] = static_cast<int32_t>(zero);
  group_codes(a, x,
              {a.codes + (p.row * p.segments + first) * p.stride,
               a.sum + p.row * p.segments + first, scale, zero, 0.0f, top, false});
}

inline void sign_split_group(const vq_quantize_args& a, const Place& p, int64_t g, const float* x,
                             const Range& range) {
  const float levels = static_cast<float>((1 << (a.num_bits - 1)) - 1);
  const int64_t first = g * (a.group / a.segment);
  for (int side = 0; side < 2; ++side) {
    const int64_t row = p.row + side;
    float scale = (side ? -range.low : range.high) / levels;
    scale = scale < kSignSplitFloor ? kSignSplitFloor : scale;
    a.scale[row * p.groups + g] = side ? -scale : scale;
    a.zero_point[row * p.groups + g] = 0;
    group_codes(a, x,
                {a.codes + (row * p.segments + first) * p.stride, a.sum + row * p.segments + first,
                 scale, 0.0f, side ? -levels : 0.0f, side ? 0.0f : levels, side == 1});
  }
}

template <int32_t known>
inline void codebook_group(const vq_quantize_args& a, const Place& p, int64_t g, const float* x,
                           const Range& range, const Codebook& book, float* room) {
  const float largest = -range.low > range.high ? -range.low : range.high;
  const int64_t first = p.row * p.segments + g * (a.group / a.segment), n = a.group;
  uint8_t* codes = a.codes + first * p.stride;
  const Ints zero = all_int(kCodebookZero);
  Ints sums = all_int(0);
  const auto load_at = [&](int64_t i) VQ_INLINED {
    return i + kLanes <= n ? load(x + i) : load_tail(x + i, n - i, 0.0f);
  };
  const auto chosen = [&](int64_t i, Floats entries) VQ_INLINED {
    const Ints code = to_int(entries) + zero;
    sums = sums + code;
    store_bytes(codes + i, code);
  };
  // Where a group is one segment, entries go straight to their place, which has room to 64.
  const bool direct = a.group == a.segment;
  const auto nothing = [](int64_t, Floats) VQ_INLINED {};
  const Fit fit = direct ? codebook_fit<known>(n, largest, book, room, load_at, chosen)
                         : codebook_fit<known>(n, largest, book, room, load_at, nothing);
  a.scale[p.row * p.groups + g] = fit.scale;
  a.zero_point[p.row * p.groups + g] = kCodebookZero;
  if (!direct || fit.scale == 0.0f) {
    const Floats divisor = all(divisor_of(fit.start));
    return segments(a, x, codes, a.sum + first,
                    [&](Floats v) { return to_int(book.nearest(v, divisor)) + zero; });
  }
  // Behind the end are zeros on the smallest entry.
  const int32_t behind = static_cast<int32_t>((kLanes - n % kLanes) % kLanes);
  a.sum[first] = sum_of(sums) - behind * (kCodebookZero + static_cast<int32_t>(book.entries[0]));
  for (int64_t j = n; j % 64; ++j) codes[j] = 0;
}

inline bool quantize_row(const vq_quantize_args& a, int64_t m, float* room, const float* signs) {
  const float* row = prepared(a, m, room, signs);
  if (a.values) std::memcpy(a.values + m * a.width, row, a.width * sizeof(float));
  const Codebook book(a.codebook);
  Place place{};
  place.row = m * (a.sign_split ? 2 : 1);
  place.groups = a.width / a.group;
  place.segments = a.width / a.segment;
  place.stride = (a.segment + 63) / 64 * 64;
  for (int64_t g = 0; g < place.groups; ++g) {
    const float* x = row + g * a.group;
    const Range range = range_of(x, a.group);
    if (!range.finite) return false;
    if (book)
      book.with_known([&](auto known) {
        codebook_group<known()>(a, place, g, x, range, book, room + a.width + kLanes);
      });
    else if (a.sign_split)
      sign_split_group(a, place, g, x, range);
    else
      affine_group(a, place, g, x, range);
  }
  return true;
}

}  // namespace

RowKernel quantize_kernel(Set<kIsa>) { return quantize_row; }

}  // namespace vq
