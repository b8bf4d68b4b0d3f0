// The product kernel for AMX, on the tiles of amx_tiles.h. After a segment the sums go to memory and
// through the corrections and float sums of tile_finish.h, so every bit is as there.
#include "linear/amx_tiles.h"
#include "linear/peak.h"

namespace vq {
namespace {

// A panel is copied where many rows meet it and 32 columns of the copy fit the L1 cache beside the
// codes; else copying costs more than it saves.
constexpr int64_t kRowsForCopy = 256, kBytesForCopy = 40 * 1024;

// The next panel, brought to the L2 cache line by line while this one is multiplied: no core reads
// memory fast enough to do one after the other.
class Ahead {
 public:
  Ahead(const Job& job, int64_t panel, int64_t steps)
      : at_(job.args->packed + (panel + 1) * job.panel_bytes),
        end_(panel + 1 < padded(job.args->outputs) / kPanel ? at_ + job.panel_bytes : at_),
        lines_((job.panel_bytes / 64 + steps - 1) / steps) {}
  VQ_INLINE void step() {
    for (int64_t i = 0; i < lines_ && at_ < end_; ++i, at_ += 64)
      _mm_prefetch(reinterpret_cast<const char*>(at_), _MM_HINT_T1);
  }

 private:
  const uint8_t *at_, *end_;
  int64_t lines_;
};

// A chunk of up to 32 rows and 32 columns, finished in strips of two rows (or one).
template <class Tiles>
struct Chunk {
  Chunk(const Job& job_, Tiles& tiles_, Ahead& ahead_, int64_t first_, int64_t rows_,
        int64_t column_, const TileColumns& weights_)
      : job(job_), tiles(tiles_), ahead(ahead_), first(first_), rows(rows_), column(column_),
        weights(weights_) {}

  const Job& job;
  Tiles& tiles;
  Ahead& ahead;
  int64_t first, rows, column;
  TileColumns weights;
  Sums<2, kVectors> strips[kTileRows];
  Totals<2, kVectors> totals[kTileRows], parts[kTileRows];

  void multiply_segment(int64_t segment) {
    tiles.clear();
    const int64_t tile = first / kTileRows * job.blocks;
    const bool lower = rows > kTileRows;
    const uint8_t* codes = job.tiles + tile * kTileBytes;
    const TileRows all{codes, lower ? codes + job.blocks * kTileBytes : nullptr, kBlock,
                       kTileBytes};
    const int64_t begin = segment * job.segment_blocks;
    for (int64_t b = begin; b < begin + job.segment_blocks; ++b) {
      tiles.step(all.at(b), weights.at(b));
      ahead.step();
    }
    tiles.store_sums(strips[0].of[0], lower ? strips[kTileRows / 2].of[0] : nullptr);
  }

  template <bool shorts, int R>
  void finish_strip(int64_t r, const Position& p) {
    const int64_t m = first + r;
    const Corrected<shorts, R, kVectors> strip(
        job, m, column, p, reinterpret_cast<const Sums<R, kVectors>&>(strips[r / 2]));
    if (job.args->products)
      store_products<R, kVectors>(job, m, column, p.segment, strip);
    else if (job.segments == 1)
      store_single<R, kVectors>(job, m, column, strip);
    else if (job.row_groups == 1)
      add_strip<Scheme::weight_groups, R>(r, p, strip);
    else
      add_strip<Scheme::row_groups, R>(r, p, strip);
  }

  template <Scheme scheme, int R, class Found>
  void add_strip(int64_t r, const Position& p, const Found& strip) {
    auto& total = reinterpret_cast<Totals<R, kVectors>&>(totals[r / 2]);
    auto& part = reinterpret_cast<Totals<R, kVectors>&>(parts[r / 2]);
    if (p.segment == 0) total = {};
    at_place<scheme>(job, p, [&](auto place) {
      add_segment<scheme, place(), R, kVectors>(job, first + r, column, p, strip, part, total);
    });
    if (p.segment + 1 == job.segments)
      store_totals<scheme, R, kVectors>(job, first + r, column, total);
  }

  template <bool shorts>
  void finish_segment(const Position& p) {
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) finish_strip<shorts, 2>(r, p);
    if (r < rows) finish_strip<shorts, 1>(r, p);
  }

  void run() {
    if (is_plain<kVectors>(job, column)) {
      multiply_segment(0);
      const PlainColumns<kVectors> columns(job, column);
      const int32_t* sums = strips[0].of[0];
      for (int64_t r = 0; r < rows; ++r) columns.store_row(first + r, sums + r * kWidth);
      return;
    }
    for (Position p; p.segment < job.segments; p.advance(job)) {
      multiply_segment(p.segment);
      job.short_segments ? finish_segment<true>(p) : finish_segment<false>(p);
    }
  }
};

template <class Tiles>
void panel_with(Tiles& tiles, const Job& job, int64_t panel, int64_t first, int64_t last,
                uint8_t* room) {
  const uint8_t* packed = job.args->packed + panel * job.panel_bytes;
  const int64_t rest = (last - first) % kRows <= kFewRows ? (last - first) % kRows : 0;
  const int64_t end = last - rest;
  const bool halves = job.args->weight_bits <= 4;
  const bool pays = end - first >= kRowsForCopy && job.blocks * kWidth * kBlock <= kBytesForCopy;
  if (first < end) {
    if (halves)
      unpack(job, packed,
             [&](int64_t b, int64_t i) { return room + place_in_copy(b, i, job.blocks); });
    else if (pays)
      copy_panel(packed, job.blocks, room);
    tiles.configure(kTileRows, kTileRows);
    Ahead ahead(job, panel, job.blocks * kPanel / kWidth * ((end - first + kRows - 1) / kRows));
    for (int64_t pair = 0; pair < kPanel / kWidth; ++pair) {
      const int64_t column = panel * kPanel + pair * kWidth;
      if (column >= job.args->outputs) break;
      const TileColumns weights =
          halves || pays ? of_copy(room, pair, job.blocks) : of_panel(packed, pair);
      for (int64_t m = first; m < end; m += kRows) {
        const int64_t rows = end - m < kRows ? end - m : kRows;
        Chunk<Tiles>(job, tiles, ahead, m, rows, column, weights).run();
      }
    }
    tiles.release();
  }
  if (rest) panel_avx512vnni(job, panel, end, last, room);
}

}  // namespace

void tile_codes(const Job& job, int64_t t, uint8_t* tiles) {
  const uint8_t* codes = job.args->codes + t * kTileRows * job.code_stride;
  const int64_t left = job.args->rows - t * kTileRows;
  uint8_t* to = tiles + t * job.blocks * kTileBytes;
  for (int64_t b = 0; b < job.blocks; ++b)
    for (int64_t r = 0; r < kTileRows; ++r, to += kBlock)
      if (r < left)
        std::memcpy(to, codes + r * job.code_stride + b * kBlock, kBlock);
      else
        std::memset(to, 0, kBlock);
}

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
  double best = 0;
  RealTiles tiles;
  tiles.configure(kTileRows, kTileRows);
  tiles.clear();
  tiles.step({zeros, zeros, kBlock, 0}, of_panel(zeros, 0));
  for (int repeat = 0; repeat < 5; ++repeat) {
    const double start = seconds();
    for (int64_t turn = 0; turn < kTurns; ++turn) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    const double took = seconds() - start;
    const double rate = 4 * kTurns * 2.0 * kTileRows * kLanes * kBlock / took / 1e9;
    best = rate > best ? rate : best;
  }
  tiles.release();
  return best;
}

}  // namespace vq
