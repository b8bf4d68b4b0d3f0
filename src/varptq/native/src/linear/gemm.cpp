// Driver of the integer Linear: cuts a call into tasks and gives each to the kernel of the
// instruction set in use.
#include "linear/gemm.h"

#include <algorithm>

#include "machine/isa.h"
#include "machine/pool.h"
#include "machine/scratch.h"

namespace vq {
namespace {

constexpr int64_t kRowsOfTask = 96;      // a multiple of every kernel's tile height
// Bytes of codes that panel after panel meets on tiles, which are fast enough to notice where they
// come from: more would come from beyond the L2 cache each time.
constexpr int64_t kCodesOfTask = 1 << 20;
constexpr int64_t kTasksPerThread = 4;

PanelKernel kernel() {
  switch (isa()) {
#if defined(VQ_X86)
    case Isa::avx2:
      return panel_avx2;
    case Isa::avxvnni:
      return panel_bytes(Set<Isa::avxvnni>{});
    case Isa::avxvnni_evex:
      return panel_bytes(Set<Isa::avxvnni_evex>{});
    case Isa::avx512vnni:
      return panel_avx512vnni;
    case Isa::amx:
      return panel_amx;
    case Isa::amx_emulated:
      return panel_amx_emulated;
#elif defined(VQ_ARM)
    case Isa::neon_dotprod:
      return panel_bytes(Set<Isa::neon_dotprod>{});
    case Isa::neon_i8mm:
      return panel_bytes(Set<Isa::neon_i8mm>{});
#endif
    default:
      return panel_portable;
  }
}

bool nests(int64_t whole, int64_t part) { return part > 0 && whole > 0 && whole % part == 0; }

bool valid(const vq_linear_args* a) {
  return a && a->rows >= 0 && a->outputs > 0 && nests(a->inputs, a->row_group) &&
         nests(a->inputs, a->weight_group) && nests(a->row_group, a->segment) &&
         nests(a->weight_group, a->segment) &&
         a->segment == std::min(a->row_group, a->weight_group) &&
         a->segment <= kLongestSegment && a->row_bits >= 2 &&
         a->row_bits <= 8 && a->weight_bits >= 2 &&
         a->weight_bits <= (a->table ? 4 : 8) && a->codes && a->scale &&
         a->zero_point && a->sum && a->packed && a->panel_scale && a->panel_zero && a->panel_sum &&
         (!a->pairs || a->rows % 2 == 0) && a->rows_per_image > 0;
}

Job make_job(const vq_linear_args* a) {
  Job job{};
  job.args = a;
  job.segments = a->inputs / a->segment;
  job.segment_blocks = padded(a->segment) / kBlock;
  job.blocks = job.segments * job.segment_blocks;
  job.row_span = a->row_group / a->segment;
  job.weight_span = a->weight_group / a->segment;
  job.row_groups = a->inputs / a->row_group;
  job.weight_groups = a->inputs / a->weight_group;
  job.code_stride = job.blocks * kBlock;
  job.panel_bytes = kPanel * kBlock * (a->weight_bits <= 4 ? (job.blocks + 1) / 2 : job.blocks);
  job.short_segments = is_short(a->segment, a->inputs);
  const bool bytes = a->weight_bits == 8 || a->table;
  const int largest = bytes ? 128 : (1 << a->weight_bits) - 1;
  job.largest_pair = 2 * largest * ((1 << a->row_bits) - 1);
  return job;
}

// The activation side of P - za W1 - zc (A1 - L za).
void fill_corrections(const Job& job, int32_t* out) {
  const vq_linear_args& a = *job.args;
  const int32_t length = static_cast<int32_t>(a.segment);
  const int32_t* sum = a.sum;
  for (int64_t g = 0; g < a.rows * job.row_groups; ++g)
    for (int64_t i = 0; i < job.row_span; ++i) {
      const int32_t zero = a.zero_point[g], rest = *sum++ - length * zero;
      const uint32_t pair = static_cast<uint32_t>(zero) | static_cast<uint32_t>(rest) << 16;
      *out++ = job.short_segments ? static_cast<int32_t>(pair) : rest;
    }
}

// Rows of a task: few where threads would lack tasks, else as many as the cache holds codes of.
int64_t rows_of_task(const Job& job, int64_t panels, int threads) {
  const int64_t rows = job.args->rows;
  if (rows > kRowsOfTask && panels < kTasksPerThread * threads && threads > 1) return kRowsOfTask;
  if (!job.tiles) return rows;
  const int64_t parts = (rows * job.code_stride + kCodesOfTask - 1) / kCodesOfTask;
  const int64_t even = (rows + parts - 1) / parts;
  return parts == 1 ? rows : (even + kRowsOfTask - 1) / kRowsOfTask * kRowsOfTask;
}

#if defined(VQ_X86)
// The codes by tiles, for the kernels that load tiles of rows.
const uint8_t* tiled(const Job& job, int threads) {
  if (isa() != Isa::amx && isa() != Isa::amx_emulated) return nullptr;
  if (job.args->rows <= kFewRows) return nullptr;
  const int64_t count = (job.args->rows + kTileRows - 1) / kTileRows;
  thread_local Scratch scratch;
  auto* tiles = static_cast<uint8_t*>(scratch.at_least(count * job.blocks * kTileBytes));
  auto task = [&](int64_t t, int) { tile_codes(job, t, tiles); };
  parallel_for(count, threads, task);
  return tiles;
}
#else
const uint8_t* tiled(const Job&, int) { return nullptr; }
#endif

int run(const vq_linear_args* a) {
  if (!valid(a)) return VQ_BAD_ARGUMENT;
  if (a->rows == 0) return VQ_OK;
  Job job = make_job(a);
  thread_local Scratch corrections;
  auto* filled =
      static_cast<int32_t*>(corrections.at_least(a->rows * job.segments * sizeof(int32_t)));
  fill_corrections(job, filled);
  job.corrections = filled;
  const PanelKernel panel = kernel();
  const int64_t panels = padded(a->outputs) / kPanel;
  const int threads = usable_threads(a->threads);
  job.tiles = tiled(job, threads);
  const int64_t height = rows_of_task(job, panels, threads);
  const int64_t parts = (a->rows + height - 1) / height;
  auto task = [&](int64_t index, int) {
    thread_local Scratch unpacked;
    const int64_t first = index / panels * height, last = std::min(a->rows, first + height);
    auto* room = static_cast<uint8_t*>(unpacked.at_least(job.blocks * kBlock * kPanel));
    panel(job, index % panels, first, last, room);
  };
  parallel_for(panels * parts, threads, task);
  return VQ_OK;
}

}  // namespace
}  // namespace vq

