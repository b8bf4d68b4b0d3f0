// The product kernel for AVX-VNNI, 256 bits at a time; see tile.h.
#include "linear/tile.h"

namespace vq {
namespace {

// Six rows by 16 outputs: twelve of the sixteen registers hold sums.
void panel(const Job& job, int64_t panel, int64_t first, int64_t last, uint8_t* unpacked) {
  panel_of<Bytes, 6, 1>(job, panel, first, last, unpacked);
}

}  // namespace

PanelKernel panel_avxvnni(Set<kIsa>) { return panel; }

double peak_avxvnni(Set<kIsa>) { return measured_peak<Bytes>(); }

}  // namespace vq
