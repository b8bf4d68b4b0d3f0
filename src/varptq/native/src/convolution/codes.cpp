// Driver of the codes of a map: checks, moments where the producer gave none, the scale of each
// image, and tasks of a row each.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "convolution/kernel.h"
#include "lanes/lanes.h"
#include "machine/pool.h"
#include "machine/scratch.h"
#include "quantize/scales.h"

namespace vq {
namespace {

// Where SiLU is lowest.
constexpr float kLowestSilu = -1.2784645f;
constexpr float kTopCode = 255.0f;

bool valid(const vq_map_codes_args* a) {
  if (!a || a->images < 0 || a->height < 1 || a->width < 1 || a->channels < 1) return false;
  const vq_moments& m = a->moments;
  if (a->has_moments && (!m.sum || !m.square || !m.low || !m.high)) return false;
  if (a->groups < 0 || (a->groups && (a->channels % a->groups || !a->gain || !a->shift)))
    return false;
  return a->x && a->codes && a->scale && a->zero_point;
}

int64_t lanes_of(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

vq_moments moments_at(double* room, int64_t count) {
  auto* floats = reinterpret_cast<float*>(room + 2 * count);
  return {room, room + count, floats, floats + count};
}

vq_moments shifted(const vq_moments& m, int64_t by) {
  return {m.sum + by, m.square + by, m.low + by, m.high + by};
}

// Of all images, rows in ascending order: in parts, one for each row of each image.
void compute_moments(const vq_map_codes_args& a, const MapKernels& kernels, const vq_moments& out) {
  thread_local Scratch scratch;
  const int64_t wide = lanes_of(a.channels), rows = a.images * a.height;
  auto* room = static_cast<double*>(scratch.at_least(rows * wide * 3 * sizeof(double)));
  const vq_moments parts = moments_at(room, rows * wide);
  auto task = [&](int64_t row, int) {
    kernels.moments(a.x + row * a.width * a.channels, a.width, a.channels,
                    shifted(parts, row * wide));
  };
  parallel_for(rows, usable_threads(a.threads), task);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < a.channels; ++c) {
      const int64_t from = row * wide + c, to = row / a.height * a.channels + c;
      const bool first = row % a.height == 0;
      out.sum[to] = first ? parts.sum[from] : out.sum[to] + parts.sum[from];
      out.square[to] = first ? parts.square[from] : out.square[to] + parts.square[from];
      out.low[to] = first ? parts.low[from] : std::min(out.low[to], parts.low[from]);
      out.high[to] = first ? parts.high[from] : std::max(out.high[to], parts.high[from]);
    }
}

// a and b of every channel of one image.
void affine_of_norm(const vq_map_codes_args& a, const vq_moments& m, float* gain, float* shift) {
  const int64_t width = a.channels / a.groups;
  const double count = static_cast<double>(width * a.height * a.width);
  for (int64_t g = 0; g < a.groups; ++g) {
    double sum = 0, square = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += m.sum[c], square += m.square[c];
    const double mean = sum / count, variance = std::max(0.0, square / count - mean * mean);
    const float rate = static_cast<float>(1.0 / std::sqrt(variance + a.eps));
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      gain[c] = a.gain[c] * rate;
      shift[c] = a.shift[c] - static_cast<float>(mean) * gain[c];
    }
  }
}

struct Range {
  float low, high;
};

// Of what is coded, before SiLU: v rises or falls with x, so its ends are at those of x.
Range range_of(const vq_map_codes_args& a, const vq_moments& m, const CodeRule& rule) {
  Range range{INFINITY, -INFINITY};
  for (int64_t c = 0; c < a.channels; ++c)
    for (float x : {m.low[c], m.high[c]}) {
      const float v = rule.gain ? x * rule.gain[c] + rule.shift[c] : x;
      range.low = std::min(range.low, v);
      range.high = std::max(range.high, v);
    }
  return range;
}

void choose_scale(CodeRule& rule, Range range, const MapKernels& kernels) {
  if (rule.silu)
    range = {kernels.silu(std::min(std::max(kLowestSilu, range.low), range.high)),
             kernels.silu(range.high)};
  range = {std::min(range.low, 0.0f), std::max(range.high, 0.0f)};
  const float scale = (0.5f * range.high - 0.5f * range.low) / (0.5f * kTopCode);
  rule.scale = scale < kLeastScale ? kEmptyScale : scale;
  rule.zero = std::min(std::max(-std::nearbyint(range.low / rule.scale), 0.0f), kTopCode);
}

bool finite(const vq_moments& m, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c)
    if (!std::isfinite(m.sum[c])) return false;
  return true;
}

// Border and rows of one image.
void code_image(const vq_map_codes_args& a, const MapKernels& kernels, const CodeRule& rule,
                int64_t image) {
  const int64_t pixel = channel_bytes(a.channels), row = (a.width + 2 * kBorder) * pixel;
  uint8_t* map = a.codes + image * (a.height + 2 * kBorder) * row;
  const int zero = static_cast<int>(rule.zero);
  std::memset(map, zero, row);
  std::memset(map + (a.height + kBorder) * row, zero, row);
  const float* x = a.x + image * a.height * a.width * a.channels;
  auto task = [&](int64_t y, int) {
    uint8_t* to = map + (y + kBorder) * row;
    std::memset(to, zero, pixel);
    std::memset(to + row - pixel, zero, pixel);
    kernels.codes(x + y * a.width * a.channels, a.width, a.channels, rule, to + pixel);
  };
  parallel_for(a.height, usable_threads(a.threads), task);
}

int run(const vq_map_codes_args& a) {
  thread_local Scratch kept, affine;
  const MapKernels kernels = on_vector_isa([](auto set) { return map_kernels(set); });
  vq_moments moments = a.moments;
  if (!a.has_moments) {
    const int64_t count = a.images * a.channels;
    moments = moments_at(static_cast<double*>(kept.at_least(count * 3 * sizeof(double))), count);
    compute_moments(a, kernels, moments);
  }
  const int64_t wide = lanes_of(a.channels);
  auto* room = static_cast<float*>(affine.at_least(2 * wide * sizeof(float)));
  std::memset(room, 0, 2 * wide * sizeof(float));
  for (int64_t image = 0; image < a.images; ++image) {
    const vq_moments m = shifted(moments, image * a.channels);
    if (!finite(m, a.channels)) return VQ_NON_FINITE;
    CodeRule rule{};
    rule.silu = a.silu;
    if (a.groups) {
      affine_of_norm(a, m, room, room + wide);
      rule.gain = room, rule.shift = room + wide;
    }
    choose_scale(rule, range_of(a, m, rule), kernels);
    if (!std::isfinite(rule.scale)) return VQ_NON_FINITE;
    a.scale[image] = rule.scale;
    a.zero_point[image] = static_cast<int32_t>(rule.zero);
    code_image(a, kernels, rule, image);
  }
  return VQ_OK;
}

}  // namespace
}  // namespace vq

extern "C" int vq_map_codes(const vq_map_codes_args* a) {
  return vq::valid(a) ? vq::run(*a) : VQ_BAD_ARGUMENT;
}
