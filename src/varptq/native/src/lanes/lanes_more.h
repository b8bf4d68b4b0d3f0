// What kernels need of sixteen lanes beyond lanes.h: the one fused operation, exchange of lanes for
// rotations, and a look for NaN and infinity.
#pragma once

#include "lanes/bfloat16.h"
#include "lanes/lanes.h"

namespace vq {
namespace {

// a b + c rounded once, without an instruction for it. The product is exact in double; of a sum
// that is rounded to odd the second rounding is that of the exact one (Boldo and Melquiond, 2008).
inline float fused_in_double(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c;
  const double added = sum - product;
  const double lost = (product - (sum - added)) + (c - added);
  int64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  const bool inexact = lost > 0.0 || lost < 0.0;
  const int64_t toward = (lost > 0.0) == (sum > 0.0) ? 1 : -1;
  bits += inexact && !(bits & 1) ? toward : 0;
  double odd;
  std::memcpy(&odd, &bits, sizeof odd);
  return static_cast<float>(odd);
}

// a b + c, rounded once: only where a definition says so (linear/linear.h, lanes/vmath.h).
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(VQ_LANES512)
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
#elif defined(__AVX2__)
  return {_mm256_fmadd_ps(a.v, b.v, c.v), _mm256_fmadd_ps(a.w, b.w, c.w)};
#elif defined(VQ_NEON)
  return quarterwise<Floats>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
#else
  return lanewise<Floats>([&](int i) { return fused_in_double(a.v[i], b.v[i], c.v[i]); });
#endif
}

inline Ints times(Ints a, Ints b) {
#if defined(VQ_LANES512)
  return {_mm512_mullo_epi32(a.v, b.v)};
#elif defined(__AVX2__)
  return {_mm256_mullo_epi32(a.v, b.v), _mm256_mullo_epi32(a.w, b.w)};
#elif defined(VQ_NEON)
  return quarterwise<Ints>([&](int i) { return vmulq_s32(a.v[i], b.v[i]); });
#else
  return lanewise<Ints>([&](int i) { return a.v[i] * b.v[i]; });
#endif
}

// Of each byte.
inline Ints low_half(Ints x) { return x & all_int(0x0f0f0f0f); }
inline Ints high_half(Ints x) { return shift_right<4>(x) & all_int(0x0f0f0f0f); }

// x with the sign bit of `signs` changed where that is set.
inline Floats flipped(Floats x, Floats signs) {
#if defined(VQ_LANES512)
  return {_mm512_xor_ps(x.v, signs.v)};
#elif defined(__AVX2__)
  return {_mm256_xor_ps(x.v, signs.v), _mm256_xor_ps(x.w, signs.w)};
#elif defined(VQ_NEON)
  const Ints a = bits_of(x), b = bits_of(signs);
  return floats_of(quarterwise<Ints>([&](int i) { return veorq_s32(a.v[i], b.v[i]); }));
#else
  return lanewise<Floats>([&](int i) { return std::signbit(signs.v[i]) ? -x.v[i] : x.v[i]; });
#endif
}

// Lane i takes lane i ^ stride.
template <int stride>
inline Floats exchanged(Floats x) {
#if defined(VQ_LANES512)
  if constexpr (stride == 1) return {_mm512_permute_ps(x.v, 0xB1)};
  if constexpr (stride == 2) return {_mm512_permute_ps(x.v, 0x4E)};
  if constexpr (stride == 4) return {_mm512_shuffle_f32x4(x.v, x.v, 0xB1)};
  return {_mm512_shuffle_f32x4(x.v, x.v, 0x4E)};
#elif defined(__AVX2__)
  if constexpr (stride == 1) return {_mm256_permute_ps(x.v, 0xB1), _mm256_permute_ps(x.w, 0xB1)};
  if constexpr (stride == 2) return {_mm256_permute_ps(x.v, 0x4E), _mm256_permute_ps(x.w, 0x4E)};
  if constexpr (stride == 4)
    return {_mm256_permute2f128_ps(x.v, x.v, 1), _mm256_permute2f128_ps(x.w, x.w, 1)};
  return {x.w, x.v};
#elif defined(VQ_NEON)
  if constexpr (stride == 1)
    return quarterwise<Floats>([&](int i) { return vrev64q_f32(x.v[i]); });
  if constexpr (stride == 2)
    return quarterwise<Floats>([&](int i) { return vextq_f32(x.v[i], x.v[i], 2); });
  if constexpr (stride == 4) return {{x.v[1], x.v[0], x.v[3], x.v[2]}};
  return {{x.v[2], x.v[3], x.v[0], x.v[1]}};
#else
  return lanewise<Floats>([&](int i) { return x.v[i ^ stride]; });
#endif
}

inline Floats load_bfloat16(const uint16_t* p) {
#if defined(VQ_LANES512)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
#elif defined(VQ_NEON)
  return quarterwise<Floats>([&](int i) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
  });
#else
  float wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = from_bfloat16(p[i]);
  return load(wide);
#endif
}

inline void store_bfloat16(uint16_t* p, Floats x) {
#if defined(VQ_LANES512)
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan,
                                             _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(kept));
#elif defined(VQ_NEON)
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x.v[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint16x4_t kept = vaddhn_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint16x4_t number = vmovn_u32(vceqq_f32(x.v[i], x.v[i]));
    vst1_u16(p + 4 * i, vbsl_u16(number, kept, vdup_n_u16(0x7fc0)));
  }
#else
  float wide[kLanes];
  store(wide, x);
  for (int i = 0; i < kLanes; ++i) p[i] = to_bfloat16(wide[i]);
#endif
}

// Gathers the largest exponent seen; NaN and infinity have the largest there is.
class FiniteCheck {
 public:
  void see(Floats x) { largest_ = larger(largest_, bits_of(x) & all_int(0x7f800000)); }
  bool failed() const { return largest_of(largest_) == 0x7f800000; }

 private:
  Ints largest_ = all_int(0);
};

}  // namespace
}  // namespace vq
