// The product kernel of sets whose lanes multiply bytes in 256 bits or less: AVX-VNNI, and NEON with
// DotProd or I8MM; see tile.h.
#include "linear/peak.h"
#include "linear/tile.h"

namespace vq {
namespace {

#if defined(VQ_NEON)
constexpr int kRows = 4;
#else
constexpr int kRows = 6;  // by 16 outputs: twelve of the sixteen registers hold sums
#endif

void panel(const Job& job, int64_t panel, int64_t first, int64_t last, uint8_t* unpacked) {
  panel_of<TileProduct, kRows, 1>(job, panel, first, last, unpacked);
}

}  // namespace

PanelKernel panel_bytes(Set<kIsa>) { return panel; }

double peak_bytes(Set<kIsa>) { return measured_peak<TileProduct>(); }

}  // namespace vq
