// Products of a strip of 3 x 3 with fewer multiplications, in words (words.h).
//
//   stride 1    Winograd's F(2 x 2, 3 x 3), 16 products in place of 36 for a square of 4 outputs:
//               4 Y = A' (U * V) A, U = (2 G) w (2 G)', V = B' d B   (Lavin and Gray 2015, eq. 8)
//               with 2 G in place of G, so that all is whole: 4 Y fits 32 bits, and what is too
//               large on the way wraps and comes back
//   upsampled   an output meets 2 x 2 pixels, so 4 sums of weights in place of 9 weights
//
// Sums of integers are exact, whatever their order: P' is that of kernel.cpp, and is finished in the
// same order.
#include <algorithm>

#include "convolution/words.h"
#include "machine/scratch.h"

namespace vq {
namespace {

constexpr int64_t kParts = 16;         // of a square, and of a kernel
constexpr int64_t kMostSummed = 16384;  // inputs of an output, four times whose products fit 32 bits
constexpr int64_t kLeastChannels = 32;  // fewer are padded with too many

struct Strip {
  const Convolution& job;
  int64_t image, first, end;   // rows
  int64_t panel, vectors;      // of 16 outputs
  int64_t channels;            // of words
  PanelMoments* moments;
  int16_t* kernels;            // (vectors, part, pair, 16 outputs, 2)

