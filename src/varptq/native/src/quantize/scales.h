// What stands in for a scale that is too small to divide by, as varptq.quant has it (affine.py,
// sign_split.py, probability.py), to the bit.
#pragma once

namespace vq {

// An affine step has no floor. One that is no normal float, that of a range of zeros, is replaced.
constexpr float kLeastScale = 0x1p-126f;
constexpr float kEmptyScale = 0x1p-64f;
// Inputs with units of their own: what GELU makes, and probabilities.
constexpr float kSignSplitFloor = 1e-6f;
constexpr float kProbabilityFloor = 1e-6f;

}  // namespace vq
