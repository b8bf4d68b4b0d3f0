// Filters and draw of one row of logits. Written on lanes.h, compiled once per instruction set.
//
//   top-k: the largest T with at least k logits >= T                 stays: logit >= T
//   top-p: the smallest T whose logits <= T have more than 1 - p of the probability   stays: >= T
//
// Both borders are found by halving an interval of the integers that sort as floats do: nothing is
// sorted, and sums run over all candidates in lanes, in an order that the row alone decides.
#include "sampler/kernel.h"

#include <cstdint>

#include "lanes/vmath.h"

namespace vq {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr int32_t kInfinityBits = 0x7F800000;

// Integers in the order of floats (without NaN; -0 must have become 0), and back.
inline int32_t rank_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >= 0 ? bits : bits ^ 0x7FFFFFFF;
}
inline float at_rank(int32_t rank) {
  const int32_t bits = rank >= 0 ? rank : rank ^ 0x7FFFFFFF;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline int64_t padded_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline void pad(float* x, int64_t count, float value) {
  for (int64_t i = count; i < padded_lanes(count); ++i) x[i] = value;
}

struct Extremes {
  float low, high;
};

// Guided logits of a row. False for NaN or +infinity, or where all are -infinity.
inline bool read_row(const vq_sample_args& args, int64_t row, float* logits, Extremes& extremes) {
  const int64_t count = args.vocabulary;
  std::memcpy(logits, args.logits + row * count, static_cast<size_t>(count) * sizeof(float));
  pad(logits, count, kMinusInfinity);
  if (args.unconditional) {
    const float* other = args.unconditional + row * count;
    const Floats up = all(args.guidance_plus_one), down = all(args.guidance);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      store(logits + i, up * load(logits + i) - down * load(other + i));
    for (; i < count; ++i)
      logits[i] = args.guidance_plus_one * logits[i] - args.guidance * other[i];
  }
  Floats low = all(-kMinusInfinity), high = all(kMinusInfinity);
  Ints positive = all_int(INT32_MIN), magnitude = all_int(0);
  for (int64_t i = 0; i < padded_lanes(count); i += kLanes) {
    const Floats x = load(logits + i) + all(0.0f);  // -0 becomes 0
    positive = larger(positive, bits_of(x));
    magnitude = larger(magnitude, bits_of(x) & all_int(0x7FFFFFFF));
    low = smaller(low, x);
    high = larger(high, x);
    store(logits + i, x);
  }
  extremes = {smallest_of(low), largest_of(high)};
  const bool nan = largest_of(magnitude) > kInfinityBits;
  return !nan && largest_of(positive) < kInfinityBits && extremes.high > kMinusInfinity;
}

inline int64_t count_not_below(const float* x, int64_t count, float limit) {
  // Counts below 2^24 are exact in float32, in any order.
  const Floats one = all(1.0f), none = all(0.0f), border = all(limit);
  Floats even = none, odd = none;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    even = even + where_less(load(x + i), border, none, one);
    odd = odd + where_less(load(x + i + kLanes), border, none, one);
  }
  for (; i < count; i += kLanes) even = even + where_less(load(x + i), border, none, one);
  return static_cast<int64_t>(sum_of(even + odd));
}

// The largest T with at least k logits >= T, or one that keeps the same k.
inline float top_k_border(const float* logits, int64_t count, int64_t k, Extremes extremes) {
  int64_t low = rank_of(extremes.low), high = int64_t{rank_of(extremes.high)} + 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t found = count_not_below(logits, count, at_rank(static_cast<int32_t>(middle)));
    if (found == k) return at_rank(static_cast<int32_t>(middle));
    (found > k ? low : high) = middle;
  }
  return at_rank(static_cast<int32_t>(low));
}

// Candidates: logits not below `limit`, in the order of their index.
inline int64_t choose(const SampleScratch& s, int64_t count, float limit) {
  int64_t n = 0;
  for (int64_t i = 0; i < count; ++i) {
    s.chosen[n] = s.logits[i];
    s.index[n] = static_cast<int32_t>(i);
    n += s.logits[i] >= limit;
  }
  pad(s.chosen, n, kMinusInfinity);
  return n;
}

