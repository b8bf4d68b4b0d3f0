// The kernel of the token map for the instruction set of this file's name.
#include "phi_rows.h"

namespace vq {

const PhiKernel phi_avx2 = phi_channels;

}  // namespace vq
