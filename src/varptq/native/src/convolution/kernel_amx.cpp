// Products of a strip on the tiles of AMX: 32 pixels of a row by 32 outputs, in blocks of 64 inputs
// over all taps; finished as kernel.cpp does, 8 pixels at a time, so every bit is as there.
//
// The panel's weights are copied by tiles first (linear/amx_tiles.h says why). What is copied are
// granules, runs of inputs that all outputs meet whole: a kernel row or, with upsampling, a tap.
// Each is padded to blocks with weights of 0, for which codes of the next pixel do no harm.
#include "convolution/kernel.h"
#include "convolution/tile.h"
#include "linear/amx_tiles.h"
#include "machine/scratch.h"

namespace vq {
namespace {

constexpr int kPixels = 8;  // finished together

// The copy of a panel: its pair `pair` starts at pair * pair_bytes, granule after granule.
struct Copy {
  int64_t inputs;          // of a granule
  int64_t blocks;          // of a granule
  int64_t row_weights;     // packed bytes of a kernel row
  int64_t in_row, granules;
  int64_t pair_bytes;

  explicit Copy(const Convolution& job) {
    const vq_convolution_args& a = *job.args;
    const int64_t row = a.kernel_width * job.pixel;
    inputs = a.upsample ? job.pixel : row;
    blocks = padded(inputs) / kBlock;
    row_weights = padded(row) * kPanel;
    in_row = row / inputs;
    granules = a.kernel_height * in_row;
    pair_bytes = granules * blocks * kVectors * kTileBytes;
  }
  int64_t bytes() const { return kPanel / kWidth * pair_bytes; }
  // Bytes from the start of a pair to the granule whose packed weights start at `weights`.
  int64_t at(int64_t weights) const {
    const int64_t granule = weights / row_weights * in_row +
                            weights % row_weights / (inputs * kPanel);
    return granule * blocks * kVectors * kTileBytes;
  }
  void fill(const uint8_t* panel, uint8_t* copy) const {
    alignas(64) static const uint8_t zeros[64] = {};
    for (int64_t g = 0; g < granules; ++g) {
      const uint8_t* from = panel + g / in_row * row_weights + g % in_row * inputs * kPanel;
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t i = 0; i < kSteps * kStep; i += 64) {
          const bool is = b * kBlock + i / kStep * 4 < inputs;
          std::memcpy(copy + place_in_copy(g * blocks + b, i, granules * blocks),
                      is ? from + b * kSteps * kStep + i : zeros, 64);
        }
    }
  }
};

template <class Tiles>
void multiply_chunk(Tiles& tiles, const Taps& taps, const Tile& tile, int64_t rows,
                    const Copy& copy, const uint8_t* weights, int32_t* sums) {
  tiles.clear();
  const int64_t stride = tile.code_stride;
  for (int64_t i = 0; i < taps.count; ++i) {
    const Run& run = taps.runs[i];
    const uint8_t* w = weights + copy.at(run.weights);
    for (int64_t done = 0; done < run.steps * 4; done += copy.inputs) {
      const uint8_t* codes = tile.codes + run.codes + done;
      const TileRows all{codes, rows > kTileRows ? codes + kTileRows * stride : nullptr, stride,
                         kBlock};
      for (int64_t b = 0; b < copy.blocks; ++b, w += kVectors * kTileBytes)
        tiles.step(all.at(b), of_copy(w, 0, 0));
    }
  }
  tiles.store_sums(sums, rows > kTileRows ? sums + kTileRows * kWidth : nullptr);
}

// The pixels of a chunk, its tile at their first, for one pair of vectors of outputs.
void finish_chunk(const Convolution& job, Tile tile, int64_t rows, const int32_t* sums,
                  PanelMoments* moments) {
  const auto finish = [&](auto count) {
    for (int64_t v = 0; v < kVectors && tile.column + v * kLanes < job.args->outputs; ++v)
      finish_vector<count()>(job, tile, sums + v * kLanes, kWidth, tile.column + v * kLanes,
                             moments);
    sums += count() * kWidth, tile.y += count() * tile.y_stride, rows -= count();
  };
  while (rows >= kPixels) finish(std::integral_constant<int, kPixels>{});
  while (rows > 0) finish(std::integral_constant<int, 1>{});
}

// Both pairs of a chunk one after the other: together they fill what is written of a pixel.
template <class Tiles>
void piece(Tiles& tiles, const Convolution& job, Tile tile, int64_t pixels, const Taps& taps,
           const Copy& copy, const uint8_t* weights, PanelMoments* moments) {
  alignas(64) int32_t sums[kRows * kWidth];
  const int64_t first = tile.column;
  for (; pixels > 0; pixels -= kRows) {
    const int64_t rows = pixels < kRows ? pixels : kRows;
    const int64_t upper = rows < kTileRows ? rows : kTileRows;
    tiles.configure(upper, rows - upper);
    for (int64_t pair = 0; pair < kPanel / kWidth; ++pair) {
      tile.column = first + pair * kWidth;
      if (tile.column >= job.args->outputs) break;
      multiply_chunk(tiles, taps, tile, rows, copy, weights + pair * copy.pair_bytes, sums);
      finish_chunk(job, tile, rows, sums, moments);
    }
    tile.codes += kRows * tile.code_stride;
    tile.y += kRows * tile.y_stride;
  }
}

template <class Tiles>
void strip_tiles(const Convolution& job, int64_t image, int64_t strip, int64_t panel) {
  const Copy copy(job);
  thread_local Scratch scratch;
  auto* weights = static_cast<uint8_t*>(scratch.at_least(copy.bytes()));
  copy.fill(job.args->packed + panel * job.panel_bytes, weights);
  PanelMoments moments;
  PanelMoments* wanted = job.partial.sum ? &moments : nullptr;
  moments.clear();
  Tiles tiles;
  for_pieces(job, image, strip, [&](Tile tile, int64_t pixels, const Taps& taps) {
    tile.column = panel * kPanel;
    piece(tiles, job, tile, pixels, taps, copy, weights, wanted);
  });
  tiles.release();
  keep_moments(job, image, strip, panel, wanted);
}

}  // namespace

StripKernel convolution_amx() { return strip_tiles<RealTiles>; }
StripKernel convolution_amx_emulated() { return strip_tiles<EmulatedTiles>; }

}  // namespace vq
