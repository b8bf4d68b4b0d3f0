// The product kernel in lanes of 16 columns; compiled once per instruction set.
//
//   a tile: R rows x V vectors of 16 columns, all sums in registers for all of K
//   AVX-512: 6 x 4 = 24 sums, 4 weights, 1 repeated code: 29 of 32 registers
//   AVX2:    4 x 1 = 8 registers of sums, 2 of weights, 1 code, 3 for the byte product: 14 of 16
//
// A segment starts its sums with the correction for zero points and, where there is more than one,
// goes from the registers into float sums at its end: handing 24 vectors over in memory is a good
// part of a segment's time where a CPU stores 512 bits in two cycles. Weights of 4 bits are decoded
// in registers for a few rows, else unpacked once per panel into scratch.
#pragma once

#include <cstring>
#include <ctime>

#include "linear/tile_finish.h"

namespace vq {
namespace {

constexpr int64_t kSteps = kBlock / 4;   // of the inner loop for a block
constexpr int64_t kAhead = 8 * kStep;    // bytes between a load of weights and its prefetch

enum class Store { bytes, halves, entries };  // halves: two codes of 4 bits in a byte; of a table

inline Ints load_weights(const uint8_t* p) { return load(reinterpret_cast<const int32_t*>(p)); }
inline Ints low_half(Ints x) { return x & all_int(0x0f0f0f0f); }
inline Ints high_half(Ints x) { return shift_right<4>(x) & all_int(0x0f0f0f0f); }

inline Ints repeat_codes(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return all_int(four);
}

// How the sums of a segment start: at zero, or with the correction of a short segment, row m's pair
// times each column's.
struct Start {
  const int32_t* rows;  // of the tile's first row, rows apart by row_stride
  int64_t row_stride;
  const int32_t* columns;
};

// R x V sums that stay in registers: used inside functions that are not inlined, or compilers move
// them to memory. What becomes of them there is said by a function of these registers.
template <class Dot, int R, int V>
struct Registers {
  Ints s[R][V];

  template <bool shorts>
  VQ_INLINE void begin(const Start& start) {
    each<R, V>([&](int r, int v) {
      s[r][v] = shorts ? dot2(all_int(0), all_int(start.rows[r * start.row_stride]),
                              load(start.columns + v * kLanes))
                       : all_int(0);
    });
  }

  // s += codes x weights over `steps` times 4 inputs; decode makes weights of bytes.
  template <class Decode>
  VQ_INLINE void add(const uint8_t* codes, int64_t stride, const uint8_t* weights, int64_t steps,
                     Decode decode) {
    for (; steps > 0; --steps, weights += kStep, codes += 4) {
      Ints w[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        w[v] = decode(load_weights(weights + v * 64));
        // Into L1 ahead of use: a panel lies in L2, and the hardware alone falls behind.
        __builtin_prefetch(weights + v * 64 + kAhead);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Ints code = repeat_codes(codes + r * stride);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) s[r][v] = Dot::dot(s[r][v], code, w[v]);
      }
    }
  }

  // After the loops: what follows is not to decide about registers within them.
  VQ_INLINE void settle() {
    each<R, V>([&](int r, int v) { pin(s[r][v]); });
  }

  VQ_INLINE Ints at(int r, int v) const { return s[r][v]; }

