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
template <int R, int V, class Found>
void store_products(const Job& job, int64_t m, int64_t column, int64_t segment,
                    const Found& sums) {
  const int64_t n = job.args->outputs;
  alignas(64) int32_t lanes[kLanes];
  each<R, V>([&](int r, int v) {
    store(lanes, sums.at(r, v));
    for (int64_t i = 0, at = column + v * kLanes; i < kLanes && at + i < n; ++i)
      job.args->products[((m + r) * n + at + i) * job.segments + segment] = lanes[i];
  });
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

// P' = sum - za W1 - zc (A1 - L za); row: the last factor.
VQ_INLINE Ints without_zeros(Ints sum, Ints za, Ints weights, Ints row, Ints zeros) {
  return sum - (times(za, weights) + times(row, zeros));
}

// A tile's sums with the correction for zero points, where it was not the start. What it takes is
// read where it is needed: held here for all rows, it would leave the registers.
template <bool shorts, int R, int V>
class Corrected {
 public:
  VQ_INLINE Corrected(const Job& job, int64_t m, int64_t column, const Position& p,
                      const Sums<R, V>& sums)
      : sums_(sums),
        weights_(job.args->panel_sum + panel_index(column, p.segment, job.segments)),
        zeros_(job.args->panel_zero + panel_index(column, p.weight_group, job.weight_groups)),
        rows_(job.corrections + m * job.segments + p.segment),
        za_(job.args->zero_point + m * job.row_groups + p.row_group),
        segments_(job.segments),
        row_groups_(job.row_groups) {}
  VQ_INLINE Ints at(int r, int v) const {
    const Ints sum = sums_.at(r, v), weights = load(weights_ + v * kLanes);
    const int32_t row = rows_[r * segments_];
    if constexpr (shorts) return dot2(sum, all_int(of_shifted(row)), weights);
    const Ints za = all_int(za_[r * row_groups_] - kLeftShift);
    return without_zeros(sum, za, weights, all_int(row), load(zeros_ + v * kLanes));
  }

 private:
  const Sums<R, V>& sums_;
  const int32_t *weights_, *zeros_, *rows_, *za_;
  const int64_t segments_, row_groups_;
};

// One segment: y = fma(P', sa sw, bias).
VQ_INLINE Floats of_single(Ints product, Floats row_scale, Floats scale, Floats bias) {
  return fused(to_float(product), row_scale * scale, bias);
}

template <int R, int V, class Found>
VQ_INLINE void store_single(const Job& job, int64_t m, int64_t column, const Found& sums) {
  const vq_linear_args& a = *job.args;
  store_tile<R, V>(job, m, column, [&](int r, int v, Floats bias) {
    return of_single(sums.at(r, v), all(a.scale[m + r]), load(a.panel_scale + column + v * kLanes),
                     bias);
  });
}

// Whether outputs from `column` on, V vectors of them, are whole, float and of one segment, as
// nearly all are.
template <int V>
VQ_INLINE bool is_plain(const Job& job, int64_t column) {
  const vq_linear_args& a = *job.args;
  return job.segments == 1 && a.outputs - column >= V * kLanes && a.y_type == VQ_FLOAT32 &&
         !a.pairs && !a.products;
}

// The same as Corrected and store_single, row by row, for such outputs: what belongs to columns is
// read once, before the first store, across which no compiler can keep it.
template <int V>
class PlainColumns {
 public:
  VQ_INLINE PlainColumns(const Job& job, int64_t column)
      : job_(job), column_(column), bias_(bias_of(*job.args, 0, column)) {
    const vq_linear_args& a = *job.args;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = column + v * kLanes;
      weights_[v] = load(a.panel_sum + at), zeros_[v] = load(a.panel_zero + at);
      scale_[v] = load(a.panel_scale + at);
    }
  }
  // Row m of y from its sums.
  VQ_INLINE void store_row(int64_t m, const int32_t* sums) const {
    const vq_linear_args& a = *job_.args;
    const float* bias = a.bias_row ? bias_of(a, m, column_) : bias_;
    float* y = static_cast<float*>(a.y) + m * a.y_stride + column_;
    const Ints za = all_int(a.zero_point[m] - kLeftShift), row = all_int(job_.corrections[m]);
    const Floats row_scale = all(a.scale[m]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Ints sum = load(sums + v * kLanes);
      const Ints product = without_zeros(sum, za, weights_[v], row, zeros_[v]);
      store(y + v * kLanes, of_single(product, row_scale, scale_[v], load(bias + v * kLanes)));
    }
  }

 private:
  const Job& job_;
  const int64_t column_;
  const float* bias_;  // of every row, where rows have none of their own
  Ints weights_[V], zeros_[V];
  Floats scale_[V];
};

// The lines of y into the cache while the products are made: stores wait for them in order, and
// what is stored after them waits too.
template <int R, int V>
VQ_INLINE void fetch_outputs(const vq_linear_args& a, int64_t m, int64_t column) {
  const float* y = static_cast<const float*>(a.y) + m * a.y_stride + column;
  each<R, V>([&](int r, int v) VQ_INLINED {
    __builtin_prefetch(y + r * a.y_stride + v * kLanes, 1);
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
