// The token map: checks, the border of zeros, and tasks of a few output channels each.
#include "phi/phi.h"

#include <cstring>
#include <new>
#include <vector>

#include "machine/isa.h"
#include "machine/pool.h"
#include "phi/kernel.h"

namespace vq {
namespace {

int run(const vq_phi_args& args) {
  const int64_t side = args.side, maps = args.batch * args.channels;
  // Vectors of 16 start at x + kernel column, so a row reaches 16 beyond its last vector.
  const int64_t stride = (side + 15) / 16 * 16 + 16, plane = (side + 2) * stride;
  std::vector<float> padded(static_cast<size_t>(maps * plane), 0.0f);
  for (int64_t map = 0; map < maps; ++map)
    for (int64_t y = 0; y < side; ++y)
      std::memcpy(padded.data() + map * plane + (y + 1) * stride + 1,
                  args.h + (map * side + y) * side, static_cast<size_t>(side) * sizeof(float));
  const int64_t groups = (args.channels + kPhiChannels - 1) / kPhiChannels;
  const PhiKernel phi = on_vector_isa([](auto set) { return phi_kernel(set); });
  auto task = [&](int64_t index, int) {
    phi(args, padded.data(), stride, index / groups, index % groups * kPhiChannels);
  };
  parallel_for(args.batch * groups, usable_threads(args.threads), task);
  return VQ_OK;
}

}  // namespace
}  // namespace vq

extern "C" int vq_phi(const vq_phi_args* args) {
  if (!args || args->batch < 0 || args->channels < 1 || args->side < 1) return VQ_BAD_ARGUMENT;
  try {
    return vq::run(*args);
  } catch (const std::bad_alloc&) {
    return VQ_BAD_ARGUMENT;
  }
}
