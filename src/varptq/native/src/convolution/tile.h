// What follows the products of a tile of pixels, and which tiles make a strip: for the kernel of
// kernel.cpp, with tiles of R pixels x V vectors of 16 outputs, and that of AMX.
//
//   y = float(P') (sa sw) + bias (+ residual), its moments per output while it is in registers
#pragma once

#include "convolution/kernel.h"
#include "lanes/doubles.h"
#include "linear/tile_finish.h"

namespace vq {
namespace {

// The moments of a panel's outputs over a strip, in the order in which pixels are computed.
struct PanelMoments {
  alignas(64) double sum[kPanel];
  alignas(64) double square[kPanel];
  alignas(64) float low[kPanel];
  alignas(64) float high[kPanel];

  void clear() {
    for (int64_t i = 0; i < kPanel; ++i) {
      sum[i] = square[i] = 0.0;
      low[i] = 3.402823466e38f, high[i] = -3.402823466e38f;
    }
  }
  // `count` vectors, of pixels one after another.
  template <int R>
  VQ_INLINE void see(int64_t at, const Floats* y) {
    Doubles sums = load(sum + at), squares = load(square + at);
    Floats lowest = load(low + at), highest = load(high + at);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Doubles wide = widened(y[r]);
      sums = sums + wide;
      squares = squares + wide * wide;
      lowest = smaller(lowest, y[r]);
      highest = larger(highest, y[r]);
    }
    store(sum + at, sums), store(square + at, squares);
    store(low + at, lowest), store(high + at, highest);
  }
  void keep(const vq_moments& out, int64_t at) const {
    std::memcpy(out.sum + at, sum, sizeof sum);
    std::memcpy(out.square + at, square, sizeof square);
    std::memcpy(out.low + at, low, sizeof low);
    std::memcpy(out.high + at, high, sizeof high);
  }
};

// Those of a strip and panel to where they are combined; null where none are wanted.
inline void keep_moments(const Convolution& job, int64_t image, int64_t strip, int64_t panel,
                         const PanelMoments* moments) {
  const int64_t panels = padded(job.args->outputs) / kPanel;
  const int64_t at = ((image * job.strips + strip) * panels + panel) * kPanel;
  if (moments) moments->keep(job.partial, at);
}

// Where a tile is: its first pixel's codes, the outputs it makes, and how far apart its pixels are.
struct Tile {
  const uint8_t* codes;
  int64_t code_stride;   // bytes
  int64_t y, y_stride;   // floats
  int64_t image, column;
  int32_t centre;        // what codes were lessened by
};

// How far ahead outputs are fetched into the cache: a panel's lines of a map are too far apart for
// the hardware to do it, and stores wait for them in order.
constexpr int64_t kAheadPixels = 8;

// One vector of outputs of R pixels; `count` of its 16 exist.
template <int R>
VQ_INLINE void finish_vector(const Convolution& job, const Tile& tile, const int32_t* sums,
                             int64_t row_length, int64_t column, PanelMoments* moments) {
  const vq_convolution_args& a = *job.args;
  const int64_t count = a.outputs - column < kLanes ? a.outputs - column : kLanes;
  const Floats scale = all(a.scale[tile.image]) * load(a.panel_scale + column);
  const Floats bias = load(a.panel_bias + column);
  const Ints zero = all_int(a.zero_point[tile.image] - tile.centre);
  const Ints correction = times(zero, load(a.panel_sum + column));
  Floats out[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const int64_t at = tile.y + r * tile.y_stride + column;
    const int64_t next = at + kAheadPixels * tile.y_stride;
    if (a.residual) __builtin_prefetch(a.residual + next);
    if (a.residual != a.y) __builtin_prefetch(a.y + next, 1);
    Floats y = to_float(load(sums + r * row_length) - correction) * scale + bias;
    if (count == kLanes) {
      if (a.residual) y = y + load(a.residual + at);
      store(a.y + at, y);
    } else {
      float lanes[kLanes] = {};
      if (a.residual) std::memcpy(lanes, a.residual + at, count * sizeof(float));
      if (a.residual) y = y + load(lanes);
      store(lanes, y);
      std::memcpy(a.y + at, lanes, count * sizeof(float));
    }
    out[r] = y;
  }
  if (moments) moments->see<R>(column % kPanel, out);
}

// function(tile, pixels, taps) for the rows of a strip, in pieces whose pixels follow the same
// taps.
template <class Function>
VQ_INLINE void for_pieces(const Convolution& job, int64_t image, int64_t strip, Function function) {
  const vq_convolution_args& a = *job.args;
  const int64_t first = strip * job.strip_rows;
  const int64_t end = first + job.strip_rows < job.out_height ? first + job.strip_rows
                                                              : job.out_height;
  const uint8_t* map = a.codes + image * job.image;
  for (int64_t y = first; y < end; ++y)
    for (int64_t phase = 0; phase < job.phases; ++phase) {
      const int64_t in_row = (job.phases == 2 ? y / 2 : y * a.stride) + kBorder;
      const int64_t pixels = (job.out_width - phase + job.phases - 1) / job.phases;
      Tile tile;
      tile.codes = map + in_row * job.row + kBorder * job.pixel;
      tile.code_stride = a.stride * job.pixel;
      tile.y = ((image * job.out_height + y) * job.out_width + phase) * a.outputs;
      tile.y_stride = job.phases * a.outputs;
      tile.image = image;
      tile.centre = kLeftShift;
      function(tile, pixels, job.taps[job.phases == 2 ? y % 2 : 0][phase]);
    }
}

}  // namespace
}  // namespace vq
