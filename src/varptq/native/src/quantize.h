// What the driver of the quantizer (quantize.cpp) and its kernels per instruction set share.
#pragma once

#include <cstdint>

#include "varptq.h"

namespace vq {

constexpr int64_t kLongestRotation = 1024;

// Quantizes row m. room: 64-byte aligned, for width + 16 floats; signs: of the rotation, -0 for -1,
// for one block and at least 16 positions. False on NaN or infinity.
using RowKernel = bool (*)(const vq_quantize_args&, int64_t m, float* room, const float* signs);

bool quantize_row_portable(const vq_quantize_args&, int64_t, float*, const float*);
#ifndef VQ_PORTABLE_ONLY
bool quantize_row_avx2(const vq_quantize_args&, int64_t, float*, const float*);
bool quantize_row_avx512vnni(const vq_quantize_args&, int64_t, float*, const float*);
#endif

}  // namespace vq
