// The product kernel for AMX, and the same with tiles of plain C++ for machines without.
//
//   tiles 0 1 / 2 3: sums of 2 x 16 rows and 2 x 16 columns     4 5: codes of the rows, 16 x 64
//   tiles 6 7: weights of the columns, 16 x (16 columns x 4 inputs)
//
// A step is one block of 64 inputs: 4 loads, 4 products. After a segment the sums go to memory and
// through the corrections and float sums of tile.h, two rows at a time, so every bit is as there.
// The tile configuration belongs to the thread and torch uses it too: it is loaded at entry and
// released at exit.
#include <immintrin.h>

#include <ctime>

#include "linear/tile.h"

namespace vq {
namespace {

constexpr int kTileRows = 16;
constexpr int64_t kRows = 2 * kTileRows, kVectors = 2, kWidth = kVectors * kLanes;
constexpr int kFewRows = 4;  // such rests are faster without tiles

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

// A chunk of up to 32 rows and 32 columns, finished in strips of two rows (or one).
template <class Tiles>
struct Chunk {
  Chunk(const Job& job_, Tiles& tiles_, int64_t first_, int64_t rows_, int64_t column_,
        const uint8_t* weights_)
      : job(job_), tiles(tiles_), first(first_), rows(rows_), column(column_), weights(weights_) {}

  const Job& job;
  Tiles& tiles;
  int64_t first, rows, column;
  const uint8_t* weights;
  alignas(64) int32_t sums[kRows][kWidth];
  Totals<2, kVectors> totals[kTileRows], parts[kTileRows];

  void multiply_segment(int64_t segment) {
    tiles.clear();
    const int64_t stride = job.code_stride;
    for (int64_t b = 0; b < job.segment_blocks; ++b) {
      const int64_t block = segment * job.segment_blocks + b;
      const uint8_t* codes = job.args->codes + first * stride + block * kBlock;
      tiles.step(codes, rows > kTileRows ? codes + kTileRows * stride : nullptr, stride,
                 weights + block * kSteps * kStep);
    }
    tiles.store_sums(sums[0], rows > kTileRows ? sums[kTileRows] : nullptr);
  }

  template <int R>
  void finish_strip(int64_t r, const Position& p) {
    Sums<R, kVectors> strip;
    std::memcpy(strip.of, sums[r], sizeof strip.of);
    const int64_t m = first + r;
    correct<R, kVectors>(job, m, column, p, strip);
    if (job.args->products)
      store_products<R, kVectors>(job, m, column, p.segment, strip);
    else if (job.segments == 1)
      store_single<R, kVectors>(job, m, column, strip);
    else if (job.row_groups == 1)
      add_strip<Scheme::weight_groups, R>(r, p, strip);
    else
      add_strip<Scheme::row_groups, R>(r, p, strip);
  }

  template <Scheme scheme, int R>
  void add_strip(int64_t r, const Position& p, const Sums<R, kVectors>& strip) {
    auto& total = reinterpret_cast<Totals<R, kVectors>&>(totals[r / 2]);
    auto& part = reinterpret_cast<Totals<R, kVectors>&>(parts[r / 2]);
    if (p.segment == 0) total = {};
    add_segment<scheme, R, kVectors>(job, first + r, column, p, strip, part, total);
    if (p.segment + 1 == job.segments)
      store_totals<scheme, R, kVectors>(job, first + r, column, total);
  }

  void run() {
    for (Position p; p.segment < job.segments; p.advance(job)) {
      multiply_segment(p.segment);
      int64_t r = 0;
      for (; r + 2 <= rows; r += 2) finish_strip<2>(r, p);
      if (r < rows) finish_strip<1>(r, p);
    }
  }
};

template <class Tiles>
void panel_with(Tiles& tiles, const Job& job, int64_t panel, int64_t first, int64_t last,
                uint8_t* unpacked) {
  const uint8_t* weights = job.args->packed + panel * job.panel_bytes;
  if (last - first > kFewRows && job.args->weight_bits <= 4) {
    unpack(job, weights, unpacked);
    weights = unpacked;
  }
  bool used = false;
  for (; last - first > kFewRows; first += kRows) {
    const int64_t rows = last - first < kRows ? last - first : kRows;
    const int upper = static_cast<int>(rows < kTileRows ? rows : kTileRows);
    tiles.configure(upper, static_cast<int>(rows) - upper);
    used = true;
    for (int64_t vector = 0; vector < kPanel / kLanes; vector += kVectors) {
      const int64_t column = panel * kPanel + vector * kLanes;
      if (column >= job.args->outputs) break;
      Chunk<Tiles>(job, tiles, first, rows, column, weights + vector * 64).run();
    }
  }
  if (used) tiles.release();
  if (first < last) panel_avx512vnni(job, panel, first, last, unpacked);
}

}  // namespace

void panel_amx(const Job& job, int64_t panel, int64_t first, int64_t last, uint8_t* unpacked) {
  RealTiles tiles;
  panel_with(tiles, job, panel, first, last, unpacked);
}

void panel_amx_emulated(const Job& job, int64_t panel, int64_t first, int64_t last,
                        uint8_t* unpacked) {
  EmulatedTiles tiles;
  panel_with(tiles, job, panel, first, last, unpacked);
}

double peak_amx() {
  constexpr int64_t kTurns = 50000;
  alignas(64) static const uint8_t zeros[kTileRows * kStep] = {};
  RealTiles::configure(kTileRows, kTileRows);
  RealTiles::clear();
  RealTiles::step(zeros, zeros, kBlock, zeros);
  timespec start, end;
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (int64_t turn = 0; turn < kTurns; ++turn) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  clock_gettime(CLOCK_MONOTONIC, &end);
  RealTiles::release();
  const double took = static_cast<double>(end.tv_sec - start.tv_sec) +
                      1e-9 * static_cast<double>(end.tv_nsec - start.tv_nsec);
  return 4 * kTurns * 2.0 * kTileRows * kLanes * kBlock / took / 1e9;
}

}  // namespace vq
