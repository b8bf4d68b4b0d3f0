// The product kernel for AVX512-VNNI; see tile.h.
#include "linear/peak.h"
#include "linear/tile.h"

namespace vq {

void panel_avx512vnni(const Job& job, int64_t panel, int64_t first, int64_t last,
                      uint8_t* unpacked) {
  panel_of<Bytes, 6, 4>(job, panel, first, last, unpacked);
}

double peak_avx512vnni() { return measured_peak<Bytes>(); }

}  // namespace vq
