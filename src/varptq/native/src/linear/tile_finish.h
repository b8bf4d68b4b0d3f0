// What follows the products of a tile: correction for zero points, float sums over segments,
// output.
//
//   P' = P - za W1 - zc (A1 - L za)     then the sums over groups as linear.h defines them
//
// Shared by the kernel of tile.h, with tiles of R rows x V vectors of 16 columns, and that of AMX.
#pragma once

#include <cstring>
#include <type_traits>

#include "lanes/lanes_more.h"
#include "linear/gemm.h"

namespace vq {
namespace {

// Which groups there are: none, of the weight only, or of the activations (too).
enum class Scheme { single, weight_groups, row_groups };

template <int R, int V>
struct alignas(64) Sums {
  int32_t of[R][V * kLanes];
  Ints at(int r, int v) const { return load(of[r] + v * kLanes); }
};
template <int R, int V>
struct alignas(64) Totals {
  float of[R][V * kLanes];
  Floats at(int r, int v) const { return load(of[r] + v * kLanes); }
  void set(int r, int v, Floats x) { store(of[r] + v * kLanes, x); }
};

// function(row, vector) for all of a tile, unrolled.
template <int R, int V, class Function>
VQ_INLINE void each(Function function) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) function(r, v);
}

// Where a row's bias starts; zeros where there is none.
VQ_INLINE const float* bias_of(const vq_linear_args& a, int64_t row, int64_t column) {
  alignas(64) static const float zeros[kPanel] = {};
  if (!a.bias) return zeros;
  const int64_t table = a.bias_row ? a.bias_row[row % a.rows_per_image] : 0;
  return a.bias + table * a.outputs + column;
}

// The vectors of a row of y, from one function of the vector's number; `count` columns exist.
template <int V, class Output>
VQ_INLINE void store_row(const vq_linear_args& a, int64_t row, int64_t column, int64_t count,
                      Output output) {
  const int64_t at = row * a.y_stride + column;
  const float* bias = bias_of(a, row, column);
  if (count >= V * kLanes && a.y_type == VQ_FLOAT32) {
    float* y = static_cast<float*>(a.y) + at;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(y + v * kLanes, output(v, load(bias + v * kLanes)));
    return;
  }
  float last[V * kLanes] = {}, lanes[V * kLanes];
  count = count < V * kLanes ? count : V * kLanes;
  std::memcpy(last, bias, count * sizeof(float));
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store(lanes + v * kLanes, output(v, load(last + v * kLanes)));
  if (a.y_type == VQ_FLOAT32) {
    std::memcpy(static_cast<float*>(a.y) + at, lanes, count * sizeof(float));
    return;
  }
  uint16_t half[V * kLanes];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store_bfloat16(half + v * kLanes, load(lanes + v * kLanes));
  std::memcpy(static_cast<uint16_t*>(a.y) + at, half, count * sizeof(uint16_t));
}

