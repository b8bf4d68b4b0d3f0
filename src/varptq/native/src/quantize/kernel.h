// What the driver of the quantizer (quantize.cpp) and its kernels per instruction set share.
#pragma once

#include <cstdint>

#include "machine/isa.h"
#include "quantize/quantize.h"

namespace vq {

constexpr int64_t kLongestRotation = 1024;

// Quantizes row m. room: 64-byte aligned, for width + 16 floats, and behind them, with a codebook,
// as many as codebook.h asks for; signs: of the rotation, -0 for -1,
// for one block and at least 16 positions. False on NaN or infinity.
using RowKernel = bool (*)(const vq_quantize_args&, int64_t m, float* room, const float* signs);

RowKernel quantize_kernel(Set<Isa::portable>);
RowKernel quantize_kernel(Set<Isa::avx2>);
RowKernel quantize_kernel(Set<Isa::avx512vnni>);
RowKernel quantize_kernel(Set<Isa::neon_dotprod>);

}  // namespace vq