// Sum of the weights of candidates <= limit, or < limit.
template <bool or_equal>
inline float mass(const SampleScratch& s, int64_t padded, float limit) {
  const Floats border = all(limit), none = all(0.0f);
  Floats sum = none;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Floats x = load(s.chosen + i), w = load(s.weights + i);
    sum = sum + (or_equal ? where_less(border, x, none, w) : where_less(x, border, w, none));
  }
  return sum_of(sum);
}

// Drops candidates by top-p; returns how many stay.
inline int64_t apply_top_p(const SampleScratch& s, int64_t count, float share, float largest) {
  const int64_t padded = padded_lanes(count);
  Floats sum = all(0.0f);
  for (int64_t i = 0; i < padded; i += kLanes)
    store(s.weights + i, exp_of(load(s.chosen + i) - all(largest)));
  pad(s.weights, count, 0.0f);
  for (int64_t i = 0; i < padded; i += kLanes) sum = sum + load(s.weights + i);
  const float limit = share * sum_of(sum);
  float smallest = largest;
  for (int64_t i = 0; i < count; ++i) smallest = s.chosen[i] < smallest ? s.chosen[i] : smallest;
  int64_t low = rank_of(smallest), high = rank_of(largest);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (mass<true>(s, padded, at_rank(static_cast<int32_t>(middle))) > limit)
      high = middle;
    else
      low = middle + 1;
  }
  const float border = at_rank(static_cast<int32_t>(low));
  // Of equal logits at the border as many go as still fit into the share, the last ones first.
  float weight = 0.0f;
  int64_t equal = 0, staying = 1;
  for (int64_t i = 0; i < count; ++i) {
    if (s.chosen[i] == border) {
      weight = s.weights[i];
      ++equal;
    }
  }
  const float below = mass<false>(s, padded, border);
  while (staying < equal && below + static_cast<float>(equal - staying) * weight > limit) ++staying;
  int64_t n = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float x = s.chosen[i];
    s.chosen[n] = x;
    s.index[n] = s.index[i];
    if (x == border) n += staying-- > 0;
    n += x > border;
  }
  return n;
}

inline void write_filtered(const vq_sample_args& args, int64_t row, const SampleScratch& s,
                           int64_t count) {
  float* out = args.filtered + row * args.vocabulary;
  for (int64_t i = 0; i < args.vocabulary; ++i) out[i] = kMinusInfinity;
  for (int64_t i = 0; i < count; ++i) out[s.index[i]] = s.chosen[i];
}

// The candidate with the largest logit plus temperature times Gumbel noise, the first of equals.
inline int64_t draw(const vq_sample_args& args, int64_t row, const SampleScratch& s,
                    int64_t count) {
  const float* uniform = args.uniform + row * args.vocabulary;
  for (int64_t i = 0; i < count; ++i) s.weights[i] = uniform[s.index[i]];
  pad(s.weights, count, 0.5f);
  const Floats none = all(0.0f), temperature = all(args.temperature);
  for (int64_t i = 0; i < padded_lanes(count); i += kLanes) {
    const Floats exponential = none - log_one_minus(load(s.weights + i));
    const Floats noise = none - log_of(exponential);
    store(s.weights + i, noise * temperature + load(s.chosen + i));
  }
  int64_t best = 0;
  for (int64_t i = 1; i < count; ++i) best = s.weights[i] > s.weights[best] ? i : best;
  return s.index[best];
}

bool sample_row(const vq_sample_args& args, int64_t row, const SampleScratch& scratch) {
  const int64_t vocabulary = args.vocabulary;
  Extremes extremes;
  if (!read_row(args, row, scratch.logits, extremes)) return false;
  float border = kMinusInfinity;
  if (args.top_k > 0 && args.top_k < vocabulary)
    border = top_k_border(scratch.logits, padded_lanes(vocabulary), args.top_k, extremes);
  int64_t count = choose(scratch, vocabulary, border);
  if (args.top_p > 0 && args.top_p < 1)
    count = apply_top_p(scratch, count, static_cast<float>(1 - args.top_p), extremes.high);
  if (args.filtered) write_filtered(args, row, scratch, count);
  if (args.ids) args.ids[row] = draw(args, row, scratch, count);
  return true;
}

}  // namespace

SampleRow sample_kernel(Set<kIsa>) { return sample_row; }

}  // namespace vq
