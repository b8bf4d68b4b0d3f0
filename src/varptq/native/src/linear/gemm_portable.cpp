// The product kernel in plain loops, which say what all product kernels compute.
#include <algorithm>
#include <cmath>

#include "lanes/bfloat16.h"
#include "linear/gemm.h"

namespace vq {
namespace {

int32_t weight_at(const Job& job, int64_t panel, int64_t block, int64_t inside, int64_t column) {
  const bool nibbles = job.args->weight_bits <= 4;
  const uint8_t* step = job.args->packed + panel * job.panel_bytes +
                        ((nibbles ? block / 2 : block) * (kBlock / 4) + inside / 4) * kStep;
  const uint8_t byte = step[column * 4 + inside % 4];
  if (nibbles) {
    const int32_t code = block % 2 ? byte >> 4 : byte & 15;
    return job.args->table ? job.args->table[code] : code;
  }
  return static_cast<int8_t>(byte);
}

// P' of one row, column and segment.
int32_t product(const Job& job, int64_t m, int64_t n, int64_t s) {
  const vq_linear_args& a = *job.args;
  const uint8_t* codes = a.codes + m * job.code_stride;
  int32_t sum = 0, weights = 0;
  for (int64_t i = 0; i < a.segment; ++i) {
    const int64_t b = s * job.segment_blocks + i / kBlock;
    const int32_t w = weight_at(job, n / kPanel, b, i % kBlock, n % kPanel);
    sum += w * codes[b * kBlock + i % kBlock];
    weights += w;
  }
  const int32_t za = a.zero_point[m * job.row_groups + s / job.row_span];
  const int32_t zc = a.panel_zero[panel_index(n, s / job.weight_span, job.weight_groups)];
  const int32_t rest = a.sum[m * job.segments + s] - static_cast<int32_t>(a.segment) * za;
  // Three terms of at most 255 x 128 an input: no intermediate overflows up to kLongestSegment.
  return sum - za * weights - zc * rest;
}

// y of one row of codes, before bias where `plain`.
float output(const Job& job, int64_t m, int64_t n, float bias) {
  const vq_linear_args& a = *job.args;
  if (job.segments == 1)
    return std::fma(static_cast<float>(product(job, m, n, 0)), a.scale[m] * a.panel_scale[n], bias);
  float sum = 0, part = 0;
  for (int64_t s = 0; s < job.segments; ++s) {
    const float p = static_cast<float>(product(job, m, n, s));
    const float scale = a.panel_scale[panel_index(n, s / job.weight_span, job.weight_groups)];
    if (job.row_groups == 1) {
      sum = std::fma(p, scale, sum);
      continue;
    }
    part = std::fma(p, a.scale[m * job.row_groups + s / job.row_span], part);
    if ((s + 1) % job.weight_span == 0) {
      sum = std::fma(part, scale, sum);
      part = 0;
    }
  }
  return job.row_groups == 1 ? std::fma(sum, a.scale[m], bias) : sum + bias;
}

void store(const vq_linear_args& a, int64_t m, int64_t n, float y) {
  if (a.y_type == VQ_BFLOAT16)
    static_cast<uint16_t*>(a.y)[m * a.y_stride + n] = to_bfloat16(y);
  else
    static_cast<float*>(a.y)[m * a.y_stride + n] = y;
}

}  // namespace

void panel_portable(const Job& job, int64_t panel, int64_t first, int64_t last, uint8_t*) {
  const vq_linear_args& a = *job.args;
  const int64_t end = std::min(a.outputs, (panel + 1) * kPanel);
  const int64_t step = a.pairs && !a.products ? 2 : 1;
  for (int64_t m = first; m < last; m += step)
    for (int64_t n = panel * kPanel; n < end; ++n) {
      if (a.products) {
        for (int64_t s = 0; s < job.segments; ++s)
          a.products[(m * a.outputs + n) * job.segments + s] = product(job, m, n, s);
        continue;
      }
      const int64_t row = m / step;
      const int64_t table = a.bias_row ? a.bias_row[row % a.rows_per_image] : 0;
      const float bias = a.bias ? a.bias[table * a.outputs + n] : 0.0f;
      const float y = step == 1
                          ? output(job, m, n, bias)
                          : (output(job, m, n, 0.0f) + output(job, m + 1, n, 0.0f)) + bias;
      store(a, row, n, y);
    }
}

}  // namespace vq