  VQ_INLINE void leave(Sums<R, V>& sums) const {
    each<R, V>([&](int r, int v) { store(sums.of[r] + v * kLanes, s[r][v]); });
  }
};

template <class Dot, bool shorts, int R, int V, class End>
__attribute__((noinline)) void multiply(const Start& start, const uint8_t* codes, int64_t stride,
                                        const uint8_t* weights, int64_t steps, const End& end) {
  Registers<Dot, R, V> registers;
  registers.template begin<shorts>(start);
  registers.add(codes, stride, weights, steps, [](Ints x) { return x; });
  registers.settle();
  end(registers);
}

// The same over blocks first .. last - 1 of a panel of halves, which are `table`'s or values.
template <class Dot, Store kind, bool shorts, int R, int V, class End>
__attribute__((noinline)) void multiply_halves(const Start& start, const uint8_t* codes,
                                               int64_t stride, const uint8_t* panel, int64_t first,
                                               int64_t last, const int8_t* table, const End& end) {
  Registers<Dot, R, V> registers;
  registers.template begin<shorts>(start);
  constexpr bool of_table = kind == Store::entries;
  const Ints entries = of_table ? all_entries(table) : all_int(0);
  for (int64_t b = first; b < last; ++b, codes += kBlock) {
    const uint8_t* block = panel + b / 2 * kSteps * kStep;
    const auto decode = [&](Ints halves) {
      return of_table ? entries_at(entries, halves) : halves;
    };
    if (b % 2)
      registers.add(codes, stride, block, kSteps, [&](Ints x) { return decode(high_half(x)); });
    else
      registers.add(codes, stride, block, kSteps, [&](Ints x) { return decode(low_half(x)); });
  }
  registers.settle();
  end(registers);
}

// Products of one segment, handed to `end` in registers; those of a short segment are corrected.
template <class Dot, Store kind, bool shorts, int R, int V, class End>
VQ_INLINE void segment_sums(const Job& job, int64_t m, int64_t column, const Position& p,
                            const uint8_t* weights, const End& end) {
  const int64_t first = p.segment * job.segment_blocks;
  const uint8_t* codes = job.args->codes + m * job.code_stride + first * kBlock;
  const Start start{job.corrections + m * job.segments + p.segment, job.segments,
                    job.args->panel_sum + panel_index(column, p.segment, job.segments)};
  if constexpr (kind == Store::bytes)
    multiply<Dot, shorts, R, V>(start, codes, job.code_stride, weights + first * kSteps * kStep,
                                job.segment_blocks * kSteps, end);
  else
    multiply_halves<Dot, kind, shorts, R, V>(start, codes, job.code_stride, weights, first,
                                             first + job.segment_blocks, job.args->table, end);
}

// The same, corrected, in memory.
template <class Dot, Store kind, bool shorts, int R, int V>
VQ_INLINE void stored_sums(const Job& job, int64_t m, int64_t column, const Position& p,
                           const uint8_t* weights, Sums<R, V>& sums) {
  const auto leave = [&](const auto& registers) VQ_INLINED { registers.leave(sums); };
  segment_sums<Dot, kind, shorts, R, V>(job, m, column, p, weights, leave);
  if constexpr (!shorts) correct<R, V>(job, m, column, p, sums);
}

template <class Dot, Store kind, int R, int V>
VQ_INLINE void single_tile(const Job& job, int64_t m, int64_t column, const uint8_t* weights) {
  const vq_linear_args& a = *job.args;
  Sums<R, V> sums;
  stored_sums<Dot, kind, false, R, V>(job, m, column, Position{}, weights, sums);
  if (a.products) return store_products<R, V>(job, m, column, 0, sums);
  store_single<R, V>(job, m, column, sums);
}

template <class Dot, Store kind, Scheme scheme, bool shorts, int R, int V>
VQ_INLINE void grouped_tile(const Job& job, int64_t m, int64_t column, const uint8_t* weights) {
  const vq_linear_args& a = *job.args;
  Totals<R, V> totals, parts;
  each<R, V>([&](int r, int v) { totals.set(r, v, all(0.0f)); });
  for (Position p; p.segment < job.segments; p.advance(job)) {
    if constexpr (shorts) {
      if (!a.products) {
        at_place<scheme>(job, p, [&](auto place) {
          const auto add = [&](const auto& sums) VQ_INLINED {
            add_segment<scheme, place(), R, V>(job, m, column, p, sums, parts, totals);
          };
          segment_sums<Dot, kind, shorts, R, V>(job, m, column, p, weights, add);
        });
        continue;
      }
    }
    Sums<R, V> sums;
    stored_sums<Dot, kind, shorts, R, V>(job, m, column, p, weights, sums);
    if (a.products)
      store_products<R, V>(job, m, column, p.segment, sums);
    else
      at_place<scheme>(job, p, [&](auto place) {
        add_segment<scheme, place(), R, V>(job, m, column, p, sums, parts, totals);
      });
  }
  if (!a.products) store_totals<scheme, R, V>(job, m, column, totals);
}

// All rows first .. last - 1 in tiles of R rows, the rest in a lower one.
template <class Dot, Store kind, Scheme scheme, bool shorts, int R, int V>
void tiles(const Job& job, int64_t first, int64_t last, int64_t column, const uint8_t* weights) {
  for (; first + R <= last; first += R) {
    if constexpr (scheme == Scheme::single)
      single_tile<Dot, kind, R, V>(job, first, column, weights);
    else
      grouped_tile<Dot, kind, scheme, shorts, R, V>(job, first, column, weights);
  }
  // Heights 6, 4, 2, 1: even ones keep pairs of rows together, and fewer compile faster.
  constexpr int kNext = R > 2 ? (R - 1) / 2 * 2 : 1;
  if constexpr (R > 1) {
    if (first < last)
      tiles<Dot, kind, scheme, shorts, kNext, V>(job, first, last, column, weights);
  }
}

// Groups of more than 128 inputs are unusual: tiles of a pair of rows, or one, do for them.
template <class Dot, Store kind, Scheme scheme, int R, int V>
void grouped_tiles(const Job& job, int64_t first, int64_t last, int64_t column,
                   const uint8_t* weights) {
  if (job.short_segments)
    return tiles<Dot, kind, scheme, true, R, V>(job, first, last, column, weights);
  if constexpr (kind == Store::bytes)
    tiles<Dot, kind, scheme, false, 2, V>(job, first, last, column, weights);
}

// A panel of halves as bytes: block b of 64 inputs at b * 4096.
template <bool of_table>
inline void unpack(const Job& job, const uint8_t* panel, uint8_t* out) {
  constexpr int64_t kBytes = kBlock * kPanel;
  const Ints entries = of_table ? all_entries(job.args->table) : all_int(0);
  const auto put = [&](uint8_t* at, Ints halves) {
    store(reinterpret_cast<int32_t*>(at), of_table ? entries_at(entries, halves) : halves);
  };
  for (int64_t b = 0; b < job.blocks; b += 2, panel += kBytes, out += 2 * kBytes) {
    const bool both = b + 1 < job.blocks;
    for (int64_t i = 0; i < kBytes; i += 64) {
      const Ints x = load_weights(panel + i);
      put(out + i, low_half(x));
      if (both) put(out + kBytes + i, high_half(x));
    }
  }
}

inline void unpack(const Job& job, const uint8_t* panel, uint8_t* out) {
  job.args->table ? unpack<true>(job, panel, out) : unpack<false>(job, panel, out);
}

template <class Dot, Store kind, int R, int V>
void single_tiles(const Job& job, int64_t panel, int64_t first, int64_t last,
                  const uint8_t* weights) {
  for (int vector = 0; vector < kPanel / kLanes; vector += V)
    tiles<Dot, kind, Scheme::single, false, R, V>(job, first, last,
                                                  panel * kPanel + vector * kLanes,
                                                  weights + vector * 64);
}

template <class Dot, Store kind, int R, int V>
void panel_tiles(const Job& job, int64_t panel, int64_t first, int64_t last,
                 const uint8_t* weights) {
  if (job.segments == 1) return single_tiles<Dot, kind, R, V>(job, panel, first, last, weights);
  for (int vector = 0; vector < kPanel / kLanes; vector += V) {
    const int64_t column = panel * kPanel + vector * kLanes;
    const uint8_t* w = weights + vector * 64;
    if (job.args->row_group == job.args->inputs)
      grouped_tiles<Dot, kind, Scheme::weight_groups, R, V>(job, first, last, column, w);
    else
      grouped_tiles<Dot, kind, Scheme::row_groups, R, V>(job, first, last, column, w);
  }
}

// A panel with tiles of R x V; up to 2 R rows, halves are decoded in registers.
template <class Dot, int R, int V>
inline void panel_of(const Job& job, int64_t panel, int64_t first, int64_t last,
                     uint8_t* unpacked) {
  const uint8_t* weights = job.args->packed + panel * job.panel_bytes;
  if (job.args->weight_bits > 4)
    return panel_tiles<Dot, Store::bytes, R, V>(job, panel, first, last, weights);
  const bool simple = job.short_segments || job.segments == 1;
  const bool few = last - first <= 2 * R;
  if (few && job.args->table && job.segments == 1)
    return single_tiles<Dot, Store::entries, R, V>(job, panel, first, last, weights);
  if (few && simple && !job.args->table)
    return panel_tiles<Dot, Store::halves, R, V>(job, panel, first, last, weights);
  unpack(job, weights, unpacked);
  panel_tiles<Dot, Store::bytes, R, V>(job, panel, first, last, unpacked);
}

// The byte product of the lanes.
struct Bytes {
  static Ints dot(Ints sum, Ints codes, Ints weights) { return dot4(sum, codes, weights); }
};

inline double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Operations (two per multiply-add) a second of the product alone, on registers.
template <class Dot>
inline double measured_peak() {
  constexpr int64_t kTurns = 200000;
#if defined(VQ_LANES512)
  constexpr int kSums = 12;
#else
  constexpr int kSums = 6;  // of two registers each
#endif
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    Ints sums[kSums], a = all_int(0x01010101), b = all_int(0x01010101);
    for (int i = 0; i < kSums; ++i) sums[i] = all_int(i);
    const double start = seconds();
    for (int64_t turn = 0; turn < kTurns; ++turn) {
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) {
        sums[i] = Dot::dot(sums[i], a, b);
#if defined(VQ_LANES512)
        __asm__ volatile("" : "+v"(sums[i].v));
#elif defined(__AVX2__)
        // Of the operand too, of which AVX2 would else compute its first step once for all.
        __asm__ volatile("" : "+x"(sums[i].v), "+x"(sums[i].w), "+x"(a.v), "+x"(a.w));
#endif
      }
    }
    const double took = seconds() - start;
    Ints all_sums = sums[0];
    for (int i = 1; i < kSums; ++i) all_sums = all_sums + sums[i];
    volatile int32_t keep = sum_of(all_sums);
    (void)keep;
    const double rate = 2.0 * 64 * kSums * kTurns / took / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace
}  // namespace vq
