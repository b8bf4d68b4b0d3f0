// Sixteen sums in double, for statistics: the square of a float is exact there.
#pragma once

#include "lanes/lanes.h"

namespace vq {
namespace {

#if defined(VQ_LANES512)
struct Doubles {
  __m512d v[2];
};
inline Doubles load(const double* p) { return {{_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}}; }
inline void store(double* p, Doubles x) {
  _mm512_storeu_pd(p, x.v[0]);
  _mm512_storeu_pd(p + 8, x.v[1]);
}
inline Doubles widened(Floats x) {
  return {{_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)),
           _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))}};
}
inline Doubles operator+(Doubles a, Doubles b) {
  return {{_mm512_add_pd(a.v[0], b.v[0]), _mm512_add_pd(a.v[1], b.v[1])}};
}
inline Doubles operator*(Doubles a, Doubles b) {
  return {{_mm512_mul_pd(a.v[0], b.v[0]), _mm512_mul_pd(a.v[1], b.v[1])}};
}
#elif defined(VQ_NEON)
struct Doubles {
  float64x2_t v[8];
};
template <class Function>
inline Doubles pairwise(Function function) {
  return {{function(0), function(1), function(2), function(3), function(4), function(5),
           function(6), function(7)}};
}
inline Doubles load(const double* p) {
  return pairwise([&](int i) { return vld1q_f64(p + 2 * i); });
}
inline void store(double* p, Doubles x) {
  for (int i = 0; i < 8; ++i) vst1q_f64(p + 2 * i, x.v[i]);
}
inline Doubles widened(Floats x) {
  return pairwise([&](int i) {
    const float32x4_t four = x.v[i / 2];
    return i % 2 ? vcvt_high_f64_f32(four) : vcvt_f64_f32(vget_low_f32(four));
  });
}
inline Doubles operator+(Doubles a, Doubles b) {
  return pairwise([&](int i) { return vaddq_f64(a.v[i], b.v[i]); });
}
inline Doubles operator*(Doubles a, Doubles b) {
  return pairwise([&](int i) { return vmulq_f64(a.v[i], b.v[i]); });
}
#elif defined(__AVX2__)
struct Doubles {
  __m256d v[4];
};
template <class Function>
inline Doubles quarterwise(Function function) {
  return {{function(0), function(1), function(2), function(3)}};
}
inline Doubles load(const double* p) {
  return quarterwise([&](int i) { return _mm256_loadu_pd(p + 4 * i); });
}
inline void store(double* p, Doubles x) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, x.v[i]);
}
inline Doubles widened(Floats x) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.v)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(x.w)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(x.w, 1))}};
}
inline Doubles operator+(Doubles a, Doubles b) {
  return quarterwise([&](int i) { return _mm256_add_pd(a.v[i], b.v[i]); });
}
inline Doubles operator*(Doubles a, Doubles b) {
  return quarterwise([&](int i) { return _mm256_mul_pd(a.v[i], b.v[i]); });
}
#else
struct Doubles {
  double v[kLanes];
};
inline Doubles load(const double* p) {
  Doubles out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
inline void store(double* p, Doubles x) { std::memcpy(p, &x, sizeof x); }
inline Doubles widened(Floats x) {
  return lanewise<Doubles>([&](int i) { return static_cast<double>(x.v[i]); });
}
inline Doubles operator+(Doubles a, Doubles b) {
  return lanewise<Doubles>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Doubles operator*(Doubles a, Doubles b) {
  return lanewise<Doubles>([&](int i) { return a.v[i] * b.v[i]; });
}
#endif

}  // namespace
}  // namespace vq
