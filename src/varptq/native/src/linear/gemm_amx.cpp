// The product kernel for AMX, on the tiles of amx_tiles.h. After a segment the sums go to memory and
// through the corrections and float sums of tile.h, two rows at a time, so every bit is as there.
#include <ctime>

#include "linear/amx_tiles.h"

namespace vq {
namespace {

constexpr int kFewRows = 4;  // such rests are faster without tiles

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
    at_place<scheme>(job, p, [&](auto place) {
      add_segment<scheme, place(), R, kVectors>(job, first + r, column, p, strip, part, total);
    });
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
