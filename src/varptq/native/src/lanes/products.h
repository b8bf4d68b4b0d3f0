// The inner loop of every product: rows of codes on the left, vectors of 16 columns of four signed
// bytes on the right.
#pragma once

#include <type_traits>
#include <utility>

#include "lanes/lanes.h"

namespace vq {
namespace {

template <int... i, class Function>
VQ_INLINE void unrolled(std::integer_sequence<int, i...>, Function function) {
  (function(std::integral_constant<int, i>{}), ...);
}

// s[r][v] += products of `together` steps; rows of codes are `stride` bytes apart, steps of the
// right side `right_step`; load_right(at, v) makes vector v of what is at `at`.
template <int together, class Dot, int R, int V, class LoadRight>
VQ_INLINE void add_steps(Ints (&s)[R][V], const uint8_t* codes, int64_t stride,
                         const uint8_t* right, int64_t right_step, LoadRight load_right) {
  Left kept[R];
  if constexpr (together > 1) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) kept[r] = load_left<together>(codes + r * stride);
  }
  unrolled(std::make_integer_sequence<int, together>{}, [&](auto step) VQ_INLINED {
    constexpr int kStepOf = decltype(step)::value;
    Ints w[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) w[v] = load_right(right + kStepOf * right_step, v);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Left left = together > 1 ? kept[r] : load_left<1>(codes + r * stride);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) s[r][v] = Dot::template dot<kStepOf>(s[r][v], left, w[v]);
    }
  });
}

// The same for `steps` of them.
template <class Dot, int R, int V, class LoadRight>
VQ_INLINE void add_products(Ints (&s)[R][V], const uint8_t* codes, int64_t stride,
                            const uint8_t* right, int64_t right_step, int64_t steps,
                            LoadRight load_right) {
  if constexpr (kLeftSteps > 1) {
    for (; steps >= kLeftSteps; steps -= kLeftSteps) {
      add_steps<kLeftSteps, Dot>(s, codes, stride, right, right_step, load_right);
      codes += 4 * kLeftSteps, right += kLeftSteps * right_step;
    }
  }
  for (; steps > 0; --steps, codes += 4, right += right_step)
    add_steps<1, Dot>(s, codes, stride, right, right_step, load_right);
}

// What a product kernel asks of its product, where that is `Dot::dot<step>` of each row: sums lie as
// they are read, and so do weights. lanes/matrix.h has the other kind.
template <class Dot>
struct ByRows {
  static constexpr bool kOrdersSteps = false;  // of weights that are used many times
  static constexpr int kLaneBytes = 4;  // multiplied and added in a lane by `dot`
  static constexpr int rows(int count) { return count; }  // of sums, for so many of codes

  // Sums from rows, and back.
  template <int R, int V>
  VQ_INLINE static void enter(Ints (&)[R][V]) {}
  template <int R, int V>
  VQ_INLINE static void leave(Ints (&)[R][V]) {}

  // `ordered`: load_right gives steps as `Matrix::zip` leaves them.
  template <bool ordered, int R, int V, class LoadRight>
  VQ_INLINE static void add(Ints (&s)[R][V], const uint8_t* codes, int64_t stride,
                            const uint8_t* right, int64_t right_step, int64_t steps,
                            LoadRight load_right) {
    add_products<Dot>(s, codes, stride, right, right_step, steps, load_right);
  }
};

// The byte product of the lanes.
struct Bytes : ByRows<Bytes> {
  template <int step>
  VQ_INLINE static Ints dot(Ints sum, Left codes, Ints weights) {
    return dot_left<step>(sum, codes, weights);
  }
};

}  // namespace
}  // namespace vq

#if defined(VQ_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
#include "lanes/matrix.h"
namespace vq {
namespace {
using TileProduct = Matrix;
}  // namespace
}  // namespace vq
#else
namespace vq {
namespace {
using TileProduct = Bytes;  // what large products are made of
}  // namespace
}  // namespace vq
#endif
