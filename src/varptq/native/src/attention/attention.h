// C interface of attention on codes, from q, k and v to the outputs of all heads.
//
// Arrays are dense, in the order of the shapes given. Shapes: B rows, l queries of a call, T tokens
// whose keys and values enter the cache, L tokens of the cache, H heads, c head width, C = H c.
#pragma once

#include <stdint.h>

#include "varptq.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { VQ_POLICY_TOKEN = 0, VQ_POLICY_SEGMENT = 1 };

// What a call computed on the way, for tests; all pointers set.
typedef struct {
  uint8_t* query_codes;           // (B, H, l, c)
  float* query_scale;             // (B, H, l)
  int32_t* query_zero;            // (B, H, l)
  uint8_t* key_codes;             // (B, H, L, c), as the five below, of the T tokens of this call
  float* key_scale;               // (B, H, L)
  int32_t* key_zero;              // (B, H, L)
  int32_t* value_codes;           // (B, H, L, c); with theta 2^max_order times code - zero point
  float* value_scale;             // (B, H, L)
  int32_t* value_zero;            // (B, H, L); 0 with theta
  float* scores;                  // (B, H, l, L)
  uint8_t* probability_codes;     // (B, H, l, L)
  int32_t* orders;                // (spans, B, H, L)
  float* row_scale;               // (B, H, l): what the integer sum of a row is multiplied by
} vq_attention_trace;

// Appends the keys and values of T tokens to a cache of codes, and answers l queries. Tokens of an
// image bring both; a text is entered once, without queries, and asked by calls without tokens.
//   q = q + bias, v = v + bias;  l2_norm: q = q / |q|, k = k / |k|;  q = q query_factor[h]
//   cosine: q and k turned by the tables' rows, pair (2n, 2n + 1) of channels by column n
//   q, k: codes per token;  v: codes per token, or per segment (from ends[i - 1] to ends[i])
//   score = (float)(sum (q - zq)(k - zk)) (sq sk);  p = softmax(score)
//   token:    code = rint(p rel / sp), rel_j = step_j / max step, out = (sum code u) (sp max step)
//   segment:  code = rint(p / sp),     out = sum over segments of (sum code u) (s sp), ascending
// with sp = max(max code argument, 1e-6) / (2^b - 1). theta >= 0: u_j on a grid 2^n_j times finer,
// n_j the order that key j's mean probability over the queries of its span asks for; the cache then
// holds the finest integer and a coarser one is its rounding shift.
typedef struct {
  int64_t batch, heads, width;    // B, H, c <= 128
  int64_t queries;                // l
  int64_t tokens, start;          // T; how many the cache holds already
  int64_t capacity;               // L
  const int64_t* ends;            // (segments): tokens after each segment
  int64_t segments;
  const int64_t* spans;           // (num_spans, 3): first query, end of queries, number of keys
  int64_t num_spans;
  int32_t policy;
  int32_t query_bits, key_bits, value_bits, probability_bits;  // 2 .. 8
  // Two codes in a byte of the cache, of up to 4 bits: keys of 8, 12, 16, .. channels, values
  // without theta.
  int32_t packed_keys, packed_values;
  vq_codebook query_book, key_book, value_book;  // codes are entries, zero points 0; token policy
  int32_t l2_norm;
  int32_t max_order;
  float theta;                    // below 0: none
  const float* query;             // (B, l, C), tokens query_stride floats apart
  const float* key;               // (B, T, C) and
  const float* value;             // (B, T, C), tokens key_stride floats apart
  int64_t query_stride, key_stride;
  const float* query_bias;        // (C), or NULL
  const float* value_bias;        // (C)
  const float* query_factor;      // (H)
  const float* cosine;            // (L, c / 2) of the cache's tokens, query i being token
  const float* sine;              //   start + i; both NULL: nothing is turned
  uint8_t* cache;                 // (B, H, vq_attention_cache_bytes)
  float* out;                     // (B, l, C)
  const vq_attention_trace* trace;
  int32_t threads;
} vq_attention_args;

// Bytes of the cache of one row and head; a multiple of 64. 0 for sizes that cannot be served.
VQ_API int64_t vq_attention_cache_bytes(int64_t width, int64_t capacity, int64_t segments,
                                        int32_t packed_keys, int32_t packed_values);
VQ_API int vq_attention(const vq_attention_args* args);

#ifdef __cplusplus
}
#endif