  int64_t kernel_words() const { return kParts * channels * kLanes; }
  const int16_t* kernel(int64_t vector, int64_t part) const {
    return kernels + vector * kernel_words() + part * channels * kLanes;
  }
};

// Of a row of outputs from x on, `step` apart, 16 of each.
void finish_row(const Strip& strip, int64_t y, int64_t x, int64_t step, int64_t pixels,
                int64_t vector, const int32_t* sums) {
  const Convolution& job = strip.job;
  const int64_t outputs = job.args->outputs;
  Tile tile{nullptr, 0, 0, step * outputs, strip.image,
            strip.panel * kPanel + vector * kLanes};
  const int64_t start = ((strip.image * job.out_height + y) * job.out_width + x) * outputs;
  in_pieces(pixels, [&](auto count, int64_t first) VQ_INLINED {
    tile.y = start + first * tile.y_stride;
    finish_vector<count()>(job, tile, sums + first * kLanes, kLanes, tile.column, strip.moments);
  });
}

// B' of four vectors, and 2 G of three.
VQ_INLINE void filter_codes(Words a, Words b, Words c, Words d, Words* out) {
  out[0] = a - c, out[1] = b + c, out[2] = c - b, out[3] = b - d;
}
VQ_INLINE void filter_weights(Words a, Words b, Words c, Words* out) {
  const Words ends = a + c;
  out[0] = a + a, out[1] = ends + b, out[2] = ends - b, out[3] = c + c;
}

void winograd_kernel(const Convolution& job, const uint8_t* weights, int64_t channels,
                     int16_t* kernel) {
  for_weights(job, weights, [&](const Words (&g)[kSide][kSide], int64_t place) VQ_INLINED {
    Words columns[kSide][4], parts[4];
    for (int x = 0; x < kSide; ++x) filter_weights(g[0][x], g[1][x], g[2][x], columns[x]);
    for (int y = 0; y < 4; ++y) {
      filter_weights(columns[0][y], columns[1][y], columns[2][y], parts);
      for (int x = 0; x < 4; ++x)
        put(kernel + (4 * y + x) * channels * kLanes + place, parts[x]);
    }
  });
}

// V of a square of 4 x 4 pixels, part by part `apart` words apart.
void winograd_square(const uint8_t* const (&pixels)[4][4], int64_t channels, int16_t* words,
                     int64_t apart) {
  for (int64_t c = 0; c < channels; c += kTogether, words += kTogether) {
    EvenOdd d[4][4];
    for (int y = 0; y < 4; ++y)
      for (int x = 0; x < 4; ++x) d[y][x] = codes_at(pixels[y][x] + c);
    const auto square = [&](auto of, int16_t* to) VQ_INLINED {
      Words columns[4][4], parts[4];
      for (int x = 0; x < 4; ++x)
        filter_codes(of(d[0][x]), of(d[1][x]), of(d[2][x]), of(d[3][x]), columns[x]);
      for (int y = 0; y < 4; ++y) {
        filter_codes(columns[0][y], columns[1][y], columns[2][y], columns[3][y], parts);
        for (int x = 0; x < 4; ++x) put(to + (4 * y + x) * apart, parts[x]);
      }
    };
    square([](const EvenOdd& both) { return both.even; }, words);
    square([](const EvenOdd& both) { return both.odd; }, words + kWords);
  }
}

// All squares of the two rows of outputs from y on. Where an output is none, its square has pixels of
// the map all the same.
void winograd_band(const Strip& strip, int64_t y, int64_t squares, int16_t* words) {
  const Convolution& job = strip.job;
  const vq_convolution_args& a = *job.args;
  const uint8_t* map = a.codes + strip.image * job.image;
  for (int64_t square = 0; square < squares; ++square) {
    const uint8_t* pixels[4][4];
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t row = std::min(y + i + kBorder - a.top, a.height + 2 * kBorder - 1);
        const int64_t column =
            std::min(2 * square + j + kBorder - a.left, a.width + 2 * kBorder - 1);
        pixels[i][j] = map + row * job.row + column * job.pixel;
      }
    winograd_square(pixels, strip.channels, words + square * strip.channels,
                    squares * strip.channels);
  }
}

// Y of a square: its place in two rows of sums, `pitch` apart, from parts `apart`.
VQ_INLINE void winograd_outputs(const int32_t* parts, int64_t apart, int32_t* sums, int64_t pitch) {
  Ints rows[2][4];
  for (int x = 0; x < 4; ++x) {
    const auto part = [&](int y) { return load(parts + (4 * y + x) * apart); };
    rows[0][x] = part(0) + part(1) + part(2);
    rows[1][x] = part(1) - part(2) - part(3);
  }
  for (int y = 0; y < 2; ++y) {
    const Ints* m = rows[y];
    store(sums + y * pitch, shift_right<2>(m[0] + m[1] + m[2]));
    store(sums + y * pitch + kLanes, shift_right<2>(m[1] - m[2] - m[3]));
  }
}

void winograd_rows(const Strip& strip) {
  const int64_t squares = (strip.job.out_width + 1) / 2, channels = strip.channels;
  const int64_t part = squares * channels, products = squares * kLanes;
  thread_local Scratch of_words, of_products, of_sums;
  auto* words = static_cast<int16_t*>(of_words.at_least(kParts * part * sizeof(int16_t)));
  auto* parts = static_cast<int32_t*>(of_products.at_least(kParts * products * sizeof(int32_t)));
  auto* sums = static_cast<int32_t*>(of_sums.at_least(4 * products * sizeof(int32_t)));
  const WordRuns run{{0, 0}, 1, channels / 2};
  for (int64_t y = strip.first; y < strip.end; y += 2) {
    winograd_band(strip, y, squares, words);
    for (int64_t v = 0; v < strip.vectors; ++v) {
      for (int64_t i = 0; i < kParts; ++i)
        in_pieces(squares, [&](auto count, int64_t first) VQ_INLINED {
          multiply_words<count()>(words + i * part + first * channels, channels, run,
                                  strip.kernel(v, i), parts + i * products + first * kLanes);
        });
      for (int64_t s = 0; s < squares; ++s)
        winograd_outputs(parts + s * kLanes, products, sums + 2 * s * kLanes, 2 * products);
      for (int64_t row = y; row < std::min(y + 2, strip.end); ++row)
        finish_row(strip, row, 0, 1, strip.job.out_width, v, sums + (row - y) * 2 * products);
    }
  }
}

// Which of the two pixels in a direction tap `tap` meets, of an output of this phase.
int64_t pixel_of(int64_t tap, int64_t before, int64_t phase) {
  return upsampled_offset(tap, before, phase) - upsampled_offset(0, before, phase);
}

// Part 8 py + 4 px + 2 y + x: of phases py and px, for pixels y and x.
void upsampled_kernel(const Convolution& job, const uint8_t* weights, int64_t channels,
                      int16_t* kernel) {
  const vq_convolution_args& a = *job.args;
  for_weights(job, weights, [&](const Words (&g)[kSide][kSide], int64_t place) VQ_INLINED {
    for (int64_t phase = 0; phase < 4; ++phase) {
      Words parts[2][2] = {};
      for (int64_t ky = 0; ky < kSide; ++ky)
        for (int64_t kx = 0; kx < kSide; ++kx)
          parts[pixel_of(ky, a.top, phase / 2)][pixel_of(kx, a.left, phase % 2)] += g[ky][kx];
      for (int64_t i = 0; i < 4; ++i)
        put(kernel + (4 * phase + i) * channels * kLanes + place, parts[i / 2][i % 2]);
    }
  });
}

void upsampled_rows(const Strip& strip) {
  const Convolution& job = strip.job;
  const vq_convolution_args& a = *job.args;
  const int64_t channels = strip.channels, width = a.width + 2 * kBorder;
  const auto row_of = [&](int64_t y) { return y / 2 + upsampled_offset(0, a.top, y % 2) + kBorder; };
  const int64_t first = row_of(strip.first), last = row_of(strip.end - 1) + 1;
  thread_local Scratch of_words, of_sums;
  const int64_t pixels = (last + 1 - first) * width;
  auto* words = static_cast<int16_t*>(of_words.at_least(pixels * channels * sizeof(int16_t)));
  auto* sums = static_cast<int32_t*>(of_sums.at_least(a.width * kLanes * 2 * sizeof(int32_t)));
  const uint8_t* codes = a.codes + strip.image * job.image + first * job.row;
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t c = 0; c < channels; c += kTogether) {
      const EvenOdd both = codes_at(codes + i * job.pixel + c);
      put(words + i * channels + c, both.even), put(words + i * channels + c + kWords, both.odd);
    }
  const WordRuns runs{{0, width * channels}, 2, channels};
  for (int64_t y = strip.first; y < strip.end; ++y)
    for (int64_t phase = 0; phase < 2; ++phase) {
      const int64_t count = (job.out_width - phase + 1) / 2;
      const int64_t column = upsampled_offset(0, a.left, phase) + kBorder;
      const int16_t* row = words + ((row_of(y) - first) * width + column) * channels;
      for (int64_t v = 0; v < strip.vectors; ++v) {
        in_pieces(count, [&](auto together, int64_t at) VQ_INLINED {
          multiply_words<together()>(row + at * channels, channels, runs,
                                     strip.kernel(v, y % 2 * 8 + phase * 4), sums + at * kLanes);
        });
        finish_row(strip, y, phase, 2, count, v, sums);
      }
    }
}

