// The product kernel in lanes of 16 columns; compiled once per instruction set.
//
//   a tile: R rows x V vectors of 16 columns, all sums in registers for all of K
//   AVX-512: 6 x 4 = 24 sums, 4 weights, 1 repeated code: 29 of 32 registers
//   AVX2:    4 x 1 = 8 registers of sums, 4 of widened weights, 2 of codes, 1 product, 1 mask: 16 of 16
//   DotProd: 4 x 1 = 16 registers of sums, 4 of weights, 4 of codes, 1 for their shift: 25 of 32
//   I8MM:    4 x 1 = 16 registers of sums, 8 of weights, 2 of codes: 26 of 32
//
// A segment starts its sums with the correction for zero points and, where there is more than one,
// goes from the registers into float sums at its end: handing 24 vectors over in memory is a good
// part of a segment's time where a CPU stores 512 bits in two cycles. Weights of 4 bits are decoded
// in registers for a few rows, else unpacked once per panel into scratch.
#pragma once

#include "lanes/products.h"
#include "linear/tile_finish.h"

namespace vq {
namespace {

constexpr int64_t kSteps = kBlock / 4;   // of the inner loop for a block
constexpr int64_t kAhead = 16 * kStep;   // bytes between a load of weights and its prefetch

// halves: two codes of 4 bits in a byte; entries: those of a table; kept: the same, and what they
// stand for is left in scratch as bytes; ordered: bytes in scratch, two steps as the product takes
// them (lanes/matrix.h).
enum class Store { bytes, halves, entries, kept, ordered };

inline Ints load_weights(const uint8_t* p) { return load(reinterpret_cast<const int32_t*>(p)); }

// A panel as tiles read it, in a task of rows from `first` on. The first tiles fetch the next panel
// into L2, whose bytes lie `next` from these (0: none is fetched). scratch: for Store::kept.
struct Weights {
  const uint8_t* bytes;
  uint8_t* scratch;
  int64_t next, first;

  Weights from(int64_t offset) const { return {bytes + offset, scratch + offset, next, first}; }
  // From a byte that tile m reads to the one that it fetches: a line of each step.
  template <int R, int V>
  int64_t to_fetch(int64_t m) const {
    const int64_t tile = (m - first) / R;
    return next && tile < V ? next + tile * 64 : 0;
  }
};

// How the sums of a segment start: at `all`, and with the correction of a short segment, row m's
// pair times each column's.
struct Start {
  const int32_t* rows;  // of the tile's first row, rows apart by row_stride
  int64_t row_stride;
  const int32_t* columns;
  int32_t all;
};

// What padding takes from a segment: its codes, of 0 less kLeftShift, meet the table's first entry,
// or weights of 0.
inline int32_t padding_of(const Job& job) {
  if (kLeftShift == 0 || !job.args->table) return 0;
  const int64_t behind = job.segment_blocks * kBlock - job.args->segment;
  return kLeftShift * static_cast<int32_t>(behind) * job.args->table[0];
}

// R x V sums that stay in registers: used inside functions that are not inlined, or compilers move
// them to memory. What becomes of them there is said by a function of these registers.
template <class Dot, int R, int V>
struct Registers {
  static_assert(Dot::rows(R) == R || R == 1, "heights that the product can halve");
  Ints s[Dot::rows(R)][V];

  template <bool shorts>
  VQ_INLINE void begin(const Start& start) {
    each<Dot::rows(R), V>([&](int r, int v) { s[r][v] = all_int(0); });
    each<R, V>([&](int r, int v) {
      if (!shorts) {
        s[r][v] = all_int(start.all);
        return;
      }
      const Ints row = all_int(of_shifted(start.rows[r * start.row_stride]));
      s[r][v] = dot2(all_int(start.all), row, load(start.columns + v * kLanes));
    });
    Dot::enter(s);
  }

