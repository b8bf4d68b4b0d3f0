// The sampler's kernel for the instruction set of this file's name.
#include "sampler_row.h"

namespace vq {

const SampleRow sample_portable = sample_row;

}  // namespace vq
