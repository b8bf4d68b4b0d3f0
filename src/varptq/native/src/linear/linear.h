// C interface of the integer Linear: weights packed once, then codes times weights.
//
// Shapes: M rows, K inputs, N outputs, G groups along K (Ga of activations, Gw of weights), S
// segments (the finer of both), L true length of a segment, Lp = L rounded up to 64.
#pragma once

#include <stdint.h>

#include "varptq.h"

#ifdef __cplusplus
extern "C" {
#endif

// Weight codes to the layout of the kernels: panels of 64 outputs; in a panel, for every 4 inputs,
// 64 columns of 4 bytes. Stored value w: the code up to 7 bits, code - 128 at 8, where zero points
// are shifted alike. 4 bits and below: bytes hold two codes, of input k in the low and k + 64 in
// the high half. Padding has stored value 0. With a table of 16 entries the stored value is the
// code's entry; bytes then hold codes (up to 4 bits), those of padding 0, which meet inputs of 0.
typedef struct {
  int64_t outputs, inputs;        // N, K
  const uint8_t* codes;           // (N, K)
  const int32_t* zero_point;      // (N, Gw) of the codes
  const float* scale;             // (N, Gw)
  int32_t num_bits;
  const int8_t* table;            // NULL or 16 entries
  int64_t group, segment;
  uint8_t* packed;                // vq_packed_bytes
  float* panel_scale;             // (ceil(N / 64), Gw, 64)
  int32_t* panel_zero;            // (ceil(N / 64), Gw, 64), of the stored values
  int32_t* panel_sum;             // (ceil(N / 64), S, 64), sums of the stored values
  int32_t threads;
} vq_pack_args;

// P' = sum over a segment of (a - za)(w - zw), exact; t = sum over a weight group's activation
// groups of sa P', acc = sum over weight groups of sw t, one fma each, in ascending order.
//   one scale per row and output      y = fma(P', sa sw, bias)
//   one scale per row, weight groups  acc = fma(P', sw, acc), y = fma(acc, sa, bias)
//   activation groups                 t = fma(P', sa, t), acc = fma(t, sw, acc), y = acc + bias
// Row pairs (sign split): as with bias 0, y = (first + second) + bias.
typedef struct {
  int64_t rows;                   // M, or 2M where pairs is set
  int64_t outputs, inputs;
  int64_t row_group, weight_group, segment;
  int32_t row_bits, weight_bits;
  int32_t pairs;
  const uint8_t* codes;
  const float* scale;
  const int32_t* zero_point;
  const int32_t* sum;
  const uint8_t* packed;
  const int8_t* table;            // of vq_pack
  const float* panel_scale;
  const int32_t* panel_zero;
  const int32_t* panel_sum;
  const float* bias;              // NULL or (bias rows, N)
  const int32_t* bias_row;        // (rows_per_image) which row of bias; NULL: row 0
  int64_t rows_per_image;         // counted in rows of y
  void* y;                        // (M, N), rows y_stride elements apart
  int64_t y_stride;
  int32_t y_type;                 // VQ_FLOAT32 or VQ_BFLOAT16 (round to nearest even)
  int32_t* products;              // vq_accumulate: (rows, N, S)
  int32_t threads;
} vq_linear_args;

VQ_API int64_t vq_packed_bytes(int64_t outputs, int64_t inputs, int64_t segment, int32_t num_bits);
VQ_API int vq_pack(const vq_pack_args* args);
VQ_API int vq_linear(const vq_linear_args* args);
VQ_API int vq_accumulate(const vq_linear_args* args);  // only the products

#ifdef __cplusplus
}
#endif
