// Rows of a map of floats: their moments, and their codes; in lanes of 16 channels, compiled once
// per instruction set.
#include <cstring>

#include "convolution/kernel.h"
#include "lanes/doubles.h"
#include "lanes/lanes_more.h"
#include "lanes/vmath.h"

namespace vq {
namespace {

// The channels of a pixel from `c` on; zeros behind the last.
inline Floats channels_at(const float* pixel, int64_t c, int64_t channels) {
  if (c + kLanes <= channels) return load(pixel + c);
  float lanes[kLanes] = {};
  std::memcpy(lanes, pixel + c, (channels - c) * sizeof(float));
  return load(lanes);
}

// `out` has room for the channels rounded up to 16. A vector of channels at a time, all pixels: the
// sums stay in registers.
void row_moments(const float* x, int64_t width, int64_t channels, const vq_moments& out) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    Floats low = channels_at(x, c, channels), high = low;
    Doubles sums = widened(all(0.0f)), squares = sums;
    for (int64_t i = 0; i < width; ++i) {
      const Floats v = channels_at(x + i * channels, c, channels);
      const Doubles wide = widened(v);
      sums = sums + wide;
      squares = squares + wide * wide;
      low = smaller(low, v);
      high = larger(high, v);
    }
    store(out.sum + c, sums), store(out.square + c, squares);
    store(out.low + c, low), store(out.high + c, high);
  }
}

// x / (1 + exp(-x)); below -87, where it is nothing beside any step, that of -87.
inline Floats silu_of(Floats x) {
  const Floats within = larger(x, all(-87.0f));
  return within / (all(1.0f) + exp_within(larger(all(0.0f) - within, all(-87.0f))));
}

template <bool norm, bool silu>
void coded_row(const float* x, int64_t width, int64_t channels, const CodeRule& rule,
               uint8_t* codes) {
  const Floats scale = all(rule.scale), zero = all(rule.zero), top = all(255.0f);
  const int64_t bytes = channel_bytes(channels);
  for (int64_t i = 0; i < width; ++i, x += channels, codes += bytes)
    for (int64_t c = 0; c < channels; c += kLanes) {
      Floats v = channels_at(x, c, channels);
      if (norm) v = v * load(rule.gain + c) + load(rule.shift + c);
      if (silu) v = silu_of(v);
      const Floats q = smaller(larger(rounded(v / scale) + zero, all(0.0f)), top);
      if (c + kLanes <= channels) {
        store_bytes(codes + c, to_int(q));
        continue;
      }
      uint8_t lanes[kLanes];
      store_bytes(lanes, to_int(q));
      for (int64_t j = c; j < bytes; ++j) codes[j] = j < channels ? lanes[j - c] : 0;
    }
}

void row_codes(const float* x, int64_t width, int64_t channels, const CodeRule& rule,
               uint8_t* codes) {
  if (rule.gain && rule.silu)
    coded_row<true, true>(x, width, channels, rule, codes);
  else if (rule.gain)
    coded_row<true, false>(x, width, channels, rule, codes);
  else if (rule.silu)
    coded_row<false, true>(x, width, channels, rule, codes);
  else
    coded_row<false, false>(x, width, channels, rule, codes);
}

float one_silu(float x) {
  float lanes[kLanes];
  store(lanes, silu_of(all(x)));
  return lanes[0];
}

}  // namespace

MapKernels map_kernels(Set<kIsa>) { return {row_moments, row_codes, one_silu}; }

}  // namespace vq