  // s += codes x weights over `steps` times 4 inputs; decode makes weights of bytes, and is told
  // where they are.
  template <bool ordered = false, bool fetches = false, class Decode>
  VQ_INLINE void add(const uint8_t* codes, int64_t stride, const uint8_t* weights, int64_t steps,
                     Decode decode, int64_t to_fetch = 0) {
    const auto load_right = [&](const uint8_t* at, int v) VQ_INLINED {
      // Tiles of fewer vectors have no time for one more instruction.
      if (fetches && V > 1 && v == 0) __builtin_prefetch(at + to_fetch, 0, 2);
      // Into L1 ahead of use: a panel lies in L2, and the hardware alone falls behind.
      __builtin_prefetch(at + v * 64 + kAhead);
      return decode(load_weights(at + v * 64), at + v * 64);
    };
    Dot::template add<ordered>(s, codes, R == 1 ? 0 : stride, weights, kStep, steps, load_right);
  }

  // After the loops: what follows is not to decide about registers within them.
  VQ_INLINE void settle() {
    Dot::leave(s);
    each<R, V>([&](int r, int v) { pin(s[r][v]); });
  }

  VQ_INLINE Ints at(int r, int v) const { return s[r][v]; }

  VQ_INLINE void leave(Sums<R, V>& sums) const {
    each<R, V>([&](int r, int v) { store(sums.of[r] + v * kLanes, s[r][v]); });
  }
};

template <class Dot, Store kind, bool shorts, int R, int V, class End>
__attribute__((noinline)) void multiply(const Start& start, const uint8_t* codes, int64_t stride,
                                        const uint8_t* weights, int64_t steps, const End& end,
                                        int64_t to_fetch) {
  Registers<Dot, R, V> registers;
  registers.template begin<shorts>(start);
  registers.template add<kind == Store::ordered, kind == Store::bytes>(
      codes, stride, weights, steps, [](Ints x, const uint8_t*) { return x; }, to_fetch);
  registers.settle();
  end(registers);
}

// The same over blocks first .. last - 1 of a panel of halves, which are `table`'s or values.
template <class Dot, Store kind, bool shorts, int R, int V, class End>
__attribute__((noinline)) void multiply_halves(const Start& start, const uint8_t* codes,
                                               int64_t stride, const Weights& panel, int64_t first,
                                               int64_t last, const int8_t* table, const End& end) {
  Registers<Dot, R, V> registers;
  registers.template begin<shorts>(start);
  constexpr bool of_table = kind != Store::halves;
  const Ints entries = of_table ? all_entries(table) : all_int(0);
  for (int64_t b = first; b < last; ++b, codes += kBlock) {
    const uint8_t* block = panel.bytes + b / 2 * kSteps * kStep;
    uint8_t* scratch = panel.scratch + b * kSteps * kStep;
    const auto decode = [&](Ints halves, const uint8_t* at) VQ_INLINED {
      const Ints found = of_table ? entries_at(entries, halves) : halves;
      if (kind == Store::kept) store(reinterpret_cast<int32_t*>(scratch + (at - block)), found);
      return found;
    };
    if (b % 2)
      registers.add(codes, stride, block, kSteps, [&](Ints x, const uint8_t* at) VQ_INLINED {
        return decode(high_half(x), at);
      });
    else
      registers.add(codes, stride, block, kSteps, [&](Ints x, const uint8_t* at) VQ_INLINED {
        return decode(low_half(x), at);
      });
  }
  registers.settle();
  end(registers);
}

// Products of one segment, handed to `end` in registers; those of a short segment are corrected.
template <class Dot, Store kind, bool shorts, int R, int V, class End>
VQ_INLINE void segment_sums(const Job& job, int64_t m, int64_t column, const Position& p,
                            const Weights& weights, const End& end) {
  const int64_t first = p.segment * job.segment_blocks;
  const uint8_t* codes = job.args->codes + m * job.code_stride + first * kBlock;
  const Start start{job.corrections + m * job.segments + p.segment, job.segments,
                    job.args->panel_sum + panel_index(column, p.segment, job.segments),
                    padding_of(job)};
  if constexpr (kind == Store::bytes || kind == Store::ordered)
    multiply<Dot, kind, shorts, R, V>(start, codes, job.code_stride,
                                      weights.bytes + first * kSteps * kStep,
                                      job.segment_blocks * kSteps, end,
                                      weights.to_fetch<R, V>(m));
  else
    multiply_halves<Dot, kind, shorts, R, V>(start, codes, job.code_stride, weights, first,
                                             first + job.segment_blocks, job.args->table, end);
}

// The same from memory, corrected, handed to `end`.
template <class Dot, Store kind, bool shorts, int R, int V, class End>
VQ_INLINE void stored_sums(const Job& job, int64_t m, int64_t column, const Position& p,
                           const Weights& weights, const End& end) {
  Sums<R, V> sums;
  const auto leave = [&](const auto& registers) VQ_INLINED { registers.leave(sums); };
  segment_sums<Dot, kind, shorts, R, V>(job, m, column, p, weights, leave);
  if constexpr (shorts)
    end(sums);
  else
    end(Corrected<false, R, V>(job, m, column, p, sums));
}

template <class Dot, Store kind, int R, int V>
VQ_INLINE void single_tile(const Job& job, int64_t m, int64_t column, const Weights& weights) {
  const bool plain = is_plain<V>(job, column);
  if (plain) fetch_outputs<R, V>(*job.args, m, column);
  Sums<R, V> sums;
  const auto leave = [&](const auto& registers) VQ_INLINED { registers.leave(sums); };
  segment_sums<Dot, kind, false, R, V>(job, m, column, Position{}, weights, leave);
  if (plain) {
    const PlainColumns<V> columns(job, column);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) columns.store_row(m + r, sums.of[r]);
    return;
  }
  const Corrected<false, R, V> corrected(job, m, column, Position{}, sums);
  if (job.args->products)
    store_products<R, V>(job, m, column, 0, corrected);
  else
    store_single<R, V>(job, m, column, corrected);
}

template <class Dot, Store kind, Scheme scheme, bool shorts, int R, int V>
VQ_INLINE void grouped_tile(const Job& job, int64_t m, int64_t column, const Weights& weights) {
  const vq_linear_args& a = *job.args;
  Totals<R, V> totals, parts;
  each<R, V>([&](int r, int v) {
    totals.set(r, v, all(0.0f));
    parts.set(r, v, all(0.0f));
  });
  for (Position p; p.segment < job.segments; p.advance(job)) {
    if (a.products) {
      const auto keep = [&](const auto& sums) VQ_INLINED {
        store_products<R, V>(job, m, column, p.segment, sums);
      };
      stored_sums<Dot, kind, shorts, R, V>(job, m, column, p, weights, keep);
      continue;
    }
    at_place<scheme>(job, p, [&](auto place) {
      const auto add = [&](const auto& sums) VQ_INLINED {
        add_segment<scheme, place(), R, V>(job, m, column, p, sums, parts, totals);
      };
      if constexpr (shorts)
        segment_sums<Dot, kind, shorts, R, V>(job, m, column, p, weights, add);
      else
        stored_sums<Dot, kind, shorts, R, V>(job, m, column, p, weights, add);
    });
  }
  if (!a.products) store_totals<scheme, R, V>(job, m, column, totals);
}

// All rows first .. last - 1 in tiles of R rows, the rest in a lower one.
template <class Dot, Store kind, Scheme scheme, bool shorts, int R, int V>
void tiles(const Job& job, int64_t first, int64_t last, int64_t column, const Weights& weights) {
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
                   const Weights& weights) {
  if (job.short_segments)
    return tiles<Dot, kind, scheme, true, R, V>(job, first, last, column, weights);
  if constexpr (kind == Store::bytes || kind == Store::ordered)
    tiles<Dot, kind, scheme, false, 2, V>(job, first, last, column, weights);
}

// A panel of halves as bytes: byte i of block b at place(b, i).
template <bool of_table, class Place>
inline void unpack(const Job& job, const uint8_t* panel, Place place) {
  constexpr int64_t kBytes = kBlock * kPanel;
  const Ints entries = of_table ? all_entries(job.args->table) : all_int(0);
  const auto put = [&](uint8_t* at, Ints halves) {
    store(reinterpret_cast<int32_t*>(at), of_table ? entries_at(entries, halves) : halves);
  };
  for (int64_t b = 0; b < job.blocks; b += 2, panel += kBytes) {
    const bool both = b + 1 < job.blocks;
    for (int64_t i = 0; i < kBytes; i += 64) {
      const Ints x = load_weights(panel + i);
      put(place(b, i), low_half(x));
      if (both) put(place(b + 1, i), high_half(x));
    }
  }
}

template <class Place>
inline void unpack(const Job& job, const uint8_t* panel, Place place) {
  job.args->table ? unpack<true>(job, panel, place) : unpack<false>(job, panel, place);
}

// Pairs of steps of a panel's bytes as the product takes them; `to` may be `from`.
template <class Dot>
inline void order_steps(const Job& job, const uint8_t* from, uint8_t* to) {
  for (int64_t pair = 0; pair < job.blocks * kSteps / 2; ++pair, from += 2 * kStep, to += 2 * kStep)
    for (int64_t i = 0; i < kStep; i += 64) {
      Ints first = load_weights(from + i), second = load_weights(from + kStep + i);
      Dot::zip(first, second);
      store(reinterpret_cast<int32_t*>(to + i), first);
      store(reinterpret_cast<int32_t*>(to + kStep + i), second);
    }
}

template <class Dot, Store kind, int R, int V>
void single_tiles(const Job& job, int64_t panel, int64_t first, int64_t last,
                  const Weights& weights) {
  for (int vector = 0; vector < kPanel / kLanes; vector += V)
    tiles<Dot, kind, Scheme::single, false, R, V>(job, first, last,
                                                  panel * kPanel + vector * kLanes,
                                                  weights.from(vector * 64));
}

template <class Dot, Store kind, int R, int V>
void panel_tiles(const Job& job, int64_t panel, int64_t first, int64_t last,
                 const Weights& weights) {
  if (job.segments == 1) return single_tiles<Dot, kind, R, V>(job, panel, first, last, weights);
  for (int vector = 0; vector < kPanel / kLanes; vector += V) {
    const int64_t column = panel * kPanel + vector * kLanes;
    const Weights w = weights.from(vector * 64);
    if (job.args->row_group == job.args->inputs)
      grouped_tiles<Dot, kind, Scheme::weight_groups, R, V>(job, first, last, column, w);
    else
      grouped_tiles<Dot, kind, Scheme::row_groups, R, V>(job, first, last, column, w);
  }
}

// A panel with tiles of R x V; up to 2 R rows, weights are decoded and ordered in registers. Of
// more, the first tile leaves those of a table as bytes for the others.
template <class Dot, int R, int V>
inline void panel_of(const Job& job, int64_t panel, int64_t first, int64_t last,
                     uint8_t* unpacked) {
  const uint8_t* packed = job.args->packed + panel * job.panel_bytes;
  const bool few = last - first <= 2 * R;
  // So few rows wait for their own weights, behind which no others should come.
  const bool fetches = !few && (panel + 1) * kPanel < job.args->outputs;
  const auto in = [&](const uint8_t* bytes) {
    return Weights{bytes, unpacked, fetches ? packed + job.panel_bytes - bytes : 0, first};
  };
  constexpr Store kMany = Dot::kOrdersSteps ? Store::ordered : Store::bytes;
  if (job.args->weight_bits > 4) {
    if (few || !Dot::kOrdersSteps)
      return panel_tiles<Dot, Store::bytes, R, V>(job, panel, first, last, in(packed));
    if constexpr (Dot::kOrdersSteps) order_steps<Dot>(job, packed, unpacked);
    return panel_tiles<Dot, kMany, R, V>(job, panel, first, last, in(unpacked));
  }
  const bool simple = job.short_segments || job.segments == 1;
  if (few && job.args->table && job.segments == 1)
    return single_tiles<Dot, Store::entries, R, V>(job, panel, first, last, in(packed));
  if (few && simple && !job.args->table)
    return panel_tiles<Dot, Store::halves, R, V>(job, panel, first, last, in(packed));
  if constexpr (!Dot::kOrdersSteps) {
    if (job.args->table && job.segments == 1) {
      for (int vector = 0; vector < kPanel / kLanes; vector += V)
        single_tile<Dot, Store::kept, R, V>(job, first, panel * kPanel + vector * kLanes,
                                            in(packed).from(vector * 64));
      first += R;
      return single_tiles<Dot, Store::bytes, R, V>(job, panel, first, last, in(unpacked));
    }
  }
  unpack(job, packed, [&](int64_t b, int64_t i) { return unpacked + b * kBlock * kPanel + i; });
  if constexpr (Dot::kOrdersSteps) order_steps<Dot>(job, unpacked, unpacked);
  panel_tiles<Dot, kMany, R, V>(job, panel, first, last, in(unpacked));
}

}  // namespace
}  // namespace vq
