// C interface of the native core: what all operators share, and the machine. Each operator has a
// header in its folder: quantize/quantize.h, linear/linear.h, attention/attention.h,
// convolution/convolution.h, sampler/sampler.h, phi/phi.h.
//
// Plain structs of pointers and sizes, one per call; nothing is kept between calls but the threads.
#pragma once

#include <stdint.h>

#define VQ_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum { VQ_OK = 0, VQ_NON_FINITE = 1, VQ_BAD_ARGUMENT = 2 };
enum { VQ_FLOAT32 = 0, VQ_BFLOAT16 = 1 };

// The positive half of a symmetric codebook, ascending integers up to 127, and the scale of a slice
// over its deviation; count 0: no codebook.
enum { VQ_MOST_ENTRIES = 32 };
typedef struct {
  float entries[VQ_MOST_ENTRIES];
  int32_t count;
  float reach;
} vq_codebook;

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
