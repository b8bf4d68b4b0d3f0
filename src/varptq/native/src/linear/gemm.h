// What the driver of the products (gemm.cpp) and the kernels per instruction set share.
//
// A job is one call; a kernel computes one panel of 64 outputs for a range of rows. The inner loop
// of every kernel: for 4 inputs at a time, the 4 codes of a row are repeated over a vector and
// multiplied with the 4 weights of each of 16 columns.
#pragma once

#include <cstdint>

#include "linear/linear.h"
#include "machine/isa.h"

namespace vq {

constexpr int64_t kPanel = 64;           // outputs of a panel
constexpr int64_t kBlock = 64;           // inputs of a block
constexpr int64_t kStep = kPanel * 4;    // bytes of a panel for 4 inputs
constexpr int64_t kShortSegment = 128;   // inputs whose sums of codes fit 16 bits
constexpr int64_t kLongestSegment = 16384;  // inputs whose products fit 32 bits in every form

constexpr int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

// Segments whose correction is one product of 16-bit pairs; a row that is one segment takes the
// other way whatever its length.
constexpr bool is_short(int64_t segment, int64_t inputs) {
  return segment < inputs && segment <= kShortSegment;
}

// Where output n's entry for group or segment i of `count` is: panel by panel, so that the entries
// a tile walks through lie side by side. Rows of all outputs would put them 4 KiB apart, in one set
// of the cache.
constexpr int64_t panel_index(int64_t n, int64_t i, int64_t count) {
  return (n / kPanel * count + i) * kPanel + n % kPanel;
}

struct Job {
  const vq_linear_args* args;
  int64_t segments, blocks;       // of a row; blocks are counted with padding
  int64_t segment_blocks;         // blocks of a segment
  int64_t row_span, weight_span;  // segments of an activation group and of a weight group
  int64_t row_groups;             // activation groups of a row
  int64_t weight_groups;          // weight groups of an output
  int64_t code_stride;            // bytes of a row of codes
  int64_t panel_bytes;
  bool short_segments;            // corrections by 16-bit pairs (is_short)
  int64_t largest_pair;           // magnitude of the sum of two products of codes, at most
  const int32_t* corrections;     // (rows, S): (za, A1 - L za) as 16-bit pairs, or A1 - L za
  const uint8_t* tiles;           // AMX: the codes by tiles (tile_codes)
};

// Rows and bytes of a tile of AMX, and how many rows are faster without.
constexpr int64_t kTileRows = 16, kTileBytes = kTileRows * kBlock, kFewRows = 4;

// Rows first .. last - 1 of panel `panel`. unpacked: scratch of blocks * 64 * 64 bytes.
using PanelKernel = void (*)(const Job&, int64_t panel, int64_t first, int64_t last,
                             uint8_t* unpacked);

void panel_portable(const Job&, int64_t, int64_t, int64_t, uint8_t*);
#if defined(VQ_X86)
void panel_avx2(const Job&, int64_t, int64_t, int64_t, uint8_t*);
PanelKernel panel_bytes(Set<Isa::avxvnni>);
PanelKernel panel_bytes(Set<Isa::avxvnni_evex>);
void panel_avx512vnni(const Job&, int64_t, int64_t, int64_t, uint8_t*);
// Codes of rows 16 t .. 16 t + 15, those that are none 0: block b at (t * blocks + b) * 1024.
void tile_codes(const Job&, int64_t t, uint8_t* tiles);
void panel_amx(const Job&, int64_t, int64_t, int64_t, uint8_t*);
void panel_amx_emulated(const Job&, int64_t, int64_t, int64_t, uint8_t*);
double peak_avx2();
double peak_bytes(Set<Isa::avxvnni>);
double peak_bytes(Set<Isa::avxvnni_evex>);
double peak_avx512vnni();
double peak_amx();
#elif defined(VQ_ARM)
PanelKernel panel_bytes(Set<Isa::neon_dotprod>);
PanelKernel panel_bytes(Set<Isa::neon_i8mm>);
double peak_bytes(Set<Isa::neon_dotprod>);
double peak_bytes(Set<Isa::neon_i8mm>);
#endif

}  // namespace vq
