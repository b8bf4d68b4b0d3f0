// y = f_hat + (h + conv3x3(h) + bias) / 2 for a few output channels of one image. Written on
// lanes.h, compiled once per instruction set. One sum per output: bias, then input channels, kernel
// rows and kernel columns ascending.
#include "phi/kernel.h"

#include "lanes/lanes.h"

namespace vq {
namespace {

// Rows of 16 outputs at (y, x) of up to kPhiChannels channels.
inline void phi_tile(const vq_phi_args& args, const float* image, int64_t stride, int64_t first,
                     int64_t y, int64_t x, Floats* sums) {
  const int64_t channels = args.channels, plane = (args.side + 2) * stride;
  const float* weight[kPhiChannels];
  for (int o = 0; o < kPhiChannels; ++o) {
    const int64_t channel = first + o < channels ? first + o : first;
    weight[o] = args.weight + channel * channels * 9;
    sums[o] = all(args.bias[channel]);
  }
  for (int64_t in = 0; in < channels; ++in) {
    const float* rows = image + in * plane + y * stride + x;
    for (int tap = 0; tap < 9; ++tap) {
      const Floats h = load(rows + tap / 3 * stride + tap % 3);
      for (int o = 0; o < kPhiChannels; ++o) sums[o] = sums[o] + all(weight[o][in * 9 + tap]) * h;
    }
  }
}

void phi_channels(const vq_phi_args& args, const float* padded, int64_t stride, int64_t image,
                  int64_t first) {
  const int64_t side = args.side, plane = (side + 2) * stride;
  const float* maps = padded + image * args.channels * plane;
  for (int64_t y = 0; y < side; ++y) {
    for (int64_t x = 0; x < side; x += kLanes) {
      Floats sums[kPhiChannels];
      phi_tile(args, maps, stride, first, y, x, sums);
      const int64_t count = side - x < kLanes ? side - x : kLanes;
      for (int o = 0; o < kPhiChannels && first + o < args.channels; ++o) {
        const Floats h = load(maps + (first + o) * plane + (y + 1) * stride + x + 1);
        alignas(64) float half[kLanes];
        store(half, all(0.5f) * h + all(0.5f) * sums[o]);
        const int64_t at = ((image * args.channels + first + o) * side + y) * side + x;
        for (int64_t i = 0; i < count; ++i) args.out[at + i] = args.f_hat[at + i] + half[i];
      }
    }
  }
}

}  // namespace

PhiKernel phi_kernel(Set<kIsa>) { return phi_channels; }

}  // namespace vq
