// The operations of lanes.h in pairs of AVX2 registers. Included by lanes.h only.
#pragma once

namespace vq {
namespace {

struct Floats {
  __m256 v, w;
};
struct Ints {
  __m256i v, w;
};

inline void pin(Ints& x) { asm("" : "+x"(x.v), "+x"(x.w)); }  // in registers here
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints all_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Ints load(const int32_t* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.v);
  _mm256_storeu_ps(p + 8, x.w);
}
inline void store(int32_t* p, Ints x) {
  auto* q = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.v);
  _mm256_storeu_si256(q + 1, x.w);
}
inline Floats operator+(Floats a, Floats b) {
  return {_mm256_add_ps(a.v, b.v), _mm256_add_ps(a.w, b.w)};
}
inline Floats operator-(Floats a, Floats b) {
  return {_mm256_sub_ps(a.v, b.v), _mm256_sub_ps(a.w, b.w)};
}
inline Floats operator*(Floats a, Floats b) {
  return {_mm256_mul_ps(a.v, b.v), _mm256_mul_ps(a.w, b.w)};
}
inline Floats operator/(Floats a, Floats b) {
  return {_mm256_div_ps(a.v, b.v), _mm256_div_ps(a.w, b.w)};
}
inline Floats smaller(Floats a, Floats b) {
  return {_mm256_min_ps(a.v, b.v), _mm256_min_ps(a.w, b.w)};
}
inline Floats larger(Floats a, Floats b) {
  return {_mm256_max_ps(a.v, b.v), _mm256_max_ps(a.w, b.w)};
}
inline Ints operator+(Ints a, Ints b) {
  return {_mm256_add_epi32(a.v, b.v), _mm256_add_epi32(a.w, b.w)};
}
inline Ints operator-(Ints a, Ints b) {
  return {_mm256_sub_epi32(a.v, b.v), _mm256_sub_epi32(a.w, b.w)};
}
inline Ints operator&(Ints a, Ints b) {
  return {_mm256_and_si256(a.v, b.v), _mm256_and_si256(a.w, b.w)};
}
inline Ints operator|(Ints a, Ints b) {
  return {_mm256_or_si256(a.v, b.v), _mm256_or_si256(a.w, b.w)};
}
inline Ints larger(Ints a, Ints b) {
  return {_mm256_max_epi32(a.v, b.v), _mm256_max_epi32(a.w, b.w)};
}
inline Ints smaller(Ints a, Ints b) {
  return {_mm256_min_epi32(a.v, b.v), _mm256_min_epi32(a.w, b.w)};
}
template <int bits>
inline Ints shift_left(Ints a) {
  return {_mm256_slli_epi32(a.v, bits), _mm256_slli_epi32(a.w, bits)};
}
template <int bits>
inline Ints shift_right(Ints a) {  // of the sign, too
  return {_mm256_srai_epi32(a.v, bits), _mm256_srai_epi32(a.w, bits)};
}
inline Ints shift_left(Ints a, int bits) {
  const __m128i count = _mm_cvtsi32_si128(bits);
  return {_mm256_sll_epi32(a.v, count), _mm256_sll_epi32(a.w, count)};
}
inline Ints shift_right(Ints a, int bits) {
  const __m128i count = _mm_cvtsi32_si128(bits);
  return {_mm256_sra_epi32(a.v, count), _mm256_sra_epi32(a.w, count)};
}
inline Ints bits_of(Floats x) { return {_mm256_castps_si256(x.v), _mm256_castps_si256(x.w)}; }
inline Floats floats_of(Ints x) { return {_mm256_castsi256_ps(x.v), _mm256_castsi256_ps(x.w)}; }
inline Floats to_float(Ints x) { return {_mm256_cvtepi32_ps(x.v), _mm256_cvtepi32_ps(x.w)}; }
inline Floats rounded(Floats x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.v, mode), _mm256_round_ps(x.w, mode)};
}
inline Ints to_int(Floats x) {
  const Floats r = rounded(x);
  return {_mm256_cvttps_epi32(r.v), _mm256_cvttps_epi32(r.w)};
}
// a where x < y, else b.
inline Floats where_less(Floats x, Floats y, Floats a, Floats b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.w, a.w, _mm256_cmp_ps(x.w, y.w, _CMP_LT_OQ))};
}
// The low byte of each lane.
inline void store_bytes(void* p, Ints x) {
  const __m256i low = _mm256_set1_epi32(0xFF);
  const __m256i words = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(_mm256_and_si256(x.v, low), _mm256_and_si256(x.w, low)), 0xD8);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi16(_mm256_castsi256_si128(words),
                                                              _mm256_extracti128_si256(words, 1)));
}
inline Ints load_u8(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
// Entries of a table of 16 bytes, repeated by `all_entries`, at 64 indices below 16.
inline Ints all_entries(const int8_t* table) {
  const __m256i twice =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {twice, twice};
}
inline Ints entries_at(Ints table, Ints indices) {
  return {_mm256_shuffle_epi8(table.v, indices.v), _mm256_shuffle_epi8(table.w, indices.w)};
}
#if defined(VQ_VNNI256)
inline __m256i dot4(__m256i sum, __m256i u8, __m256i s8) {
#if defined(__AVX512VNNI__)
  return _mm256_dpbusd_epi32(sum, u8, s8);
#else
  return _mm256_dpbusd_avx_epi32(sum, u8, s8);
#endif
}
#else
// Widened to 16 bits, since the byte product saturates at two of 255 x 127.
inline __m256i dot4(__m256i sum, __m256i u8, __m256i s8) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u8, _mm256_set1_epi16(0xFF)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(s8, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u8, 8), _mm256_srai_epi16(s8, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
#endif
inline Ints dot4(Ints sum, Ints u8, Ints s8) {
  return {dot4(sum.v, u8.v, s8.v), dot4(sum.w, u8.w, s8.w)};
}
inline __m256i dot2(__m256i sum, __m256i a, __m256i b) {
#if defined(VQ_VNNI256) && defined(__AVX512VNNI__)
  return _mm256_dpwssd_epi32(sum, a, b);
#elif defined(VQ_VNNI256)
  return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}
inline Ints dot2(Ints sum, Ints a, Ints b) {  // int16 pairs
  return {dot2(sum.v, a.v, b.v), dot2(sum.w, a.w, b.w)};
}
inline __m128 halves(Floats x) {  // i, i+8 and i, i+4 by addition
  const __m256 a = _mm256_add_ps(x.v, x.w);
  return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
}
inline float sum_of(Floats x) {
  __m128 b = halves(x);
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
template <class Pick>
inline float reduce_of(Floats x, Pick pick) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 1; i < kLanes; ++i) lanes[0] = pick(lanes[i], lanes[0]) ? lanes[i] : lanes[0];
  return lanes[0];
}
inline float largest_of(Floats x) {
  return reduce_of(x, [](float a, float b) { return a > b; });
}
inline float smallest_of(Floats x) {
  return reduce_of(x, [](float a, float b) { return a < b; });
}
inline int32_t sum_of(Ints x) {
  int32_t lanes[kLanes], sum = 0;
  store(lanes, x);
  for (int32_t lane : lanes) sum += lane;
  return sum;
}
inline int32_t largest_of(Ints x) {
  int32_t lanes[kLanes];
  store(lanes, x);
  for (int32_t lane : lanes) lanes[0] = lane > lanes[0] ? lane : lanes[0];
  return lanes[0];
}

}  // namespace
}  // namespace vq
