// Tiles of AMX, and the same of plain C++ for machines without.
//
//   tiles 0 1 / 2 3: sums of 2 x 16 rows and 2 x 16 columns     4 5: codes of the rows, 16 x 64
//   tiles 6 7: weights of the columns, 16 x (16 columns x 4 inputs)
//
// A step is one block of 64 inputs: 4 loads, 4 products. The tile configuration belongs to the
// thread and torch uses it too: it is loaded at entry and released at exit.
#pragma once

#include <immintrin.h>

#include "linear/tile.h"

namespace vq {
namespace {

constexpr int kTileRows = 16;
constexpr int64_t kRows = 2 * kTileRows, kVectors = 2, kWidth = kVectors * kLanes;

class RealTiles {
 public:
  // Rows of the upper and lower tiles of codes and sums.
  static void configure(int upper, int lower) {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // the only palette there is
    const int rows[8] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;
      config[48 + t] = static_cast<uint8_t>(rows[t] ? rows[t] : 1);
    }
    _tile_loadconfig(config);
  }
  static void release() { _tile_release(); }
  static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // `lower` is null where the chunk has no lower tile.
  static void step(const uint8_t* upper, const uint8_t* lower, int64_t stride,
                   const uint8_t* weights) {
    barrier();
    _tile_loadd(6, weights, kStep);
    _tile_loadd(7, weights + 64, kStep);
    _tile_loadd(4, upper, stride);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    if (!lower) return;
    _tile_loadd(5, lower, stride);
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
};

class EmulatedTiles {
 public:
  void configure(int upper, int lower) { rows_[0] = upper, rows_[1] = lower; }
  void release() { rows_[0] = rows_[1] = 0; }
  void clear() { std::memset(sums_, 0, sizeof sums_); }
  void step(const uint8_t* upper, const uint8_t* lower, int64_t stride, const uint8_t* weights) {
    multiply_half(0, upper, stride, weights);
    if (lower) multiply_half(1, lower, stride, weights);
  }
  void store_sums(int32_t* upper, int32_t* lower) const {
    std::memcpy(upper, sums_[0], rows_[0] * kWidth * sizeof(int32_t));
    if (lower) std::memcpy(lower, sums_[1], rows_[1] * kWidth * sizeof(int32_t));
  }

 private:
  void multiply_half(int half, const uint8_t* codes, int64_t stride, const uint8_t* weights) {
    for (int m = 0; m < rows_[half]; ++m)
      for (int k = 0; k < kBlock; ++k)
        for (int n = 0; n < kWidth; ++n) {
          const uint8_t w = weights[k / 4 * kStep + n * 4 + k % 4];
          sums_[half][m][n] += codes[m * stride + k] * static_cast<int8_t>(w);
        }
  }

  int rows_[2] = {0, 0};
  int32_t sums_[2][kTileRows][kWidth] = {};
};

}  // namespace
}  // namespace vq
