// The attention kernels for the instruction set of this file's name.
#include "attention_head_impl.h"

namespace vq {

const AttentionKernels attention_portable = {append, attend};

}  // namespace vq
