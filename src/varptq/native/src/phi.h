// The map from token embeddings to the pyramid's sum: buffers and the kernel per instruction set.
#pragma once

#include "attention.h"

namespace vq {

constexpr int kPhiChannels = 4;  // outputs computed together

// Outputs first .. first + kPhiChannels - 1 of image `image`. `padded` is h with a border of zeros:
// (B, C, P + 2, stride), its rows starting one to the left of the map.
using PhiKernel = void (*)(const vq_phi_args&, const float* padded, int64_t stride, int64_t image,
                           int64_t first);

extern const PhiKernel phi_portable, phi_avx2, phi_avx512vnni;

}  // namespace vq