extern "C" {

int vq_linear(const vq_linear_args* a) {
  if (!a || !a->y || a->y_stride < a->outputs) return VQ_BAD_ARGUMENT;
  vq_linear_args plain = *a;
  plain.products = nullptr;
  return vq::run(&plain);
}

int vq_accumulate(const vq_linear_args* a) {
  return a && a->products ? vq::run(a) : VQ_BAD_ARGUMENT;
}

double vq_peak_gops(void) {
  switch (vq::isa()) {
#if defined(VQ_X86)
    case vq::Isa::avx2:
      return vq::peak_avx2();
    case vq::Isa::avxvnni:
      return vq::peak_bytes(vq::Set<vq::Isa::avxvnni>{});
    case vq::Isa::avxvnni_evex:
      return vq::peak_bytes(vq::Set<vq::Isa::avxvnni_evex>{});
    case vq::Isa::avx512vnni:
      return vq::peak_avx512vnni();
    case vq::Isa::amx:
      return vq::peak_amx();
#elif defined(VQ_ARM)
    case vq::Isa::neon_dotprod:
      return vq::peak_bytes(vq::Set<vq::Isa::neon_dotprod>{});
    case vq::Isa::neon_i8mm:
      return vq::peak_bytes(vq::Set<vq::Isa::neon_i8mm>{});
#endif
    default:
      return 0;
  }
}

}  // extern "C"
