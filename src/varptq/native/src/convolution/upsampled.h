// 3 x 3 of a map that is upsampled to twice its side: 9 products in place of 36 for the four
// outputs that a pixel makes.
//
// In one direction two outputs meet two pixels each: w0 x[-1] + (w1 + w2) x[0], and
// (w0 + w1) x[0] + w2 x[1]. With D[p] = x[p+1] - x[p] and S = w0 + w1 + w2 these are
// S x[0] - w0 D[-1] and S x[0] + w2 D[0]: three products for both. In two directions there are
// differences of differences.
#pragma once

#include <algorithm>

#include "convolution/words.h"
#include "machine/scratch.h"

namespace vq {
namespace {

constexpr int64_t kKinds = 3;                  // -w0, S and w2
constexpr int64_t kUpParts = kKinds * kKinds;  // 3 of the rows + of the columns

VQ_INLINE void sum_weights(Words a, Words b, Words c, Words* out) {
  out[0] = -a, out[1] = a + b + c, out[2] = c;
}

// (part, pair, outputs, 2), of one vector of the outputs.
void upsampled_kernel(const Convolution& job, const uint8_t* weights, int16_t* kernel) {
  const int64_t apart = word_channels(job.args->inputs) * kColumns;
  for_weights(job, weights, [&](const Words (&g)[kSide][kSide], int64_t channel,
                                int64_t place) VQ_INLINED {
    int16_t* to = kernel + channel * kColumns + place;
    Words columns[kSide][kKinds], parts[kKinds];
    for (int x = 0; x < kSide; ++x) sum_weights(g[0][x], g[1][x], g[2][x], columns[x]);
    for (int y = 0; y < kKinds; ++y) {
      sum_weights(columns[0][y], columns[1][y], columns[2][y], parts);
      for (int x = 0; x < kKinds; ++x) put(to + (kKinds * y + x) * apart, parts[x]);
    }
  });
}

// Of a row of the map, its border too: for each kind of rows its words and their differences from
// one pixel to the next, (kind, 2, W + 2, channels).
struct Differences {
  int16_t* words;
  int64_t channels, length;  // of a row, in words

  int16_t* at(int64_t kind, bool of_columns) const {
    return words + (2 * kind + of_columns) * length;
  }
  // Where a part's products start, for the pixel whose place in the row, with the border, is given.
  const int16_t* of(int64_t part, int64_t pixel) const {
    const int64_t kind = part % kKinds;
    return at(part / kKinds, kind != 1) + (pixel - (kind == 0)) * channels;
  }
};

void fill(const WordStrip& strip, int64_t row, const Differences& out) {
  const Convolution& job = strip.job;
  const uint8_t* codes = strip.map() + row * job.row;
  const int64_t pixels = job.args->width + 2 * kBorder;
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t c = 0; c < strip.channels; c += kTogether) {
      const uint8_t* at = codes + i * job.pixel + c;
      Words above[kHalves], here[kHalves], below[kHalves];
      codes_at(at - job.row, above), codes_at(at, here), codes_at(at + job.row, below);
      for (int64_t half = 0; half < kHalves; ++half) {
        const int64_t to = i * strip.channels + c + half * kWords;
        put(out.at(0, false) + to, here[half] - above[half]);
        put(out.at(1, false) + to, here[half]);
        put(out.at(2, false) + to, below[half] - here[half]);
      }
    }
  for (int64_t kind = 0; kind < kKinds; ++kind) {
    const int16_t* from = out.at(kind, false);
    int16_t* to = out.at(kind, true);
    for (int64_t i = 0; i < (pixels - 1) * strip.channels; ++i)
      to[i] = static_cast<int16_t>(from[i + strip.channels] - from[i]);
  }
}

// Sums of the four outputs of a pixel: two rows, `row` apart, of both columns' sums, `phase` apart.
VQ_INLINE void upsampled_outputs(const int32_t* parts, int32_t* sums, int64_t phase, int64_t row) {
  Ints rows[2][kKinds];
  for (int x = 0; x < kKinds; ++x) {
    const auto part = [&](int y) { return load(parts + (kKinds * y + x) * kPanel); };
    rows[0][x] = part(1) + part(0), rows[1][x] = part(1) + part(2);
  }
  for (int y = 0; y < 2; ++y) {
    store(sums + y * row, rows[y][1] + rows[y][0]);
    store(sums + y * row + phase, rows[y][1] + rows[y][2]);
  }
}

// Sums (2, 2, W, 64) of rows and columns that are first and second; parts (kPixels, 9, 64).
void upsampled_sums(const WordStrip& strip, const WordPanel& panel, const Differences& row,
                    int32_t* parts, int32_t* sums) {
  const int64_t width = strip.job.args->width, phase = width * kPanel;
  for (int64_t first = 0; first < width; first += kPixels) {
    const int64_t count = std::min(kPixels, width - first);
    in_tiles(panel.vectors, [&](int64_t v, auto product) VQ_INLINED {
      const int16_t* kernel = panel.kernel + vector_start(v, kUpParts, strip.channels);
      for (int64_t i = 0; i < kUpParts; ++i)
        product({row.of(i, first + kBorder), strip.channels, strip.channels / 2,
                 kernel + i * strip.channels * kColumns,
                 parts + i * kPanel + v * kLanes, kUpParts * kPanel},
                count);
    });
    for (int64_t i = 0; i < count; ++i)
      for (int64_t v = 0; v < panel.vectors; ++v)
        upsampled_outputs(parts + i * kUpParts * kPanel + v * kLanes,
                          sums + (first + i) * kPanel + v * kLanes, phase, 2 * phase);
  }
}

// Without padding in a direction the first output is the second of the first pixel: one late.
void upsampled_rows(const WordStrip& strip, const WordPanel* panels, int64_t count) {
  const Convolution& job = strip.job;
  const vq_convolution_args& a = *job.args;
  const int64_t late_row = 1 - a.top, late_column = 1 - a.left, phase = a.width * kPanel;
  const int64_t length = (a.width + 2 * kBorder) * strip.channels;
  thread_local Scratch of_words, of_parts, of_sums;
  auto* words = of_words.at_least(2 * kKinds * length * sizeof(int16_t));
  auto* parts =
      static_cast<int32_t*>(of_parts.at_least(kPixels * kUpParts * kPanel * sizeof(int32_t)));
  auto* sums = static_cast<int32_t*>(of_sums.at_least(4 * phase * sizeof(int32_t)));
  const Differences row{static_cast<int16_t*>(words), strip.channels, length};
  for (int64_t p = (strip.first + late_row) / 2; p <= (strip.end - 1 + late_row) / 2; ++p) {
    fill(strip, p + kBorder, row);
    for (int64_t i = 0; i < count; ++i) {
      upsampled_sums(strip, panels[i], row, parts, sums);
      for (int64_t second = 0; second < 2; ++second) {
        const int64_t y = 2 * p - late_row + second;
        if (y < strip.first || y >= strip.end) continue;
        // Even columns before odd ones, as kernel.cpp computes them.
        for (int64_t x = 0; x < 2; ++x) {
          const int64_t at = x + late_column;
          finish_row(strip, panels[i], y, x, 2, (job.out_width - x + 1) / 2,
                     sums + (2 * second + at % 2) * phase + at / 2 * kPanel);
        }
      }
    }
  }
}

}  // namespace
}  // namespace vq
