// Products of a strip on the tiles of AMX: 32 pixels of a row by 32 outputs, in blocks of 64 inputs
// over all taps; finished as kernel.cpp does, 16 pixels at a time, so every bit is as there.
//
// Runs that are no whole kernel row have no padding behind them: where such a run is no multiple of
// 64 inputs, with upsampling only, the kernel without tiles computes.
#include "convolution/kernel.h"
#include "convolution/tile.h"
#include "linear/amx_tiles.h"

namespace vq {
namespace {

bool fits(const Convolution& job) {
  for (int64_t y = 0; y < job.phases; ++y)
    for (int64_t x = 0; x < job.phases; ++x)
      for (int64_t i = 0; i < job.taps[y][x].count; ++i) {
        const Run& run = job.taps[y][x].runs[i];
        if (!run.whole && run.steps % kSteps) return false;
      }
  return true;
}

template <class Tiles>
void multiply_chunk(Tiles& tiles, const Taps& taps, const Tile& tile, int64_t rows,
                    const uint8_t* weights, int32_t* sums) {
  tiles.clear();
  const int64_t stride = tile.code_stride;
  for (int64_t i = 0; i < taps.count; ++i) {
    const Run& run = taps.runs[i];
    const uint8_t* codes = tile.codes + run.codes;
    const uint8_t* w = weights + run.weights;
    for (int64_t s = 0; s < run.steps; s += kSteps, codes += kBlock, w += kSteps * kStep)
      tiles.step(codes, rows > kTileRows ? codes + kTileRows * stride : nullptr, stride, w);
  }
  tiles.store_sums(sums, rows > kTileRows ? sums + kTileRows * kWidth : nullptr);
}

template <class Tiles>
void piece(Tiles& tiles, const Convolution& job, Tile tile, int64_t pixels, const Taps& taps,
           const uint8_t* weights, PanelMoments* moments) {
  alignas(64) int32_t sums[kRows * kWidth];
  for (; pixels > 0; pixels -= kRows) {
    const int64_t rows = pixels < kRows ? pixels : kRows;
    const int upper = static_cast<int>(rows < kTileRows ? rows : kTileRows);
    tiles.configure(upper, static_cast<int>(rows) - upper);
    multiply_chunk(tiles, taps, tile, rows, weights, sums);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < kVectors && tile.column + v * kLanes < job.args->outputs; ++v)
        finish_vector<1>(job, tile, sums + r * kWidth + v * kLanes, kWidth,
                         tile.column + v * kLanes, moments);
      tile.codes += tile.code_stride;
      tile.y += tile.y_stride;
    }
  }
}

template <class Tiles>
void strip_tiles(const Convolution& job, int64_t image, int64_t strip, int64_t panel) {
  if (!fits(job)) return convolution_kernel(Set<Isa::avx512vnni>{})(job, image, strip, panel);
  const vq_convolution_args& a = *job.args;
  const int64_t first = panel * kPanel;
  const uint8_t* weights = a.packed + panel * job.panel_bytes;
  PanelMoments moments;
  PanelMoments* wanted = job.partial.sum ? &moments : nullptr;
  moments.clear();
  Tiles tiles;
  for (int64_t v = 0; v * kLanes < kPanel && first + v * kLanes < a.outputs; v += kVectors)
    for_pieces(job, image, strip, [&](Tile tile, int64_t pixels, const Taps& taps) {
      tile.column = first + v * kLanes;
      piece(tiles, job, tile, pixels, taps, weights + v * 64, wanted);
    });
  tiles.release();
  keep_moments(job, image, strip, panel, wanted);
}

}  // namespace

StripKernel convolution_amx() { return strip_tiles<RealTiles>; }
StripKernel convolution_amx_emulated() { return strip_tiles<EmulatedTiles>; }

}  // namespace vq
