// One row of the sampler: buffers and the kernel that each instruction set provides. Plain data
// only, as in attention/kernel.h.
#pragma once

#include "machine/isa.h"
#include "sampler/sampler.h"

namespace vq {

// Buffers of one worker, each of V rounded up to 16 elements and 16 more.
struct SampleScratch {
  float* logits;    // guided, -infinity behind the last
  float* chosen;    // logits of the candidates, in the order of their index
  int32_t* index;   // of the candidates
  float* weights;   // their exponentials, later their Gumbel noise
};

// False where the row holds NaN or +infinity, or no finite logit.
using SampleRow = bool (*)(const vq_sample_args&, int64_t row, const SampleScratch&);

SampleRow sample_kernel(Set<Isa::portable>);
SampleRow sample_kernel(Set<Isa::avx2>);
SampleRow sample_kernel(Set<Isa::avx512vnni>);
SampleRow sample_kernel(Set<Isa::neon_dotprod>);

}  // namespace vq
