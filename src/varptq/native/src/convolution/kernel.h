// What the drivers of convolutions (convolution.cpp, codes.cpp) and their kernels per instruction
// set share.
#pragma once

#include <cstdint>

#include "convolution/convolution.h"
#include "linear/gemm.h"
#include "machine/isa.h"

namespace vq {

constexpr int64_t kMostTaps = 3;           // of a kernel row
constexpr int64_t kBorder = 1;             // pixels around a map of codes
constexpr int64_t kMostInputs = 65536;     // of an output, whose products fit 32 bits

constexpr int64_t channel_bytes(int64_t channels) { return (channels + 3) / 4 * 4; }

// Where tap `tap` of an output of this phase lies in a map that is upsampled to twice its side, in
// pixels from the one it starts at: half of what is at least -1, rounded down.
constexpr int64_t upsampled_offset(int64_t tap, int64_t before, int64_t phase) {
  return (phase + tap - before + 2) / 2 - 1;
}

// Taps of a kernel row that lie side by side in the map too: one run of inputs.
struct Run {
  int64_t codes;    // bytes from the pixel an output starts at
  int64_t weights;  // bytes from the panel's start
  int64_t steps;    // of 4 inputs
};

// The runs of an output: with upsampling they depend on whether its row and column are odd.
struct Taps {
  Run runs[kMostTaps * kMostTaps];
  int64_t count;
};

struct Convolution {
  const vq_convolution_args* args;
  int64_t out_height, out_width;
  int64_t pixel, row, image;   // bytes in the map of codes from one to the next
  int64_t panel_bytes;
  int64_t strip_rows, strips;  // rows of the output computed panel by panel; strips of an image
  int64_t phases;              // 2 with upsampling: rows and columns that are even and odd
  Taps taps[2][2];             // by phase of row and column
  vq_moments partial;          // (N, strips, P, 64), sum NULL where none are wanted
};

// One strip of one image and panel.
using StripKernel = void (*)(const Convolution&, int64_t image, int64_t strip, int64_t panel);

StripKernel convolution_kernel(Set<Isa::portable>);
StripKernel convolution_kernel(Set<Isa::avx2>);
StripKernel convolution_kernel(Set<Isa::avx512vnni>);
StripKernel convolution_kernel(Set<Isa::avxvnni>);
StripKernel convolution_kernel(Set<Isa::avxvnni_evex>);
StripKernel convolution_kernel(Set<Isa::neon_dotprod>);
StripKernel convolution_kernel(Set<Isa::neon_i8mm>);
#if defined(VQ_X86)
// Convolutions of 3 x 3 with a quarter of the products, in words of 16 bits. Kernels are made of
// the packed weights once for all strips.
struct WordKernels {
  bool (*gains)(const Convolution&);
  int64_t (*panel_words)(const Convolution&);  // of a kernel
  // Of one vector of 16 outputs of a panel: its place in the panel's kernel is the same for all.
  void (*make)(const Convolution&, int64_t panel, int64_t vector, int16_t* kernel);
  // Of `count` panels, whose kernels follow one another.
  void (*strip)(const Convolution&, int64_t image, int64_t strip, int64_t panel, int64_t count,
                const int16_t* kernels);
};

inline WordKernels convolution_words(Set<Isa::portable>) { return {}; }
WordKernels convolution_words(Set<Isa::avx2>);
WordKernels convolution_words(Set<Isa::avx512vnni>);
WordKernels convolution_words(Set<Isa::avxvnni>);
WordKernels convolution_words(Set<Isa::avxvnni_evex>);
StripKernel convolution_amx();
StripKernel convolution_amx_emulated();
#endif

// An image to codes, once its scale is known: gain and shift have room for the channels rounded up
// to 16.
struct CodeRule {
  const float *gain, *shift;  // v = x gain + shift; NULL: v = x
  bool silu;
  float scale, zero;
};

struct MapKernels {
  // Moments of one row of an image, `channels` each; the smallest and largest start at x's own.
  void (*moments)(const float* x, int64_t width, int64_t channels, const vq_moments& out);
  // One row of the map without its border.
  void (*codes)(const float* x, int64_t width, int64_t channels, const CodeRule&, uint8_t* codes);
  // SiLU of the ends of a range, as the codes see it.
  float (*silu)(float x);
};

MapKernels map_kernels(Set<Isa::portable>);
MapKernels map_kernels(Set<Isa::avx2>);
MapKernels map_kernels(Set<Isa::avx512vnni>);
MapKernels map_kernels(Set<Isa::neon_dotprod>);

}  // namespace vq
