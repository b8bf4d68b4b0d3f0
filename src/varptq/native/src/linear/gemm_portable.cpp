// The product kernel in plain loops, which say what all product kernels compute. Those over the 64
// outputs of a panel are the inner ones, so that a compiler makes vectors of them on any processor.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "lanes/bfloat16.h"
#include "linear/gemm.h"
#include "machine/scratch.h"

namespace vq {
namespace {

int8_t weight_at(const Job& job, int64_t panel, int64_t block, int64_t inside, int64_t column) {
  const bool nibbles = job.args->weight_bits <= 4;
  const uint8_t* step = job.args->packed + panel * job.panel_bytes +
                        ((nibbles ? block / 2 : block) * (kBlock / 4) + inside / 4) * kStep;
  const uint8_t byte = step[column * 4 + inside % 4];
  if (!nibbles) return static_cast<int8_t>(byte);
  const int code = block % 2 ? byte >> 4 : byte & 15;
  return static_cast<int8_t>(job.args->table ? job.args->table[code] : code);
}

// A panel by inputs, 64 outputs each, and the sums of its weights by segments.
struct Panel {
  int64_t index;
  const int8_t* weights;
  const int32_t* sums;
};

Panel unpack(const Job& job, int64_t panel, uint8_t* room) {
  thread_local Scratch scratch;
  const int64_t inputs = job.segment_blocks * kBlock, bytes = job.segments * kPanel * 4;
  auto* weights = reinterpret_cast<int8_t*>(room);
  auto* sums = static_cast<int32_t*>(scratch.at_least(bytes));
  std::memset(sums, 0, bytes);
  for (int64_t i = 0; i < job.blocks * kBlock; ++i)
    for (int64_t n = 0; n < kPanel; ++n) {
      const int8_t w = weight_at(job, panel, i / kBlock, i % kBlock, n);
      weights[i * kPanel + n] = w;
      if (i % inputs < job.args->segment) sums[i / inputs * kPanel + n] += w;
    }
  return {panel, weights, sums};
}

// P' of one row and segment, of all outputs of a panel.
void product(const Job& job, const Panel& panel, int64_t m, int64_t s, int32_t* out) {
  const vq_linear_args& a = *job.args;
  const int64_t begin = s * job.segment_blocks * kBlock;
  const uint8_t* codes = a.codes + m * job.code_stride + begin;
  const int8_t* weights = panel.weights + begin * kPanel;
  std::fill_n(out, kPanel, 0);
  for (int64_t i = 0; i < a.segment; ++i, weights += kPanel) {
    const int16_t code = codes[i];
    // At most 255 x 128, which 16 bits hold.
    for (int64_t n = 0; n < kPanel; ++n) out[n] += static_cast<int16_t>(code * weights[n]);
  }
  const int32_t za = a.zero_point[m * job.row_groups + s / job.row_span];
  const int32_t rest = a.sum[m * job.segments + s] - static_cast<int32_t>(a.segment) * za;
  const int32_t* sums = panel.sums + s * kPanel;
  const int64_t group = s / job.weight_span;
  const int32_t* zero = a.panel_zero + panel_index(panel.index * kPanel, group, job.weight_groups);
  // Three terms of at most 255 x 128 an input: no intermediate overflows up to kLongestSegment.
  for (int64_t n = 0; n < kPanel; ++n) out[n] = out[n] - za * sums[n] - zero[n] * rest;
}

// y of one row of codes and all outputs of a panel, before bias where that is null.
void outputs(const Job& job, const Panel& panel, int64_t m, const float* bias, float* y) {
  const vq_linear_args& a = *job.args;
  int32_t p[kPanel];
  float part[kPanel] = {};
  const auto after = [bias](int64_t n) { return bias ? bias[n] : 0.0f; };
  const float* scales = a.panel_scale + panel_index(panel.index * kPanel, 0, job.weight_groups);
  if (job.segments == 1) {
    product(job, panel, m, 0, p);
    for (int64_t n = 0; n < kPanel; ++n)
      y[n] = std::fma(static_cast<float>(p[n]), a.scale[m] * scales[n], after(n));
    return;
  }
  std::fill_n(y, kPanel, 0.0f);
  for (int64_t s = 0; s < job.segments; ++s) {
    product(job, panel, m, s, p);
    const float* scale = scales + s / job.weight_span * kPanel;
    if (job.row_groups == 1) {
      for (int64_t n = 0; n < kPanel; ++n)
        y[n] = std::fma(static_cast<float>(p[n]), scale[n], y[n]);
      continue;
    }
    const float row = a.scale[m * job.row_groups + s / job.row_span];
    for (int64_t n = 0; n < kPanel; ++n)
      part[n] = std::fma(static_cast<float>(p[n]), row, part[n]);
    if ((s + 1) % job.weight_span) continue;
    for (int64_t n = 0; n < kPanel; ++n) y[n] = std::fma(part[n], scale[n], y[n]), part[n] = 0;
  }
  for (int64_t n = 0; n < kPanel; ++n)
    y[n] = job.row_groups == 1 ? std::fma(y[n], a.scale[m], after(n)) : y[n] + after(n);
}

void store(const vq_linear_args& a, int64_t m, int64_t n, float y) {
  if (a.y_type == VQ_BFLOAT16)
    static_cast<uint16_t*>(a.y)[m * a.y_stride + n] = to_bfloat16(y);
  else
    static_cast<float*>(a.y)[m * a.y_stride + n] = y;
}

}  // namespace

void panel_portable(const Job& job, int64_t index, int64_t first, int64_t last, uint8_t* room) {
  const vq_linear_args& a = *job.args;
  const int64_t begin = index * kPanel, count = std::min(a.outputs - begin, kPanel);
  const Panel panel = unpack(job, index, room);
  if (a.products) {
    int32_t p[kPanel];
    for (int64_t m = first; m < last; ++m)
      for (int64_t s = 0; s < job.segments; ++s) {
        product(job, panel, m, s, p);
        for (int64_t n = 0; n < count; ++n)
          a.products[(m * a.outputs + begin + n) * job.segments + s] = p[n];
      }
    return;
  }
  float bias[kPanel] = {}, y[kPanel], minus[kPanel];
  const int64_t step = a.pairs ? 2 : 1;
  for (int64_t m = first; m < last; m += step) {
    const int64_t row = m / step;
    const int64_t table = a.bias_row ? a.bias_row[row % a.rows_per_image] : 0;
    if (a.bias) std::copy_n(a.bias + table * a.outputs + begin, count, bias);
    outputs(job, panel, m, a.pairs ? nullptr : bias, y);
    if (a.pairs) {
      outputs(job, panel, m + 1, nullptr, minus);
      for (int64_t n = 0; n < kPanel; ++n) y[n] = (y[n] + minus[n]) + bias[n];
    }
    for (int64_t n = 0; n < count; ++n) store(a, row, begin + n, y[n]);
  }
}

}  // namespace vq
