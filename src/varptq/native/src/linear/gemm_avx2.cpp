// The product kernel for AVX2; see tile.h.
//
// The byte product adds pairs in 16 bits and saturates there: fine for codes whose two products fit
// (job.narrow). Wide codes are cut at bit 7: 127 x 128 x 2 fits, and bit 7 is a code of its own.
#include "linear/tile.h"

namespace vq {
namespace {

struct Narrow : ByRows<Narrow> {
  static __m256i dot(__m256i sum, __m256i codes, __m256i weights) {
    const __m256i pairs = _mm256_maddubs_epi16(codes, weights);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  template <int>
  static Ints dot(Ints sum, Left codes, Ints weights) {
    return {dot(sum.v, codes.v, weights.v), dot(sum.w, codes.w, weights.w)};
  }
};

struct Wide : ByRows<Wide> {
  static __m256i dot(__m256i sum, __m256i low, __m256i high, __m256i weights) {
    const __m256i lows = _mm256_maddubs_epi16(low, weights);
    const __m256i highs = _mm256_maddubs_epi16(high, weights);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(lows, _mm256_set1_epi16(1)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(highs, _mm256_set1_epi16(128)));
  }
  template <int>
  static Ints dot(Ints sum, Left codes, Ints weights) {
    const __m256i low = _mm256_and_si256(codes.v, _mm256_set1_epi8(127));
    const __m256i high =
        _mm256_and_si256(_mm256_srli_epi16(codes.v, 7), _mm256_set1_epi8(1));
    return {dot(sum.v, low, high, weights.v), dot(sum.w, low, high, weights.w)};
  }
};

}  // namespace

void panel_avx2(const Job& job, int64_t panel, int64_t first, int64_t last, uint8_t* unpacked) {
  if (job.narrow)
    panel_of<Narrow, 4, 1>(job, panel, first, last, unpacked);
  else
    panel_of<Wide, 4, 1>(job, panel, first, last, unpacked);
}

double peak_avx2() { return measured_peak<Narrow>(); }

}  // namespace vq
