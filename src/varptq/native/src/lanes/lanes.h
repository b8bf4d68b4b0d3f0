// Sixteen numbers at a time, the same bits on every instruction set.
//
//   Floats  16 float32     Ints  16 int32     dot4  int32 += sum of 4 products u8 x s8 per lane
//
// One kernel written on these compiles to one, two or sixteen instructions per operation, chosen by
// the flags of the translation unit, so everything has internal linkage. Each operation rounds once
// (no fused multiply-add), and a horizontal sum is the tree i, i+8; i, i+4; i, i+2; i, i+1: hence
// results do not depend on the instruction set. There is no masking: callers pad to 16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
// GCC 12 takes the deliberately undefined registers of its own header for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(VQ_NEON)
#include <arm_neon.h>
#endif

// VQ_VNNI256: the byte product of AVX-VNNI on two halves, also where its encoding is AVX512VL's.
#if defined(__AVX512F__) && !defined(VQ_VNNI256)
#define VQ_LANES512
#endif

// Sums stay in registers only where everything that touches them is one function.
#define VQ_INLINE __attribute__((always_inline)) inline
#define VQ_INLINED __attribute__((always_inline))  // of a lambda

namespace vq {
namespace {

constexpr int kLanes = 16;

}  // namespace
}  // namespace vq

#if defined(VQ_LANES512)
#include "lanes/lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes/lanes_avx2.h"
#elif defined(VQ_NEON)
#include "lanes/lanes_neon.h"
#else
#include "lanes/lanes_portable.h"
#endif

#if !defined(VQ_NEON)
namespace vq {
namespace {

// The left operand of a product, four codes of a row in every lane. NEON's holds those of
// kLeftSteps products, each less kLeftShift.
constexpr int kLeftSteps = 1;
constexpr int32_t kLeftShift = 0;
using Left = Ints;

template <int steps>
inline Left load_left(const uint8_t* codes) {
  int32_t four;
  std::memcpy(&four, codes, sizeof four);
  return all_int(four);
}
template <int step>
inline Ints dot_left(Ints sum, Left codes, Ints s8) {
  return dot4(sum, codes, s8);
}

}  // namespace
}  // namespace vq
#endif
