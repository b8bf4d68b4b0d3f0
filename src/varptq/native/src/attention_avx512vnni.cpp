// The attention kernels for the instruction set of this file's name.
#include "attention_head_impl.h"

namespace vq {

const AttentionKernels attention_avx512vnni = {append, attend};

}  // namespace vq
