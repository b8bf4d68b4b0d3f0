// Driver of the quantizer of Linear inputs: checks, the signs of the rotation, and tasks of a few
// rows.
#include "quantize/quantize.h"

#include <algorithm>
#include <atomic>

#include "lanes/lanes.h"
#include "machine/isa.h"
#include "machine/pool.h"
#include "machine/scratch.h"
#include "quantize/codebook.h"
#include "quantize/kernel.h"

namespace vq {
namespace {

constexpr int64_t kRowsOfTask = 4;

bool nests(int64_t whole, int64_t part) { return part > 0 && whole > 0 && whole % part == 0; }

bool valid(const vq_quantize_args* a) {
  if (!a || a->rows < 0 || !nests(a->width, a->group) || !nests(a->group, a->segment)) return false;
  if (!a->x || a->row_stride < a->width || a->rows_per_image < 1) return false;
  if (a->num_bits < 2 || a->num_bits > 8) return false;
  const vq_codebook& book = a->codebook;
  if (book.count < 0 || book.count > VQ_MOST_ENTRIES || (book.count && a->sign_split)) return false;
  if (a->prologue == VQ_NORM && (!a->gain || !a->shift)) return false;
  const int64_t block = a->hadamard;
  if (block < 0 || block > kLongestRotation || (block & (block - 1))) return false;
  if (block > 1 && a->width % block) return false;
  return a->codes && a->scale && a->zero_point && a->sum;
}

// As varptq.quant.transforms.signs has them: -0 where the sign of a position is -1.
void fill_signs(float* signs, int64_t block) {
  for (int64_t i = 0; i < std::max<int64_t>(block, kLanes); ++i) {
    const uint64_t position = static_cast<uint64_t>(i % block);
    signs[i] = (position * 0x9E3779B1u) >> 16 & 1 ? -0.0f : 0.0f;
  }
}

}  // namespace

}  // namespace vq

extern "C" int vq_quantize(const vq_quantize_args* a) {
  if (!vq::valid(a)) return VQ_BAD_ARGUMENT;
  float signs[vq::kLongestRotation];
  if (a->hadamard > 1) vq::fill_signs(signs, a->hadamard);
  const vq::RowKernel row =
      vq::on_vector_isa([](auto set) { return vq::quantize_kernel(set); });
  std::atomic<bool> finite{true};
  auto task = [&](int64_t index, int) {
    thread_local vq::Scratch scratch;
    const int64_t more = a->codebook.count ? vq::codebook_room(a->group) : 0;
    const int64_t floats = a->width + vq::kLanes + more;
    auto* room = static_cast<float*>(scratch.at_least(floats * sizeof(float)));
    const int64_t first = index * vq::kRowsOfTask;
    for (int64_t m = first; m < std::min(a->rows, first + vq::kRowsOfTask); ++m)
      if (!row(*a, m, room, signs)) finite.store(false, std::memory_order_relaxed);
  };
  const int64_t tasks = (a->rows + vq::kRowsOfTask - 1) / vq::kRowsOfTask;
  vq::parallel_for(tasks, a->threads, task);
  return finite.load() ? VQ_OK : VQ_NON_FINITE;
}
