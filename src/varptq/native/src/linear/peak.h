// What the product instruction alone reaches, on registers.
#pragma once

#include <ctime>

#include "lanes/products.h"

namespace vq {
namespace {

inline double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Operations (two per multiply-add) a second of the product alone, on registers.
template <class Dot>
inline double measured_peak() {
  constexpr int64_t kTurns = 200000;
#if defined(VQ_LANES512)
  constexpr int kSums = 12;
#else
  constexpr int kSums = 6;  // of two or four registers each
#endif
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    constexpr uint8_t kOnes[4 * kLeftSteps] = {1, 1, 1, 1};
    Left a = load_left<1>(kOnes);
    Ints sums[kSums], b = all_int(0x01010101);
    for (int i = 0; i < kSums; ++i) sums[i] = all_int(i);
    const double start = seconds();
    for (int64_t turn = 0; turn < kTurns; ++turn) {
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) {
        sums[i] = Dot::template dot<0>(sums[i], a, b);
#if defined(VQ_LANES512)
        __asm__ volatile("" : "+v"(sums[i].v));
#elif defined(__AVX2__)
        // Of the operand too, of which AVX2 would else compute its first step once for all.
        __asm__ volatile("" : "+x"(sums[i].v), "+x"(sums[i].w), "+x"(a.v), "+x"(a.w));
#elif defined(VQ_NEON)
        pin(sums[i]);
#endif
      }
    }
    const double took = seconds() - start;
    Ints all_sums = sums[0];
    for (int i = 1; i < kSums; ++i) all_sums = all_sums + sums[i];
    volatile int32_t keep = sum_of(all_sums);
    (void)keep;
    const double rate = 2.0 * kLanes * Dot::kLaneBytes * kSums * kTurns / took / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace
}  // namespace vq
