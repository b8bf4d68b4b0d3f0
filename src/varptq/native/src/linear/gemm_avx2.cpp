// The product kernel for AVX2; see tile.h.
//
// The byte product adds pairs in 16 bits and saturates there: fine for codes whose pairs fit, and
// where those of two steps do, both are added before they are widened. Other codes are widened
// first (Bytes).
#include "linear/peak.h"
#include "linear/tile.h"

namespace vq {
namespace {

inline __m256i widened_sum(__m256i sum, __m256i pairs) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Products of `together` steps are added in 16 bits.
template <int together>
struct Narrow : ByRows<Narrow<together>> {
  template <int>
  VQ_INLINE static Ints dot(Ints sum, Left codes, Ints weights) {
    return {widened_sum(sum.v, _mm256_maddubs_epi16(codes.v, weights.v)),
            widened_sum(sum.w, _mm256_maddubs_epi16(codes.w, weights.w))};
  }

  template <bool ordered, int R, int V, class LoadRight>
  VQ_INLINE static void add(Ints (&s)[R][V], const uint8_t* codes, int64_t stride,
                            const uint8_t* right, int64_t right_step, int64_t steps,
                            LoadRight load_right) {
    for (; steps > 0; steps -= together, codes += 4 * together, right += together * right_step) {
      Ints w[together][V];
      each<together, V>([&](int i, int v) { w[i][v] = load_right(right + i * right_step, v); });
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Left left[together];
        for (int i = 0; i < together; ++i) left[i] = load_left<1>(codes + r * stride + 4 * i);
        for (int v = 0; v < V; ++v) {
          __m256i first = _mm256_maddubs_epi16(left[0].v, w[0][v].v);
          __m256i second = _mm256_maddubs_epi16(left[0].w, w[0][v].w);
          for (int i = 1; i < together; ++i) {
            first = _mm256_add_epi16(first, _mm256_maddubs_epi16(left[i].v, w[i][v].v));
            second = _mm256_add_epi16(second, _mm256_maddubs_epi16(left[i].w, w[i][v].w));
          }
          s[r][v] = {widened_sum(s[r][v].v, first), widened_sum(s[r][v].w, second)};
        }
      }
    }
  }
};

}  // namespace

void panel_avx2(const Job& job, int64_t panel, int64_t first, int64_t last, uint8_t* unpacked) {
  if (job.largest_pair > INT16_MAX)
    panel_of<Bytes, 4, 1>(job, panel, first, last, unpacked);
  else if (2 * job.largest_pair > INT16_MAX)
    panel_of<Narrow<1>, 4, 1>(job, panel, first, last, unpacked);
  else
    panel_of<Narrow<2>, 4, 1>(job, panel, first, last, unpacked);
}

double peak_avx2() { return measured_peak<Narrow<1>>(); }

}  // namespace vq
