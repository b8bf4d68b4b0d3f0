// The operations of lanes.h in four registers of NEON, with the byte products of the extension
// DotProd or, where the compiler may use it, I8MM. Included by lanes.h only.
#pragma once

namespace vq {
namespace {

struct Floats {
  float32x4_t v[4];
};
struct Ints {
  int32x4_t v[4];
};

inline void pin(Ints& x) {  // in registers here
  asm("" : "+w"(x.v[0]), "+w"(x.v[1]), "+w"(x.v[2]), "+w"(x.v[3]));
}

// function(i) for each register.
template <class To, class Function>
VQ_INLINE To quarterwise(Function function) {
  return {{function(0), function(1), function(2), function(3)}};
}
inline int8x16_t bytes_of(int32x4_t x) { return vreinterpretq_s8_s32(x); }
inline uint8x16_t unsigned_bytes_of(int32x4_t x) { return vreinterpretq_u8_s32(x); }

inline Floats all(float x) {
  return quarterwise<Floats>([&](int) { return vdupq_n_f32(x); });
}
inline Ints all_int(int32_t x) {
  return quarterwise<Ints>([&](int) { return vdupq_n_s32(x); });
}
inline Floats load(const float* p) {
  return quarterwise<Floats>([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline Ints load(const int32_t* p) {
  // Of bytes: what is read so may lie at any address.
  const auto* q = reinterpret_cast<const uint8_t*>(p);
  return quarterwise<Ints>([&](int i) { return vreinterpretq_s32_u8(vld1q_u8(q + 16 * i)); });
}
inline void store(float* p, Floats x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
inline void store(int32_t* p, Ints x) {
  auto* q = reinterpret_cast<uint8_t*>(p);
  for (int i = 0; i < 4; ++i) vst1q_u8(q + 16 * i, vreinterpretq_u8_s32(x.v[i]));
}
inline Floats operator+(Floats a, Floats b) {
  return quarterwise<Floats>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline Floats operator-(Floats a, Floats b) {
  return quarterwise<Floats>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline Floats operator*(Floats a, Floats b) {
  return quarterwise<Floats>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline Floats operator/(Floats a, Floats b) {
  return quarterwise<Floats>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
// a where x < y, else b.
inline Floats where_less(Floats x, Floats y, Floats a, Floats b) {
  return quarterwise<Floats>(
      [&](int i) { return vbslq_f32(vcltq_f32(x.v[i], y.v[i]), a.v[i], b.v[i]); });
}
// By comparing, since NEON's own smallest is NaN where one of the two is.
inline Floats smaller(Floats a, Floats b) { return where_less(a, b, a, b); }
inline Floats larger(Floats a, Floats b) { return where_less(b, a, a, b); }
inline Ints operator+(Ints a, Ints b) {
  return quarterwise<Ints>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
inline Ints operator-(Ints a, Ints b) {
  return quarterwise<Ints>([&](int i) { return vsubq_s32(a.v[i], b.v[i]); });
}
inline Ints operator&(Ints a, Ints b) {
  return quarterwise<Ints>([&](int i) { return vandq_s32(a.v[i], b.v[i]); });
}
inline Ints operator|(Ints a, Ints b) {
  return quarterwise<Ints>([&](int i) { return vorrq_s32(a.v[i], b.v[i]); });
}
inline Ints larger(Ints a, Ints b) {
  return quarterwise<Ints>([&](int i) { return vmaxq_s32(a.v[i], b.v[i]); });
}
inline Ints smaller(Ints a, Ints b) {
  return quarterwise<Ints>([&](int i) { return vminq_s32(a.v[i], b.v[i]); });
}
inline Ints shift_left(Ints a, int bits) {
  return quarterwise<Ints>([&](int i) { return vshlq_s32(a.v[i], vdupq_n_s32(bits)); });
}
inline Ints shift_right(Ints a, int bits) {  // of the sign, too
  return quarterwise<Ints>([&](int i) { return vshlq_s32(a.v[i], vdupq_n_s32(-bits)); });
}
template <int bits>
inline Ints shift_left(Ints a) {
  return quarterwise<Ints>([&](int i) { return vshlq_n_s32(a.v[i], bits); });
}
template <int bits>
inline Ints shift_right(Ints a) {
  return quarterwise<Ints>([&](int i) { return vshrq_n_s32(a.v[i], bits); });
}
inline Ints bits_of(Floats x) {
  return quarterwise<Ints>([&](int i) { return vreinterpretq_s32_f32(x.v[i]); });
}
inline Floats floats_of(Ints x) {
  return quarterwise<Floats>([&](int i) { return vreinterpretq_f32_s32(x.v[i]); });
}
inline Floats to_float(Ints x) {
  return quarterwise<Floats>([&](int i) { return vcvtq_f32_s32(x.v[i]); });
}
inline Floats rounded(Floats x) {
  return quarterwise<Floats>([&](int i) { return vrndnq_f32(x.v[i]); });
}
inline Ints to_int(Floats x) {
  return quarterwise<Ints>([&](int i) { return vcvtnq_s32_f32(x.v[i]); });
}
// The low byte of each lane.
inline void store_bytes(void* p, Ints x) {
  const auto low = [](int32x4_t a, int32x4_t b) {  // every second byte of both
    return vreinterpretq_s32_u8(vuzp1q_u8(unsigned_bytes_of(a), unsigned_bytes_of(b)));
  };
  const int32x4_t bytes = low(low(x.v[0], x.v[1]), low(x.v[2], x.v[3]));
  vst1q_u8(static_cast<uint8_t*>(p), unsigned_bytes_of(bytes));
}
inline Ints load_u8(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_high_u8(x);
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
           vreinterpretq_s32_u32(vmovl_high_u16(low)),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
           vreinterpretq_s32_u32(vmovl_high_u16(high))}};
}
// Entries of a table of 16 bytes, repeated by `all_entries`, at 64 indices below 16.
inline Ints all_entries(const int8_t* table) {
  const int32x4_t entries = vreinterpretq_s32_s8(vld1q_s8(table));
  return quarterwise<Ints>([&](int) { return entries; });
}
inline Ints entries_at(Ints table, Ints indices) {
  return quarterwise<Ints>([&](int i) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(bytes_of(table.v[i]), unsigned_bytes_of(indices.v[i])));
  });
}

// The left operand of four products, 16 codes of a row, of which each product repeats four.
constexpr int kLeftSteps = 4;

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int32_t kLeftShift = 0;
struct Left {
  uint8x16_t v;
};
inline Left left_of(uint8x16_t codes) { return {codes}; }
template <int step>
inline Ints dot_left(Ints sum, Left codes, Ints s8) {
  return quarterwise<Ints>(
      [&](int i) { return vsudotq_laneq_s32(sum.v[i], bytes_of(s8.v[i]), codes.v, step); });
}
inline Ints dot4(Ints sum, Ints u8, Ints s8) {
  return quarterwise<Ints>([&](int i) {
    return vusdotq_s32(sum.v[i], unsigned_bytes_of(u8.v[i]), bytes_of(s8.v[i]));
  });
}
#else
// Signed bytes are multiplied with signed ones alone, so codes lose 128.
constexpr int32_t kLeftShift = 128;
struct Left {
  int8x16_t v;
};
inline Left left_of(uint8x16_t codes) {
  return {vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128)))};
}
template <int step>
inline Ints dot_left(Ints sum, Left codes, Ints s8) {
  return quarterwise<Ints>(
      [&](int i) { return vdotq_laneq_s32(sum.v[i], bytes_of(s8.v[i]), codes.v, step); });
}
// sum += the four bytes of each lane.
inline Ints sum4(Ints sum, Ints s8) {
  return quarterwise<Ints>(
      [&](int i) { return vdotq_s32(sum.v[i], bytes_of(s8.v[i]), vdupq_n_s8(1)); });
}
// With what the shift takes, for products outside of inner loops.
inline Ints dot4(Ints sum, Ints u8, Ints s8) {
  const Ints shifted = quarterwise<Ints>([&](int i) {
    return vdotq_s32(sum.v[i], left_of(unsigned_bytes_of(u8.v[i])).v, bytes_of(s8.v[i]));
  });
  return shifted + shift_left<7>(sum4(all_int(0), s8));
}
#endif

// kLeftSteps times four codes, or four that are repeated.
template <int steps>
inline Left load_left(const uint8_t* codes) {
  if constexpr (steps == kLeftSteps) return left_of(vld1q_u8(codes));
  uint32_t four;
  std::memcpy(&four, codes, sizeof four);
  return left_of(vreinterpretq_u8_u32(vdupq_n_u32(four)));
}

inline Ints dot2(Ints sum, Ints a, Ints b) {  // int16 pairs
  return quarterwise<Ints>([&](int i) {
    const int16x8_t x = vreinterpretq_s16_s32(a.v[i]), y = vreinterpretq_s16_s32(b.v[i]);
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
    return vaddq_s32(sum.v[i], vpaddq_s32(low, vmull_high_s16(x, y)));
  });
}
inline float sum_of(Floats x) {
  const float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float largest_of(Floats x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}
inline float smallest_of(Floats x) {
  return vminvq_f32(vminq_f32(vminq_f32(x.v[0], x.v[1]), vminq_f32(x.v[2], x.v[3])));
}
inline int32_t sum_of(Ints x) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])));
}
inline int32_t largest_of(Ints x) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3])));
}

}  // namespace
}  // namespace vq
