// exp, log and GELU in lanes of 16, by polynomials of our own.
//
//   exp x = 2^n p(f),  x log2(e) = n + f, |f| <= 1/2     log x = e ln 2 + f - f^2/2 + f^3 q(f)
//
// Sums and products round once each, a sum with a product of exp's polynomial once together, and
// nothing comes from libm: so a value has the same bits in every lane, on every instruction set and
// in every tail. Relative errors, from a sweep over the whole range
// (tests/native/attention_test.cpp): exp 2e-7 + 8e-8 |x|, log 2e-7.
#pragma once

#include "lanes/lanes_more.h"

namespace vq {
namespace {

// e^x for -87 <= x <= 88 (below, 2^n would be subnormal); the caller clamps. exp(0) is 1.
inline Floats exp_within(Floats x) {
  // Adding 1.5 2^23 rounds to an integer and leaves it in the low bits.
  const Floats shift = all(12582912.0f);
  const Floats y = x * all(1.44269504f);
  const Floats shifted = y + shift;
  const Floats f = y - (shifted - shift);
  Floats p = all(0x1.5bba18p-10f);
  p = fused(p, f, all(0x1.3cea88p-7f));
  p = fused(p, f, all(0x1.c6b752p-5f));
  p = fused(p, f, all(0x1.ebf9bcp-3f));
  p = fused(p, f, all(0x1.62e42ap-1f));
  p = fused(p, f, all(1.0f));
  return floats_of(bits_of(p) + shift_left<23>(bits_of(shifted)));
}

// e^x, x clamped to [-87, 88].
inline Floats exp_of(Floats x) { return exp_within(smaller(larger(x, all(-87.0f)), all(88.0f))); }

// Natural logarithm of a normal, positive x.
inline Floats log_of(Floats x) {
  // Exponent and a mantissa in [sqrt(1/2), sqrt(2)), so that f is small on both sides of 1.
  const Ints bits = bits_of(x) - all_int(0x3F3504F3);
  const Floats e = to_float(shift_right<23>(bits));
  const Floats m = floats_of((bits & all_int(0x007FFFFF)) + all_int(0x3F3504F3));
  const Floats f = m - all(1.0f);
  Floats q = all(-0x1.38b572p-4f);
  q = q * f + all(0x1.055b66p-3f);
  q = q * f + all(-0x1.0d8542p-3f);
  q = q * f + all(0x1.22da1ep-3f);
  q = q * f + all(-0x1.547244p-3f);
  q = q * f + all(0x1.99a008p-3f);
  q = q * f + all(-0x1.000226p-2f);
  q = q * f + all(0x1.555554p-2f);
  const Floats square = f * f;
  // ln 2 in two parts: e times the first is exact.
  const Floats low = e * all(-2.12194440e-4f) + (square * f * q - all(0.5f) * square);
  return e * all(0.693359375f) + (f + low);
}

// log(1 - u) for 0 < u < 1 with 1 - u normal; exact to rounding also for small u.
inline Floats log_one_minus(Floats u) {
  const Floats w = all(1.0f) - u;
  return log_of(w) + ((all(1.0f) - w) - u) / w;
}

// GELU with tanh: x / (1 + exp(-2 u)), u = sqrt(2/pi) (x + 0.044715 x^3).
inline Floats gelu_of(Floats x) {
  const Floats cube = x * x * x;
  const Floats exponent = all(-2.0f * 0.79788456f) * (x + all(0.044715f) * cube);
  return x / (all(1.0f) + exp_of(exponent));
}

}  // namespace
}  // namespace vq
