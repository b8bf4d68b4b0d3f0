// Winograd's F(4 x 4, 3 x 3): 36 products in place of 144 for a square of 16 outputs, exact.
//
//   576 Y = A' ((24 G w (24 G)') * (B' d B)) A     (Lavin and Gray 2015, eq. 8 and section 4.3)
//
// All is whole. What does not fit 32 bits wraps on the way: 576 Y is known modulo 2^32, and 64 Y
// by the inverse of 9, which is Y where Y is below 2^25. 224 channels are summed at a time, since
// 224 x 9 x 128 x 128 is less. The largest words are 100 x 128 of codes and 144 x 128 of weights.
#pragma once

#include <algorithm>

#include "convolution/words.h"
#include "machine/scratch.h"

namespace vq {
namespace {

constexpr int64_t kSquare = 4;          // outputs of a square, a side
constexpr int64_t kPoints = 6;          // pixels that it meets, a side
constexpr int64_t kParts = kPoints * kPoints;
constexpr int64_t kMostSummed = 224;    // channels
constexpr int32_t kInverseOf9 = 954437177;  // modulo 2^32

// Channels in sums of their own, equal but for the last.
struct Sections {
  int64_t channels, count, most;
  explicit Sections(int64_t of) : channels(of) {
    count = (of + kMostSummed - 1) / kMostSummed;
    most = word_channels((of + count - 1) / count);
  }
  int64_t at(int64_t i) const { return std::min(most, channels - i * most); }
};

VQ_INLINE void filter_weights(Words a, Words b, Words c, Words* out) {
  const Words ends = a + c, far = a + c * 4;
  out[0] = a * 6, out[5] = c * 12;
  out[1] = (ends + b) * -4, out[2] = (ends - b) * -4;
  out[3] = far + b * 2, out[4] = far - b * 2;
}

VQ_INLINE void filter_codes(const Words (&d)[kPoints], Words* out) {
  const Words a = d[4] - d[2] * 4, b = d[3] - d[1] * 4;
  const Words c = d[4] - d[2], e = (d[3] - d[1]) * 2;
  out[0] = (d[0] - d[2]) * 4 + c;
  out[1] = a + b, out[2] = a - b;
  out[3] = c + e, out[4] = c - e;
  out[5] = (d[1] - d[3]) * 4 + d[5] - d[3];
}

VQ_INLINE void filter_sums(const Ints (&m)[kPoints], Ints* out) {
  const Ints p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], t = m[3] - m[4];
  out[0] = m[0] + p + r;
  out[1] = q + shift_left<1>(t);
  out[2] = p + shift_left<2>(r);
  out[3] = q + shift_left<1>(shift_left<2>(t) + m[5]);
}

// (section, part, pair, outputs, 2), of one vector of the outputs.
void winograd_kernel(const Convolution& job, const uint8_t* weights, int16_t* kernel) {
  const Sections sections(word_channels(job.args->inputs));
  for_weights(job, weights, [&](const Words (&g)[kSide][kSide], int64_t channel,
                                int64_t place) VQ_INLINED {
    const int64_t section = channel / sections.most, within = channel - section * sections.most;
    int16_t* to = kernel + (section * sections.most * kParts + within) * kColumns + place;
    const int64_t apart = sections.at(section) * kColumns;
    Words columns[kSide][kPoints], parts[kPoints];
    for (int x = 0; x < kSide; ++x) filter_weights(g[0][x], g[1][x], g[2][x], columns[x]);
    for (int y = 0; y < kPoints; ++y) {
      filter_weights(columns[0][y], columns[1][y], columns[2][y], parts);
      for (int x = 0; x < kPoints; ++x) put(to + (kPoints * y + x) * apart, parts[x]);
    }
  });
}

// The pixels of a square: of each row and column their distance from the map's start.
struct Pixels {
  const uint8_t* map;
  int64_t row[kPoints], column[kPoints];
  const uint8_t* at(int64_t y, int64_t x) const { return map + row[y] + column[x]; }
};

// The parts of a square, `apart` words from one to the next.
void winograd_square(const Pixels& pixels, int64_t first, int64_t channels, int16_t* words,
                     int64_t apart) {
  for (int64_t c = 0; c < channels; c += kTogether) {
    Words columns[kHalves][kPoints][kPoints];
    for (int x = 0; x < kPoints; ++x) {
      Words d[kHalves][kPoints], both[kHalves];
      for (int y = 0; y < kPoints; ++y) {
        codes_at(pixels.at(y, x) + first + c, both);
        for (int half = 0; half < kHalves; ++half) d[half][y] = both[half];
      }
      for (int half = 0; half < kHalves; ++half) filter_codes(d[half], columns[half][x]);
    }
    for (int half = 0; half < kHalves; ++half)
      for (int y = 0; y < kPoints; ++y) {
        Words d[kPoints], parts[kPoints];
        for (int x = 0; x < kPoints; ++x) d[x] = columns[half][x][y];
        filter_codes(d, parts);
        for (int x = 0; x < kPoints; ++x)
          put(words + (kPoints * y + x) * apart + c + half * kWords, parts[x]);
      }
  }
}

// Rows of squares, in words of each section: (section, part, square, channels).
struct Band {
  const WordStrip& strip;
  Sections sections;
  int64_t across, squares;  // of a row, and of all
  int64_t apart;  // words from a part to the next; not a power of two, or they share sets
  int16_t* words;

