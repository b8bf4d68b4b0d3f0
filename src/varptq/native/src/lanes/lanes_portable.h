// The operations of lanes.h in plain loops: what the others must equal. Included by
// lanes.h only.
#pragma once

namespace vq {
namespace {

struct Floats {
  float v[kLanes];
};
struct Ints {
  int32_t v[kLanes];
};
inline void pin(Ints&) {}  // registers are the compiler's business here

template <class To, class Function>
inline To lanewise(Function function) {
  To out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = function(i);
  return out;
}
template <class To, class From>
inline To same_bits(From x) {
  To out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

inline Floats all(float x) {
  return lanewise<Floats>([&](int) { return x; });
}
inline Ints all_int(int32_t x) {
  return lanewise<Ints>([&](int) { return x; });
}
inline Floats load(const float* p) {
  return lanewise<Floats>([&](int i) { return p[i]; });
}
inline Ints load(const int32_t* p) {
  Ints out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
inline void store(int32_t* p, Ints x) { std::memcpy(p, &x, sizeof x); }
inline Floats operator+(Floats a, Floats b) {
  return lanewise<Floats>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats operator-(Floats a, Floats b) {
  return lanewise<Floats>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Floats operator*(Floats a, Floats b) {
  return lanewise<Floats>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Floats operator/(Floats a, Floats b) {
  return lanewise<Floats>([&](int i) { return a.v[i] / b.v[i]; });
}
inline Floats smaller(Floats a, Floats b) {
  return lanewise<Floats>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats larger(Floats a, Floats b) {
  return lanewise<Floats>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Ints operator+(Ints a, Ints b) {
  return lanewise<Ints>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Ints operator-(Ints a, Ints b) {
  return lanewise<Ints>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Ints operator&(Ints a, Ints b) {
  return lanewise<Ints>([&](int i) { return a.v[i] & b.v[i]; });
}
inline Ints operator|(Ints a, Ints b) {
  return lanewise<Ints>([&](int i) { return a.v[i] | b.v[i]; });
}
inline Ints larger(Ints a, Ints b) {
  return lanewise<Ints>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Ints smaller(Ints a, Ints b) {
  return lanewise<Ints>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
template <int bits>
inline Ints shift_left(Ints a) {
  return lanewise<Ints>(
      [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << bits); });
}
template <int bits>
inline Ints shift_right(Ints a) {  // of the sign, too
  return lanewise<Ints>([&](int i) { return a.v[i] >> bits; });
}
inline Ints shift_left(Ints a, int bits) {
  return lanewise<Ints>(
      [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << bits); });
}
inline Ints shift_right(Ints a, int bits) {
  return lanewise<Ints>([&](int i) { return a.v[i] >> bits; });
}
inline Ints bits_of(Floats x) { return same_bits<Ints>(x); }
inline Floats floats_of(Ints x) { return same_bits<Floats>(x); }
inline Floats to_float(Ints x) {
  return lanewise<Floats>([&](int i) { return static_cast<float>(x.v[i]); });
}
inline Floats rounded(Floats x) {
  return lanewise<Floats>([&](int i) { return std::nearbyintf(x.v[i]); });
}
inline Ints to_int(Floats x) {
  return lanewise<Ints>([&](int i) { return static_cast<int32_t>(std::nearbyintf(x.v[i])); });
}
// a where x < y, else b.
inline Floats where_less(Floats x, Floats y, Floats a, Floats b) {
  return lanewise<Floats>([&](int i) { return x.v[i] < y.v[i] ? a.v[i] : b.v[i]; });
}
// The low byte of each lane.
inline void store_bytes(void* p, Ints x) {
  for (int i = 0; i < kLanes; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(x.v[i]);
}
inline Ints load_u8(const uint8_t* p) {
  return lanewise<Ints>([&](int i) { return static_cast<int32_t>(p[i]); });
}
// Entries of a table of 16 bytes, repeated by `all_entries`, at 64 indices below 16.
inline Ints all_entries(const int8_t* table) {
  Ints all;
  for (int i = 0; i < 4; ++i) std::memcpy(all.v + 4 * i, table, 16);
  return all;
}
inline Ints entries_at(Ints table, Ints indices) {
  uint8_t entries[4 * kLanes], at[4 * kLanes];
  std::memcpy(entries, &table, sizeof entries);
  std::memcpy(at, &indices, sizeof at);
  for (int i = 0; i < 4 * kLanes; ++i) at[i] = entries[at[i]];
  Ints found;
  std::memcpy(&found, at, sizeof at);
  return found;
}
inline Ints dot4(Ints sum, Ints u8, Ints s8) {
  uint8_t a[4 * kLanes];
  int8_t b[4 * kLanes];
  std::memcpy(a, &u8, sizeof a);
  std::memcpy(b, &s8, sizeof b);
  for (int i = 0; i < 4 * kLanes; ++i) sum.v[i / 4] += a[i] * b[i];
  return sum;
}
inline Ints dot2(Ints sum, Ints a, Ints b) {  // int16 pairs
  int16_t x[2 * kLanes], y[2 * kLanes];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < 2 * kLanes; ++i) sum.v[i / 2] += x[i] * y[i];
  return sum;
}
inline float sum_of(Floats x) {
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) x.v[i] += x.v[i + step];
  return x.v[0];
}
inline float largest_of(Floats x) {
  for (float lane : x.v) x.v[0] = lane > x.v[0] ? lane : x.v[0];
  return x.v[0];
}
inline float smallest_of(Floats x) {
  for (float lane : x.v) x.v[0] = lane < x.v[0] ? lane : x.v[0];
  return x.v[0];
}
inline int32_t sum_of(Ints x) {
  int32_t sum = 0;
  for (int32_t lane : x.v) sum += lane;
  return sum;
}
inline int32_t largest_of(Ints x) {
  for (int32_t lane : x.v) x.v[0] = lane > x.v[0] ? lane : x.v[0];
  return x.v[0];
}

}  // namespace
}  // namespace vq
