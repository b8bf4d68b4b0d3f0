// C interface of the native core: integer Linear layers. Attention and sampling have headers of
// their own.
//
// Plain structs of pointers and sizes, one per call; nothing is kept between calls but the threads.
// Shapes: M rows, K inputs, N outputs, G groups along K (Ga of activations, Gw of weights), S
// segments (the finer of both), L true length of a segment, Lp = L rounded up to 64.
#pragma once

#include <stdint.h>

#define VQ_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum { VQ_OK = 0, VQ_NON_FINITE = 1, VQ_BAD_ARGUMENT = 2 };
enum { VQ_FLOAT32 = 0, VQ_BFLOAT16 = 1 };
enum { VQ_NONE = 0, VQ_NORM = 1, VQ_GELU = 2 };

// Rows of floats to codes. Per row: prologue, minus the row's mean, rotation, then per group
//   s = (hi - lo) / (2^b - 1)   z = clamp(rint(-lo / s))   a = clamp(rint(x / s) + z)
// with lo = min(0, min x), hi = max(0, max x). Sign-split rows become two: row 2m holds the codes
// of the positive values and row 2m + 1 those of the negative ones, whose scale is negative; their
// zero points are 0.
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
  int64_t group;                  // channels per scale, divides K
  int64_t segment;                // channels per segment, divides group
  uint8_t* codes;                 // (M or 2M, S Lp); padding is set to 0
  float* scale;                   // (M or 2M, Ga)
  int32_t* zero_point;            // (M or 2M, Ga)
  int32_t* sum;                   // (M or 2M, S) sums of codes
  float* values;                  // NULL, or (M, K) what was quantized, for tests
  int32_t threads;
} vq_quantize_args;

// Weight codes to the layout of the kernels: panels of 64 outputs; in a panel, for every 4 inputs,
// 64 columns of 4 bytes. Stored value w: the code up to 7 bits, code - 128 at 8, where zero points
// are shifted alike. 4 bits and below: bytes hold two codes, of input k in the low and k + 64 in
// the high half. Padding has stored value 0.
typedef struct {
  int64_t outputs, inputs;        // N, K
  const uint8_t* codes;           // (N, K)
  const int32_t* zero_point;      // (N, Gw) of the codes
  const float* scale;             // (N, Gw)
  int32_t num_bits;
  int64_t group, segment;
  uint8_t* packed;                // vq_packed_bytes
  float* panel_scale;             // (ceil(N / 64), Gw, 64)
  int32_t* panel_zero;            // (ceil(N / 64), Gw, 64), of the stored values
  int32_t* panel_sum;             // (ceil(N / 64), S, 64), sums of the stored values
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

VQ_API int vq_quantize(const vq_quantize_args* args);
VQ_API int64_t vq_packed_bytes(int64_t outputs, int64_t inputs, int64_t segment, int32_t num_bits);
VQ_API int vq_pack(const vq_pack_args* args);
VQ_API int vq_linear(const vq_linear_args* args);
VQ_API int vq_accumulate(const vq_linear_args* args);  // only the products

VQ_API const char* vq_isa(void);                 // the set in use
VQ_API const char* vq_features(void);            // the sets this machine can run
VQ_API int vq_select_isa(const char* name);
VQ_API int32_t vq_threads(int32_t asked);        // how many threads such a call gets
VQ_API const char* vq_source_hash(void);
// Gigaoperations (two per multiply-add) a second of a register-only loop of the product
// instruction of the set in use; 0 where there is none.
VQ_API double vq_peak_gops(void);

#ifdef __cplusplus
}
#endif
