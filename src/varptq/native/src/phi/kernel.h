// What the driver of phi (phi.cpp) and its kernel per instruction set share.
#pragma once

#include "machine/isa.h"
#include "phi/phi.h"

namespace vq {

constexpr int kPhiChannels = 4;  // outputs computed together

// Outputs first .. first + kPhiChannels - 1 of image `image`. `padded` is h with a border of zeros:
// (B, C, P + 2, stride), its rows starting one to the left of the map.
using PhiKernel = void (*)(const vq_phi_args&, const float* padded, int64_t stride, int64_t image,
                           int64_t first);

PhiKernel phi_kernel(Set<Isa::portable>);
PhiKernel phi_kernel(Set<Isa::avx2>);
PhiKernel phi_kernel(Set<Isa::avx512vnni>);
PhiKernel phi_kernel(Set<Isa::neon_dotprod>);

}  // namespace vq
