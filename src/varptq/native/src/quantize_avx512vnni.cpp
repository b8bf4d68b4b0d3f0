// The quantizer for AVX-512; see quantize_rows.h.
#include "quantize_rows.h"

namespace vq {

bool quantize_row_avx512vnni(const vq_quantize_args& a, int64_t m, float* room,
                             const float* signs) {
  return quantize_row(a, m, room, signs);
}

}  // namespace vq
