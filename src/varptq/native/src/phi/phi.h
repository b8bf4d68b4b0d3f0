// C interface of phi, the map of the token pyramid.
//
// Shapes: B images, Cvae channels, P side of the token map.
#pragma once

#include <stdint.h>

#include "varptq.h"

#ifdef __cplusplus
extern "C" {
#endif

// out = f_hat + (h + conv3x3(h) + bias) / 2, zero padding.
typedef struct {
  int64_t batch, channels, side;  // B, Cvae, P
  const float* h;                 // (B, Cvae, P, P)
  const float* weight;            // (Cvae, Cvae, 3, 3)
  const float* bias;              // (Cvae)
  const float* f_hat;             // (B, Cvae, P, P)
  float* out;                     // (B, Cvae, P, P)
  int32_t threads;
} vq_phi_args;

VQ_API int vq_phi(const vq_phi_args* args);

#ifdef __cplusplus
}
#endif
