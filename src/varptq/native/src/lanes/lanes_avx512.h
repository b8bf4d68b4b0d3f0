// The operations of lanes.h in one register of AVX-512 each. Included by lanes.h only.
#pragma once

namespace vq {
namespace {

struct Floats {
  __m512 v;
};
struct Ints {
  __m512i v;
};

inline void pin(Ints& x) { asm("" : "+v"(x.v)); }  // in a register here
inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
inline Ints all_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline void store(int32_t* p, Ints x) { _mm512_storeu_si512(p, x.v); }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Ints larger(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline Ints smaller(Ints a, Ints b) { return {_mm512_min_epi32(a.v, b.v)}; }
template <int bits>
inline Ints shift_left(Ints a) {
  return {_mm512_slli_epi32(a.v, bits)};
}
template <int bits>
inline Ints shift_right(Ints a) {  // of the sign, too
  return {_mm512_srai_epi32(a.v, bits)};
}
inline Ints shift_left(Ints a, int bits) {
  return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(bits))};
}
inline Ints shift_right(Ints a, int bits) {
  return {_mm512_sra_epi32(a.v, _mm_cvtsi32_si128(bits))};
}
inline Ints bits_of(Floats x) { return {_mm512_castps_si512(x.v)}; }
inline Floats floats_of(Ints x) { return {_mm512_castsi512_ps(x.v)}; }
inline Floats to_float(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline Ints to_int(Floats x) {
  return {_mm512_cvt_roundps_epi32(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Floats rounded(Floats x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a where x < y, else b.
inline Floats where_less(Floats x, Floats y, Floats a, Floats b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)};
}
// The low byte of each lane.
inline void store_bytes(void* p, Ints x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
inline Ints load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// Entries of a table of 16 bytes, repeated by `all_entries`, at 64 indices below 16.
inline Ints all_entries(const int8_t* table) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)))};
}
inline Ints entries_at(Ints table, Ints indices) {
  return {_mm512_shuffle_epi8(table.v, indices.v)};
}
inline Ints dot4(Ints sum, Ints u8, Ints s8) { return {_mm512_dpbusd_epi32(sum.v, u8.v, s8.v)}; }
inline Ints dot2(Ints sum, Ints a, Ints b) {  // int16 pairs
  return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
}
inline float sum_of(Floats x) {
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x.v); }
inline float smallest_of(Floats x) { return _mm512_reduce_min_ps(x.v); }
inline int32_t sum_of(Ints x) { return _mm512_reduce_add_epi32(x.v); }
inline int32_t largest_of(Ints x) { return _mm512_reduce_max_epi32(x.v); }

}  // namespace
}  // namespace vq
