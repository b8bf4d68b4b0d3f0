// C interface of the sampler: from logits to token ids.
//
// Shapes: B images, l tokens of a scale, V codebook.
#pragma once

#include <stdint.h>

#include "varptq.h"

#ifdef __cplusplus
extern "C" {
#endif

// Guidance, top-k, top-p and a draw, per row; ties at the border of top-p go by index.
//   logit = (1 + t) cond - t uncond     id = argmax(logit + temperature g) over what is kept
typedef struct {
  int64_t rows, vocabulary;       // B l, V
  const float* logits;            // (B l, V) conditional
  const float* unconditional;     // (B l, V) or NULL
  float guidance;                 // t
  float guidance_plus_one;        // 1 + t, rounded once by the caller
  int64_t top_k;                  // 0: off
  double top_p;                   // 0 or 1: off
  float temperature;
  const float* uniform;           // (B l, V) in (0, 1), or NULL
  int64_t* ids;                   // (B l); needs uniform
  float* filtered;                // (B l, V) logits, -inf where dropped, or NULL
  int64_t* bad_row;               // first row with NaN or without a finite candidate
  int32_t threads;
} vq_sample_args;

VQ_API int vq_sample(const vq_sample_args* args);  // VQ_NON_FINITE: see bad_row

#ifdef __cplusplus
}
#endif
