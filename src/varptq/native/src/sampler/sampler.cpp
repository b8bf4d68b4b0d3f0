// Guidance, top-k, top-p and a draw: checks and tasks, one row each.
#include "sampler/sampler.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "machine/isa.h"
#include "machine/pool.h"
#include "sampler/kernel.h"

namespace vq {
namespace {

bool acceptable(const vq_sample_args& args) {
  const bool sizes = args.rows >= 0 && args.vocabulary >= 1 && args.vocabulary < 1 << 24;
  return sizes && args.top_k >= 0 && args.logits && (!args.ids || args.uniform);
}

int run(const vq_sample_args& args) {
  const int threads = usable_threads(args.threads);
  const int64_t size = (args.vocabulary + 31) / 16 * 16;
  std::vector<float> memory(static_cast<size_t>(3 * size * threads));
  std::vector<int32_t> indices(static_cast<size_t>(size * threads));
  const SampleRow sample = on_vector_isa([](auto set) { return sample_kernel(set); });
  std::atomic<int64_t> bad{args.rows};
  auto row = [&](int64_t index, int worker) {
    float* floats = memory.data() + 3 * size * worker;
    const SampleScratch scratch = {floats, floats + size, indices.data() + size * worker,
                                   floats + 2 * size};
    if (sample(args, index, scratch)) return;
    int64_t first = bad;
    while (index < first && !bad.compare_exchange_weak(first, index)) {
    }
  };
  parallel_for(args.rows, threads, row);
  if (bad == args.rows) return VQ_OK;
  if (args.bad_row) *args.bad_row = bad;
  return VQ_NON_FINITE;
}

}  // namespace
}  // namespace vq

extern "C" int vq_sample(const vq_sample_args* args) {
  if (!args || !vq::acceptable(*args)) return VQ_BAD_ARGUMENT;
  try {
    return vq::run(*args);
  } catch (const std::bad_alloc&) {
    return VQ_BAD_ARGUMENT;
  }
}
