// Products of a strip in lanes of 16 outputs; compiled once per instruction set.
//
//   a tile: R pixels of a row x V vectors of 16 outputs, all sums in registers over all taps
//   AVX-512: 6 x 4, 8 x 3 or 12 x 2 = 24 sums     AVX2: 4 x 1; 3 x 3 in kernel_words.cpp
//   NEON: 4 x 1 = 16 registers of sums
//
// A tap's codes lie in the map at one distance from pixel to pixel, whatever stride, padding and
// upsampling are: a kernel row is one run of inputs or, with upsampling, two.
#include "convolution/kernel.h"

#include "convolution/tile.h"
#include "linear/tile.h"

namespace vq {
namespace {

template <int R, int V>
__attribute__((noinline)) void multiply_taps(Sums<R, V>& sums, const Taps& taps,
                                             const uint8_t* codes, int64_t stride,
                                             const uint8_t* weights) {
  Registers<TileProduct, R, V> registers;
  registers.template begin<false>({});
  for (int64_t i = 0; i < taps.count; ++i) {
    const Run& run = taps.runs[i];
    registers.add(codes + run.codes, stride, weights + run.weights, run.steps,
                  [](Ints x, const uint8_t*) { return x; });
  }
  registers.settle();
  registers.leave(sums);
}

// A piece of a row in tiles of R pixels, the rest in a lower one.
template <int R, int V>
void tiles(const Convolution& job, Tile tile, int64_t pixels, const Taps& taps,
           const uint8_t* weights, PanelMoments* moments) {
  for (; pixels >= R; pixels -= R) {
    Sums<R, V> sums;
    multiply_taps<R, V>(sums, taps, tile.codes, tile.code_stride, weights);
    for (int v = 0; v < V; ++v)
      finish_vector<R>(job, tile, sums.of[0] + v * kLanes, V * kLanes, tile.column + v * kLanes,
                       moments);
    tile.codes += R * tile.code_stride;
    tile.y += R * tile.y_stride;
  }
  constexpr int kNext = R > 2 ? (R - 1) / 2 * 2 : 1;
  if constexpr (R > 1) {
    if (pixels > 0) tiles<kNext, V>(job, tile, pixels, taps, weights, moments);
  }
}

template <int R, int V>
void columns(const Convolution& job, int64_t image, int64_t strip, int64_t column,
             const uint8_t* weights, PanelMoments* moments) {
  for_pieces(job, image, strip, [&](Tile tile, int64_t pixels, const Taps& taps) {
    tile.column = column;
    tiles<R, V>(job, tile, pixels, taps, weights, moments);
  });
}

void strip_panel(const Convolution& job, int64_t image, int64_t strip, int64_t panel) {
  const vq_convolution_args& a = *job.args;
  const uint8_t* weights = a.packed + panel * job.panel_bytes;
  const int64_t first = panel * kPanel, count = a.outputs - first < kPanel ? a.outputs - first
                                                                            : kPanel;
  const int64_t vectors = (count + kLanes - 1) / kLanes;
  PanelMoments moments;
  PanelMoments* wanted = job.partial.sum ? &moments : nullptr;
  moments.clear();
#if defined(VQ_LANES512)
  switch (vectors) {
    case 4:
      columns<6, 4>(job, image, strip, first, weights, wanted);
      break;
    case 3:
      columns<8, 3>(job, image, strip, first, weights, wanted);
      break;
    case 2:
      columns<12, 2>(job, image, strip, first, weights, wanted);
      break;
    default:
      columns<12, 1>(job, image, strip, first, weights, wanted);
  }
#else
#if defined(VQ_VNNI256)
  constexpr int kPixels = 6;
#else
  constexpr int kPixels = 4;
#endif
  for (int64_t v = 0; v < vectors; ++v)
    columns<kPixels, 1>(job, image, strip, first + v * kLanes, weights + v * 64, wanted);
#endif
  keep_moments(job, image, strip, panel, wanted);
}

}  // namespace

StripKernel convolution_kernel(Set<kIsa>) { return strip_panel; }

}  // namespace vq