  Band(const WordStrip& of) : strip(of), sections(of.channels) {
    const int64_t rows = (of.end - of.first + kSquare - 1) / kSquare;
    across = (of.job.out_width + kSquare - 1) / kSquare;
    squares = across * std::min(std::max<int64_t>(1, 2 * kPixels / across), rows);
    apart = squares * sections.most + kWords;
  }
  int64_t bytes() const { return sections.count * kParts * apart * sizeof(int16_t); }
  int16_t* section(int64_t i) const { return words + i * kParts * apart; }
  // Sums of a row of outputs, and where a square's are.
  int64_t row() const { return across * kSquare * kPanel; }
  int64_t sums_of(int64_t square) const {
    return square / across * kSquare * row() + square % across * kSquare * kPanel;
  }
};

// Where an output is none, its square has pixels of the map all the same.
void fill(const Band& band, int64_t first, int64_t squares) {
  const Convolution& job = band.strip.job;
  const vq_convolution_args& a = *job.args;
  const auto inside = [](int64_t at, int64_t side) { return std::min(at, side + 2 * kBorder - 1); };
  Pixels pixels{band.strip.map(), {}, {}};
  for (int64_t square = 0; square < squares; ++square) {
    const int64_t y = first + square / band.across * kSquare + kBorder - a.top;
    const int64_t x = square % band.across * kSquare + kBorder - a.left;
    for (int64_t i = 0; i < kPoints; ++i) {
      pixels.row[i] = inside(y + i, a.height) * job.row;
      pixels.column[i] = inside(x + i, a.width) * job.pixel;
    }
    for (int64_t s = 0; s < band.sections.count; ++s)
      winograd_square(pixels, s * band.sections.most, band.sections.at(s),
                      band.section(s) + square * band.sections.at(s), band.apart);
  }
}

// 16 outputs of a square from its parts, to rows of sums; those of a later section are added.
VQ_INLINE void winograd_outputs(const int32_t* parts, bool later, int32_t* sums, int64_t row) {
  Ints rows[kSquare][kPoints], m[kPoints], out[kSquare];
  for (int x = 0; x < kPoints; ++x) {
    for (int y = 0; y < kPoints; ++y) m[y] = load(parts + (kPoints * y + x) * kPanel);
    filter_sums(m, out);
    for (int y = 0; y < kSquare; ++y) rows[y][x] = out[y];
  }
  for (int y = 0; y < kSquare; ++y) {
    filter_sums(rows[y], out);
    for (int x = 0; x < kSquare; ++x) {
      int32_t* to = sums + y * row + x * kPanel;
      const Ints whole = shift_right<6>(times(out[x], all_int(kInverseOf9)));
      store(to, later ? whole + load(to) : whole);
    }
  }
}

// Sums (rows of outputs, 4 across, 64) of a panel; parts (kPixels, 36, 64).
void winograd_sums(const Band& band, const WordPanel& panel, int64_t squares, int32_t* parts,
                   int32_t* sums) {
  for (int64_t first = 0; first < squares; first += kPixels)
    for (int64_t s = 0; s < band.sections.count; ++s) {
      const int64_t count = std::min(kPixels, squares - first), channels = band.sections.at(s);
      const int16_t* words = band.section(s) + first * channels;
      in_tiles(panel.vectors, [&](int64_t v, auto product) VQ_INLINED {
        const int16_t* kernel = panel.kernel + vector_start(v, kParts, band.strip.channels) +
                                s * band.sections.most * kParts * kColumns;
        for (int64_t i = 0; i < kParts; ++i)
          product({words + i * band.apart, channels, channels / 2,
                   kernel + i * channels * kColumns, parts + i * kPanel + v * kLanes,
                   kParts * kPanel},
                  count);
      });
      for (int64_t i = 0; i < count; ++i)
        for (int64_t v = 0; v < panel.vectors; ++v)
          winograd_outputs(parts + i * kParts * kPanel + v * kLanes, s > 0,
                           sums + band.sums_of(first + i) + v * kLanes, band.row());
    }
}

void winograd_rows(const WordStrip& strip, const WordPanel* panels, int64_t count) {
  Band band(strip);
  thread_local Scratch of_words, of_parts, of_sums;
  band.words = static_cast<int16_t*>(of_words.at_least(band.bytes()));
  auto* parts =
      static_cast<int32_t*>(of_parts.at_least(kPixels * kParts * kPanel * sizeof(int32_t)));
  auto* sums = static_cast<int32_t*>(
      of_sums.at_least(band.squares * kSquare * kSquare * kPanel * sizeof(int32_t)));
  const int64_t most = band.squares / band.across * kSquare;
  for (int64_t y = strip.first; y < strip.end; y += most) {
    const int64_t rows = std::min(most, strip.end - y);
    const int64_t squares = (rows + kSquare - 1) / kSquare * band.across;
    fill(band, y, squares);
    for (int64_t i = 0; i < count; ++i) {
      winograd_sums(band, panels[i], squares, parts, sums);
      for (int64_t at = 0; at < rows; ++at)
        finish_row(strip, panels[i], y + at, 0, 1, strip.job.out_width, sums + at * band.row());
    }
  }
}

}  // namespace
}  // namespace vq
