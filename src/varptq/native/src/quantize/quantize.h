// C interface of the quantizer of Linear inputs: rows of floats to codes.
//
// Shapes: M rows, K inputs, Ga groups along K, S segments (the finer of the groups of activations
// and of weights), L true length of a segment, Lp = L rounded up to 64.
#pragma once

#include <stdint.h>

#include "varptq.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { VQ_NONE = 0, VQ_NORM = 1, VQ_GELU = 2 };

// Rows of floats to codes. Per row: prologue, minus the row's mean, rotation, then per group
//   s = (hi - lo) / (2^b - 1)   z = clamp(rint(-lo / s))   a = clamp(rint(x / s) + z)
// with lo = min(0, min x), hi = max(0, max x). Sign-split rows become two: row 2m holds the codes
// of the positive values and row 2m + 1 those of the negative ones, whose scale is negative; their
// zero points are 0. With a codebook (quantize/codebook.h) codes are its entries plus 128 and zero
// points 128: to a product, rows of 8 bits.
typedef struct {
  int64_t rows, width;            // M, K
  const void* x;                  // (M, K), rows row_stride elements apart
  int64_t row_stride;
  int32_t x_type;                 // VQ_FLOAT32 or VQ_BFLOAT16
  int32_t prologue;               // VQ_NORM: LayerNorm (1 + gain) + shift; VQ_GELU: tanh form
  const float* gain;              // VQ_NORM: (images, K), rows modulation_stride apart
  const float* shift;
  int64_t modulation_stride;
  int64_t rows_per_image;         // row m takes row m / rows_per_image of gain and shift
  float eps;
  int32_t hadamard;               // block of the rotation, a power of two, or 0
  const float* means;             // (rows of means, K) or NULL
  const int32_t* mean_row;        // (rows_per_image) which row of means; NULL: row 0
  int32_t num_bits;               // 2 .. 8
  int32_t sign_split;
  vq_codebook codebook;
  int64_t group;                  // channels per scale, divides K
  int64_t segment;                // channels per segment, divides group
  uint8_t* codes;                 // (M or 2M, S Lp); padding is set to 0
  float* scale;                   // (M or 2M, Ga)
  int32_t* zero_point;            // (M or 2M, Ga)
  int32_t* sum;                   // (M or 2M, S) sums of codes
  float* values;                  // NULL, or (M, K) what was quantized, for tests
  int32_t threads;
} vq_quantize_args;

VQ_API int vq_quantize(const vq_quantize_args* args);

#ifdef __cplusplus
}
#endif
