// What the tests compare with the portable kernels: every other instruction set, those for tests
// included. Sets that do not run here are refused by vq_select_isa.
#pragma once

#include "varptq.h"

constexpr const char* kSets[] = {"avx2",         "avxvnni",   "avx512vnni",   "amx",
                                 "neon-dotprod", "neon-i8mm", "amx-emulated", "avxvnni-evex"};

// How many of them run here; a machine that has some by its features has to run them.
inline int sets_here() {
  int count = 0;
  for (const char* name : kSets) count += vq_select_isa(name) == VQ_OK;
  return count;
}
