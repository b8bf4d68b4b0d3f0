// The products of I8MM: two rows by two columns over eight bytes in one instruction, twice what a
// product of four bytes does. The packed weights serve as they are: two of their steps, zipped.
// Included by products.h only.
//
//   sums of rows a and b   a0 a1 a2 a3   b0 b1 b2 b3
//   as squares             a0 a1 b0 b1   a2 a3 b2 b3
#pragma once

namespace vq {
namespace {

// Rows to squares, and back.
VQ_INLINE void swap_halves(Ints& a, Ints& b) {
  for (int i = 0; i < 4; ++i) {
    const int64x2_t x = vreinterpretq_s64_s32(a.v[i]), y = vreinterpretq_s64_s32(b.v[i]);
    a.v[i] = vreinterpretq_s32_s64(vzip1q_s64(x, y));
    b.v[i] = vreinterpretq_s32_s64(vzip2q_s64(x, y));
  }
}

// Eight codes of both rows.
VQ_INLINE uint8x16_t load_two(const uint8_t* a, const uint8_t* b) {
  return vcombine_u8(vld1_u8(a), vld1_u8(b));
}
// Four, and four of 0.
VQ_INLINE uint8x16_t load_halves(const uint8_t* a, const uint8_t* b) {
  uint32_t x, y;
  std::memcpy(&x, a, sizeof x);
  std::memcpy(&y, b, sizeof y);
  return vcombine_u8(vcreate_u8(x), vcreate_u8(y));
}

struct Matrix {
  static constexpr bool kOrdersSteps = true;
  static constexpr int kLaneBytes = 8;
  // A single row is computed twice, a stride of 0 apart.
  static constexpr int rows(int count) { return (count + 1) / 2 * 2; }

  template <int R, int V>
  VQ_INLINE static void enter(Ints (&s)[R][V]) {
    for (int r = 0; r < R; r += 2)
      for (int v = 0; v < V; ++v) swap_halves(s[r][v], s[r + 1][v]);
  }
  template <int R, int V>
  VQ_INLINE static void leave(Ints (&s)[R][V]) {
    enter(s);
  }

  // Two steps of four bytes a column to one of eight: of each register's first two columns in
  // `first`, of its last two in `second`.
  VQ_INLINE static void zip(Ints& first, Ints& second) {
    for (int i = 0; i < 4; ++i) {
      const int32x4_t x = first.v[i], y = second.v[i];
      first.v[i] = vzip1q_s32(x, y);
      second.v[i] = vzip2q_s32(x, y);
    }
  }

  // As `ByRows::add`.
  template <bool ordered, int R, int V, class LoadRight>
  VQ_INLINE static void add(Ints (&s)[R][V], const uint8_t* codes, int64_t stride,
                            const uint8_t* right, int64_t right_step, int64_t steps,
                            LoadRight load_right) {
    for (; steps > 1; steps -= 2, codes += 8, right += 2 * right_step)
      add_steps<ordered>(s, codes, stride, load_two, load_right, right, right + right_step);
    // The four bytes that meet zeros may be any.
    if (steps > 0) add_steps<false>(s, codes, stride, load_halves, load_right, right, right);
  }

  // To be timed alone.
  template <int step>
  VQ_INLINE static Ints dot(Ints sum, Left codes, Ints weights) {
    return quarterwise<Ints>(
        [&](int i) { return vusmmlaq_s32(sum.v[i], codes.v, bytes_of(weights.v[i])); });
  }

 private:
  template <bool ordered, int R, int V, class LoadLeft, class LoadRight>
  VQ_INLINE static void add_steps(Ints (&s)[R][V], const uint8_t* codes, int64_t stride,
                                  LoadLeft load_left, LoadRight load_right, const uint8_t* first,
                                  const uint8_t* second) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      Ints x = load_right(first, v), y = load_right(second, v);
      if (!ordered) zip(x, y);
#pragma GCC unroll 16
      for (int r = 0; r < R; r += 2) {
        const uint8_t* a = codes + r * stride;
        const uint8x16_t left = load_left(a, a + stride);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          s[r][v].v[i] = vusmmlaq_s32(s[r][v].v[i], left, bytes_of(x.v[i]));
          s[r + 1][v].v[i] = vusmmlaq_s32(s[r + 1][v].v[i], left, bytes_of(y.v[i]));
        }
      }
    }
  }
};

}  // namespace
}  // namespace vq
