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
#endif

// VQ_VNNI256: the byte product of AVX-VNNI on two halves, also where its encoding is AVX512VL's.
#if defined(__AVX512F__) && !defined(VQ_VNNI256)
#define VQ_LANES512
#endif

namespace vq {
namespace {

constexpr int kLanes = 16;

}  // namespace
}  // namespace vq

#if defined(VQ_LANES512)
#include "lanes/lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes/lanes_avx2.h"
#else
#include "lanes/lanes_portable.h"
#endif
