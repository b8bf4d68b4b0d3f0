// The product kernel for NEON with the byte products of DotProd or I8MM; see tile.h.
#include "linear/tile.h"

namespace vq {
namespace {

void panel(const Job& job, int64_t panel, int64_t first, int64_t last, uint8_t* unpacked) {
  panel_of<TileProduct, 4, 1>(job, panel, first, last, unpacked);
}

}  // namespace

PanelKernel panel_neon(Set<kIsa>) { return panel; }

double peak_neon(Set<kIsa>) { return measured_peak<TileProduct>(); }

}  // namespace vq
