// Tiles of AMX, and the same of plain C++ for machines without.
//
//   tiles 0 1 / 2 3: sums of 2 x 16 rows and 2 x 16 columns     4 5: codes of the rows, 16 x 64
//   tiles 6 7: weights of the columns, 16 x (16 columns x 4 inputs)
//
// A step is one block of 64 inputs: 4 loads, 4 products. Loads decide how fast it is: a step that
// finds its weights in the L1 cache takes 31 ns, one whose weights lie in a panel, where 32 columns
// are every other 128 bytes and so fill half the sets only, up to 135 (2.9 GHz). So weights that
// many rows meet are copied first, tile by tile, and codes are loaded past the cache.
//
// The tile configuration belongs to the thread and torch uses it too: it is loaded at entry and
// released at exit.
#pragma once

#include <immintrin.h>

#include "linear/tile.h"

namespace vq {
namespace {

constexpr int64_t kRows = 2 * kTileRows, kVectors = 2, kWidth = kVectors * kLanes;

// Codes of 32 rows: from one row to the next, and the lower 16 (null where there are none).
struct TileRows {
  const uint8_t *upper, *lower;
  int64_t stride, block;  // bytes, block: to the next 64 inputs

  TileRows at(int64_t b) const {
    return {upper + b * block, lower ? lower + b * block : nullptr, stride, block};
  }
};

// Weights of 32 columns: from 4 inputs to the next, and the right 16 columns.
struct TileColumns {
  const uint8_t* weights;
  int64_t right, stride, block;  // bytes

  TileColumns at(int64_t b) const { return {weights + b * block, right, stride, block}; }
};

// Those of pair `pair` in a panel as it is packed, and in its copy by tiles.
inline TileColumns of_panel(const uint8_t* panel, int64_t pair) {
  return {panel + pair * kVectors * 64, 64, kStep, kSteps * kStep};
}
inline TileColumns of_copy(const uint8_t* copy, int64_t pair, int64_t blocks) {
  return {copy + pair * blocks * kVectors * kTileBytes, kTileBytes, 64, kVectors * kTileBytes};
}
// Where byte i (a multiple of 64) of a packed panel's block b is in that copy.
inline int64_t place_in_copy(int64_t b, int64_t i, int64_t blocks) {
  const int64_t vector = i % kStep / 64, step = i / kStep;
  const int64_t pair = vector / kVectors, right = vector % kVectors;
  return ((pair * blocks + b) * kVectors + right) * kTileBytes + step * 64;
}
inline void copy_panel(const uint8_t* panel, int64_t blocks, uint8_t* copy) {
  constexpr int64_t kBytes = kSteps * kStep;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < kBytes; i += 64)
      std::memcpy(copy + place_in_copy(b, i, blocks), panel + b * kBytes + i, 64);
}

class RealTiles {
 public:
  // Rows of the upper and lower tiles of codes and sums; loading what is there takes long too.
  void configure(int64_t upper, int64_t lower) {
    if (upper == upper_ && lower == lower_) return;
    upper_ = upper, lower_ = lower;
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // the only palette there is
    const int64_t rows[8] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;
      config[48 + t] = static_cast<uint8_t>(rows[t] ? rows[t] : 1);
    }
    _tile_loadconfig(config);
  }
  void release() {
    if (upper_) _tile_release();
    upper_ = lower_ = 0;
  }
  static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  static void step(const TileRows& rows, const TileColumns& columns) {
    barrier();
    _tile_loadd(6, columns.weights, columns.stride);
    _tile_loadd(7, columns.weights + columns.right, columns.stride);
    _tile_stream_loadd(4, rows.upper, rows.stride);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    if (!rows.lower) return;
    _tile_stream_loadd(5, rows.lower, rows.stride);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  static void store_sums(int32_t* upper, int32_t* lower) {
    constexpr int64_t kBytes = kWidth * sizeof(int32_t);
    _tile_stored(0, upper, kBytes);
    _tile_stored(1, upper + kLanes, kBytes);
    if (lower) {
      _tile_stored(2, lower, kBytes);
      _tile_stored(3, lower + kLanes, kBytes);
    }
    barrier();
  }

 private:
  // The intrinsics do not tell the compiler which memory they touch.
  static void barrier() { __asm__ volatile("" ::: "memory"); }

  int64_t upper_ = 0, lower_ = 0;
};

class EmulatedTiles {
 public:
  void configure(int64_t upper, int64_t lower) { rows_[0] = upper, rows_[1] = lower; }
  void release() { rows_[0] = rows_[1] = 0; }
  void clear() { std::memset(sums_, 0, sizeof sums_); }
  void step(const TileRows& rows, const TileColumns& columns) {
    multiply_half(0, rows.upper, rows.stride, columns);
    if (rows.lower) multiply_half(1, rows.lower, rows.stride, columns);
  }
  void store_sums(int32_t* upper, int32_t* lower) const {
    std::memcpy(upper, sums_[0], rows_[0] * kWidth * sizeof(int32_t));
    if (lower) std::memcpy(lower, sums_[1], rows_[1] * kWidth * sizeof(int32_t));
  }

 private:
  void multiply_half(int half, const uint8_t* codes, int64_t stride, const TileColumns& columns) {
    for (int64_t m = 0; m < rows_[half]; ++m)
      for (int k = 0; k < kBlock; ++k)
        for (int n = 0; n < kWidth; ++n) {
          const int64_t at = n / kLanes * columns.right + k / 4 * columns.stride;
          const uint8_t w = columns.weights[at + n % kLanes * 4 + k % 4];
          sums_[half][m][n] += codes[m * stride + k] * static_cast<int8_t>(w);
        }
  }

  int64_t rows_[2] = {0, 0};
  int32_t sums_[2][kTileRows][kWidth] = {};
};

}  // namespace
}  // namespace vq