void strip_words(const Convolution& job, int64_t image, int64_t strip, int64_t panel) {
  const vq_convolution_args& a = *job.args;
  const int64_t first = strip * job.strip_rows, columns = a.outputs - panel * kPanel;
  const int64_t vectors = (std::min(columns, kPanel) + kLanes - 1) / kLanes;
  PanelMoments moments;
  moments.clear();
  Strip whole{job, image, first, std::min(first + job.strip_rows, job.out_height), panel, vectors,
              word_channels(a.inputs), job.partial.sum ? &moments : nullptr, nullptr};
  thread_local Scratch scratch;
  const int64_t bytes = vectors * whole.kernel_words() * sizeof(int16_t);
  whole.kernels = static_cast<int16_t*>(scratch.at_least(bytes));
  // Weights of 0 for the padding of channels.
  if (whole.channels != job.pixel) std::memset(whole.kernels, 0, bytes);
  for (int64_t v = 0; v < vectors; ++v) {
    const uint8_t* weights = a.packed + panel * job.panel_bytes + v * 64;
    (a.upsample ? upsampled_kernel : winograd_kernel)(job, weights, whole.channels,
                                                      whole.kernels + v * whole.kernel_words());
  }
  a.upsample ? upsampled_rows(whole) : winograd_rows(whole);
  keep_moments(job, image, strip, panel, whole.moments);
}

}  // namespace

StripKernel convolution_words(const Convolution& job) {
  const vq_convolution_args& a = *job.args;
  const bool fits = a.kernel_height == kSide && a.kernel_width == kSide && a.stride == 1 &&
                    a.inputs >= kLeastChannels && a.inputs * kSide * kSide <= kMostSummed;
  return fits ? strip_words : nullptr;
}

}  // namespace vq
