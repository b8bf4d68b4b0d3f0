// The kernel of the token map for the instruction set of this file's name.
#include "phi_rows.h"

namespace vq {

const PhiKernel phi_avx512vnni = phi_channels;

}  // namespace vq
