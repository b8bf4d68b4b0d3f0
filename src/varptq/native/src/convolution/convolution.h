// C interface of convolutions on codes: weights packed once, maps of floats to maps of codes, and
// codes times weights.
//
// Shapes: N images, H and W sides of the input, Ho and Wo of the output, C channels in, O out, Cp =
// C rounded up to 4, G groups of the norm, P panels of 64 outputs.
//
// A map of codes is (N, H + 2, W + 2, Cp) bytes with a border of one pixel, which holds the image's
// zero point as padding does; channels from C on hold 0. vq_map_bytes says how large it is: kernels
// read a little beyond the last pixel.
#pragma once

#include <stdint.h>

#include "varptq.h"

#ifdef __cplusplus
extern "C" {
#endif

// Per image and channel: sum and sum of squares, smallest and largest. Sums are in double: rounded
// to float, their order leaves no trace.
typedef struct {
  double* sum;     // (N, C)
  double* square;  // (N, C)
  float* low;      // (N, C)
  float* high;     // (N, C)
} vq_moments;

// Weights to panels of 64 outputs; in a panel, kernel row by kernel row, for every 4 of the row's
// (Wk, Cp) inputs 64 columns of 4 bytes. Kernel rows are padded to 64 inputs. Padding is 0.
typedef struct {
  int64_t outputs, inputs;                // O, C
  int64_t kernel_height, kernel_width;    // Hk, Wk
  const int8_t* codes;                    // (O, C, Hk, Wk)
  uint8_t* packed;                        // vq_kernel_bytes
  int32_t* panel_sum;                     // (P, 64) sums of an output's weights
  int32_t threads;
} vq_pack_kernel_args;

// y = float(P') (sa sw) + bias + residual, each rounded, P' = sum of (a - za) w, exact.
typedef struct {
  int64_t images, height, width;          // N, H, W
  int64_t inputs, outputs;                // C, O
  int64_t kernel_height, kernel_width;    // 1 .. 3
  int64_t stride;                         // 1 or 2
  int64_t left, right, top, bottom;       // padding, 0 or 1
  int32_t upsample;                       // nearest, twice the side, before everything else
  const uint8_t* codes;                   // a map
  const float* scale;                     // (N)
  const int32_t* zero_point;              // (N) 0 .. 255
  const uint8_t* packed;
  const int32_t* panel_sum;               // (P, 64)
  const float* panel_scale;               // (P, 64)
  const float* panel_bias;                // (P, 64)
  const float* residual;                  // NULL or (N, Ho, Wo, O)
  float* y;                               // (N, Ho, Wo, O)
  vq_moments moments;                     // of y; sum NULL: not wanted
  int32_t threads;
} vq_convolution_args;

// v = x, or with groups v = x a + b, a = gain / sqrt(variance + eps), b = shift - mean a, each
// operation rounded, mean and 1 / sqrt in double and then rounded; with silu v / (1 + exp(-v)).
// Codes are those of varptq.quant.affine with the range of v: from its ends, or with silu what
// those leave possible (the lowest point of SiLU lies within or beyond them).
typedef struct {
  int64_t images, height, width, channels;
  const float* x;                         // (N, H, W, C)
  vq_moments moments;                     // of x
  int32_t has_moments;                    // 0: they are computed first
  int64_t groups;                         // 0: no norm
  const float* gain;                      // (C)
  const float* shift;                     // (C)
  double eps;
  int32_t silu;
  uint8_t* codes;                         // a map
  float* scale;                           // (N)
  int32_t* zero_point;                    // (N)
  int32_t threads;
} vq_map_codes_args;

VQ_API int64_t vq_map_bytes(int64_t images, int64_t height, int64_t width, int64_t channels);
VQ_API int64_t vq_kernel_bytes(int64_t outputs, int64_t inputs, int64_t height, int64_t width);
VQ_API int vq_pack_kernel(const vq_pack_kernel_args* args);
VQ_API int vq_convolution(const vq_convolution_args* args);
// VQ_NON_FINITE where x, or with a norm what that makes of it, holds NaN or infinity.
VQ_API int vq_map_codes(const vq_map_codes_args* args);

#ifdef __cplusplus
}
#endif