// y of a tile from a function (row of the tile, vector, bias) that finishes one row of codes.
template <int R, int V, class Finish>
VQ_INLINE void store_tile(const Job& job, int64_t m, int64_t column, Finish finish) {
  const vq_linear_args& a = *job.args;
  const int64_t count = a.outputs - column;
  if (count <= 0) return;
  if (a.pairs) {
    if constexpr (R % 2 == 0) {
#pragma GCC unroll 16
      for (int r = 0; r < R; r += 2)
        store_row<V>(a, (m + r) / 2, column, count, [&](int v, Floats bias) {
          return (finish(r, v, all(0.0f)) + finish(r + 1, v, all(0.0f))) + bias;
        });
    }
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    store_row<V>(a, m + r, column, count, [&](int v, Floats bias) { return finish(r, v, bias); });
}

// The integers themselves, for vq_accumulate.
template <int R, int V>
void store_products(const Job& job, int64_t m, int64_t column, int64_t segment,
                    const Sums<R, V>& sums) {
  const int64_t n = job.args->outputs;
  for (int r = 0; r < R; ++r)
    for (int64_t i = 0; i < V * kLanes && column + i < n; ++i)
      job.args->products[((m + r) * n + column + i) * job.segments + segment] = sums.of[r][i];
}

// Where a segment stands: its groups, and whether it is the first and the last of its weight group.
struct Position {
  int64_t segment = 0, row_group = 0, weight_group = 0;
  int64_t in_row_group = 0, in_weight_group = 0;

  bool starts() const { return in_weight_group == 0; }
  bool ends(const Job& job) const { return in_weight_group + 1 == job.weight_span; }
  // Counted rather than divided: this runs once per 64 inputs and tile.
  void advance(const Job& job) {
    ++segment;
    if (++in_row_group == job.row_span) in_row_group = 0, ++row_group;
    if (++in_weight_group == job.weight_span) in_weight_group = 0, ++weight_group;
  }
};

// Where a segment of activation groups stands in its weight group.
enum class Place { only, first, middle, last };
template <Place place>
using At = std::integral_constant<Place, place>;

// function(At<...>{}): code that is made for each place has no branches, across which compilers
// would move sums to memory.
template <Scheme scheme, class Function>
VQ_INLINE void at_place(const Job& job, const Position& p, Function function) {
  if (scheme == Scheme::weight_groups || (p.starts() && p.ends(job)))
    function(At<Place::only>{});
  else if (p.starts())
    function(At<Place::first>{});
  else if (!p.ends(job))
    function(At<Place::middle>{});
  else
    function(At<Place::last>{});
}

// What one segment adds to the totals of a tile. With activation groups, parts are their sums over
// an unfinished weight group.
template <Scheme scheme, Place place, int R, int V, class Found>
VQ_INLINE void add_segment(const Job& job, int64_t m, int64_t column, const Position& p,
                        const Found& sums, Totals<R, V>& parts, Totals<R, V>& totals) {
  const vq_linear_args& a = *job.args;
  const float* scale = a.panel_scale + panel_index(column, p.weight_group, job.weight_groups);
  Floats sw[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
    sw[v] = load(scale + v * kLanes);
  const auto product = [&](int r, int v) { return to_float(sums.at(r, v)); };
  const auto row_scale = [&](int r) {
    return all(a.scale[(m + r) * job.row_groups + p.row_group]);
  };
  each<R, V>([&](int r, int v) {
    if constexpr (scheme == Scheme::weight_groups)
      totals.set(r, v, fused(product(r, v), sw[v], totals.at(r, v)));
    else if constexpr (place == Place::only)
      totals.set(r, v, fused(product(r, v) * row_scale(r), sw[v], totals.at(r, v)));
    else if constexpr (place == Place::first)
      parts.set(r, v, product(r, v) * row_scale(r));
    else if constexpr (place == Place::middle)
      parts.set(r, v, fused(product(r, v), row_scale(r), parts.at(r, v)));
    else
      totals.set(r, v, fused(fused(product(r, v), row_scale(r), parts.at(r, v)), sw[v],
                             totals.at(r, v)));
  });
}

// A pair of `corrections` where codes are less kLeftShift: so is the zero point, its lower half.
VQ_INLINE int32_t of_shifted(int32_t pair) {
  const uint32_t zero = static_cast<uint32_t>(pair) - kLeftShift;
  return static_cast<int32_t>((zero & 0xffff) | (static_cast<uint32_t>(pair) & 0xffff0000));
}

// sums += -za W1 - zc (A1 - L za), the correction for zero points, where it was not the start.
template <int R, int V>
VQ_INLINE void correct(const Job& job, int64_t m, int64_t column, const Position& p,
                       Sums<R, V>& sums) {
  const vq_linear_args& a = *job.args;
  const int32_t* panel = a.panel_sum + panel_index(column, p.segment, job.segments);
  const int32_t* zeros = a.panel_zero + panel_index(column, p.weight_group, job.weight_groups);
  for (int r = 0; r < R; ++r) {
    const int32_t entry = job.corrections[(m + r) * job.segments + p.segment];
    const Ints row = all_int(job.short_segments ? of_shifted(entry) : entry);
    const Ints za = all_int(a.zero_point[(m + r) * job.row_groups + p.row_group] - kLeftShift);
    for (int v = 0; v < V; ++v) {
      const Ints w = load(panel + v * kLanes);
      const Ints sum = sums.at(r, v);
      const Ints right = job.short_segments
                             ? dot2(sum, row, w)
                             : sum - (times(za, w) + times(row, load(zeros + v * kLanes)));
      store(sums.of[r] + v * kLanes, right);
    }
  }
}

// One segment: y = fma(P', sa sw, bias).
template <int R, int V>
VQ_INLINE void store_single(const Job& job, int64_t m, int64_t column, const Sums<R, V>& sums) {
  const vq_linear_args& a = *job.args;
  store_tile<R, V>(job, m, column, [&](int r, int v, Floats bias) {
    const Floats scale = all(a.scale[m + r]) * load(a.panel_scale + column + v * kLanes);
    return fused(to_float(sums.at(r, v)), scale, bias);
  });
}

template <Scheme scheme, int R, int V>
VQ_INLINE void store_totals(const Job& job, int64_t m, int64_t column,
                            const Totals<R, V>& totals) {
  store_tile<R, V>(job, m, column, [&](int r, int v, Floats bias) {
    const Floats total = totals.at(r, v);
    if constexpr (scheme == Scheme::weight_groups)
      return fused(total, all(job.args->scale[m + r]), bias);
    return total + bias;
  });
}

}  // namespace
}  // namespace vq
