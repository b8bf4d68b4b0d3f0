// Driver of the convolutions: checks, the runs of taps, and tasks of a strip and a panel each.
#include "convolution/convolution.h"

#include <algorithm>
#include <cstring>

#include "convolution/kernel.h"
#include "machine/pool.h"
#include "machine/scratch.h"

namespace vq {
namespace {

// Codes of a strip, with those of its neighbours: beside a panel of weights they fit the L2 cache.
constexpr int64_t kStripBytes = 384 * 1024;
// Words of kernels made at a time: what the strips of a map read again and again fits the L3 cache.
constexpr int64_t kKernelWords = 4 * 1024 * 1024;
constexpr int64_t kVectors = kPanel / 16;
// Reads beyond the map: the padding of a run's weights.
constexpr int64_t kSlack = 64;

bool in(int64_t x, int64_t low, int64_t high) { return x >= low && x <= high; }

bool valid(const vq_convolution_args* a) {
  if (!a || a->images < 0 || a->height < 1 || a->width < 1 || a->inputs < 1 || a->outputs < 1)
    return false;
  if (!in(a->kernel_height, 1, kMostTaps) || !in(a->kernel_width, 1, kMostTaps)) return false;
  if (a->inputs * a->kernel_height * a->kernel_width > kMostInputs) return false;
  if (!in(a->stride, 1, 2) || (a->upsample && a->stride != 1)) return false;
  for (int64_t side : {a->left, a->right, a->top, a->bottom})
    if (!in(side, 0, kBorder)) return false;
  const int64_t up = a->upsample ? 2 : 1;
  if (a->height * up + a->top + a->bottom < a->kernel_height) return false;
  if (a->width * up + a->left + a->right < a->kernel_width) return false;
  const vq_moments& m = a->moments;
  if (m.sum && (!m.square || !m.low || !m.high)) return false;
  return a->codes && a->scale && a->zero_point && a->packed && a->panel_sum && a->panel_scale &&
         a->panel_bias && a->y;
}

// Where tap `tap` of an output lies, in pixels from the one it starts at.
int64_t offset(int64_t tap, int64_t before, int64_t phase, bool up) {
  return up ? upsampled_offset(tap, before, phase) : tap - before;
}

Taps taps_of(const Convolution& job, int64_t row_phase, int64_t column_phase) {
  const vq_convolution_args& a = *job.args;
  const int64_t bytes = channel_bytes(a.inputs);
  const int64_t row_weights = padded(a.kernel_width * bytes) * kPanel;
  Taps taps{};
  for (int64_t ky = 0; ky < a.kernel_height; ++ky) {
    const int64_t row = offset(ky, a.top, row_phase, a.upsample) * job.row;
    const int64_t begun = taps.count;
    for (int64_t kx = 0; kx < a.kernel_width; ++kx) {
      const int64_t codes = row + offset(kx, a.left, column_phase, a.upsample) * bytes;
      Run& last = taps.runs[taps.count > begun ? taps.count - 1 : begun];
      if (taps.count > begun && codes == last.codes + last.steps * 4) {
        last.steps += bytes / 4;
        continue;
      }
      taps.runs[taps.count++] = {codes, ky * row_weights + kx * bytes * kPanel, bytes / 4};
    }
  }
  return taps;
}

Convolution make_job(const vq_convolution_args* a) {
  Convolution job{};
  job.args = a;
  job.phases = a->upsample ? 2 : 1;
  job.out_height = (a->height * job.phases + a->top + a->bottom - a->kernel_height) / a->stride + 1;
  job.out_width = (a->width * job.phases + a->left + a->right - a->kernel_width) / a->stride + 1;
  job.pixel = channel_bytes(a->inputs);
  job.row = (a->width + 2 * kBorder) * job.pixel;
  job.image = (a->height + 2 * kBorder) * job.row;
  job.panel_bytes = a->kernel_height * padded(a->kernel_width * job.pixel) * kPanel;
  // A part of the definition of the moments: from sizes alone, never from threads.
  // In fours, for kernels that make four rows at once.
  const int64_t rows = (kStripBytes / job.row - 2) * job.phases / a->stride;
  job.strip_rows = std::min(std::max<int64_t>(4, (rows + 3) / 4 * 4), job.out_height);
  job.strips = (job.out_height + job.strip_rows - 1) / job.strip_rows;
  for (int64_t y = 0; y < job.phases; ++y)
    for (int64_t x = 0; x < job.phases; ++x) job.taps[y][x] = taps_of(job, y, x);
  return job;
}

StripKernel strip_kernel() {
#if defined(VQ_X86)
  if (isa() == Isa::amx) return convolution_amx();
  if (isa() == Isa::amx_emulated) return convolution_amx_emulated();
#endif
  return on_product_isa([](auto set) { return convolution_kernel(set); });
}

void run_strips(const Convolution& job, int64_t strips, int64_t panels) {
  const StripKernel kernel = strip_kernel();
  auto task = [&](int64_t index, int) {
    const int64_t at = index / panels;
    kernel(job, at / job.strips, at % job.strips, index % panels);
  };
  parallel_for(strips * panels, usable_threads(job.args->threads), task);
}

#if defined(VQ_X86)
// None with AMX, whose tiles replace them.
WordKernels word_kernels() {
  if (isa() != product_isa()) return {};
  return on_product_isa([](auto set) { return convolution_words(set); });
}

// Codes become words once for all panels of a task, so these are divided only where strips are few.
bool ran_in_words(const Convolution& job, int64_t strips, int64_t panels) {
  const WordKernels words = word_kernels();
  if (!words.gains || !words.gains(job)) return false;
  const int threads = usable_threads(job.args->threads);
  const int64_t size = words.panel_words(job);
  const int64_t most = std::max<int64_t>(1, kKernelWords / size);
  thread_local Scratch scratch;
  auto* kernels =
      static_cast<int16_t*>(scratch.at_least(std::min(most, panels) * size * sizeof(int16_t)));
  for (int64_t first = 0; first < panels; first += most) {
    const int64_t count = std::min(most, panels - first);
    auto make = [&](int64_t i, int) {
      words.make(job, first + i / kVectors, i % kVectors, kernels + i / kVectors * size);
    };
    parallel_for(count * kVectors, threads, make);
    const int64_t parts = threads > 1 && strips < 2 * threads ? count : 1, each = count / parts;
    auto task = [&](int64_t i, int) {
      const int64_t at = i / parts, part = i % parts * each;
      words.strip(job, at / job.strips, at % job.strips, first + part, each,
                  kernels + part * size);
    };
    parallel_for(strips * parts, threads, task);
  }
  return true;
}
#else
bool ran_in_words(const Convolution&, int64_t, int64_t) { return false; }
#endif

vq_moments room_for(const Convolution& job, int64_t count) {
  thread_local Scratch scratch;
  auto* room = static_cast<double*>(scratch.at_least(count * 3 * sizeof(double)));
  auto* floats = reinterpret_cast<float*>(room + 2 * count);
  return job.args->moments.sum ? vq_moments{room, room + count, floats, floats + count}
                               : vq_moments{};
}

// Strips in ascending order, whoever computed them.
void combine(const Convolution& job) {
  const vq_convolution_args& a = *job.args;
  const int64_t columns = padded(a.outputs);
  for (int64_t n = 0; n < a.images; ++n)
    for (int64_t s = 0; s < job.strips; ++s)
      for (int64_t o = 0; o < a.outputs; ++o) {
        const int64_t to = n * a.outputs + o, from = (n * job.strips + s) * columns + o;
        const vq_moments &m = a.moments, &p = job.partial;
        m.sum[to] = s ? m.sum[to] + p.sum[from] : p.sum[from];
        m.square[to] = s ? m.square[to] + p.square[from] : p.square[from];
        m.low[to] = s ? std::min(m.low[to], p.low[from]) : p.low[from];
        m.high[to] = s ? std::max(m.high[to], p.high[from]) : p.high[from];
      }
}

bool packable(const vq_pack_kernel_args* a) {
  return a && a->outputs > 0 && a->inputs > 0 && in(a->kernel_height, 1, kMostTaps) &&
         in(a->kernel_width, 1, kMostTaps) && a->codes && a->packed && a->panel_sum;
}

// Inputs [first, last) of output o to its panel; the sum of the weights.
int32_t pack_inputs(const vq_pack_kernel_args& a, int64_t o, int64_t first, int64_t last) {
  const int64_t bytes = channel_bytes(a.inputs), taps = a.kernel_height * a.kernel_width;
  const int64_t row = padded(a.kernel_width * bytes) * kPanel;
  uint8_t* panel = a.packed + o / kPanel * a.kernel_height * row + o % kPanel * 4;
  int32_t sum = 0;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int8_t* from = a.codes + o * a.inputs * taps + tap;
    uint8_t* to = panel + tap / a.kernel_width * row + tap % a.kernel_width * bytes * kPanel;
    for (int64_t c = first; c < last; ++c) {
      const int8_t w = from[c * taps];
      to[c / 4 * kStep + c % 4] = static_cast<uint8_t>(w);
      sum += w;
    }
  }
  return sum;
}

// One panel, a few inputs at a time: what is written then stays in the cache while every output
// adds its four bytes here and there.
void pack_outputs(const vq_pack_kernel_args& a, int64_t panel) {
  constexpr int64_t kTogether = 16;
  const int64_t first = panel * kPanel, last = std::min(first + kPanel, a.outputs);
  const int64_t bytes = vq_kernel_bytes(kPanel, a.inputs, a.kernel_height, a.kernel_width);
  std::memset(a.packed + panel * bytes, 0, bytes);
  std::fill_n(a.panel_sum + first, kPanel, 0);
  for (int64_t c = 0; c < a.inputs; c += kTogether)
    for (int64_t o = first; o < last; ++o)
      a.panel_sum[o] += pack_inputs(a, o, c, std::min(c + kTogether, a.inputs));
}

}  // namespace
}  // namespace vq

extern "C" {

int64_t vq_map_bytes(int64_t images, int64_t height, int64_t width, int64_t channels) {
  return images * (height + 2 * vq::kBorder) * (width + 2 * vq::kBorder) *
             vq::channel_bytes(channels) + vq::kSlack;
}

int64_t vq_kernel_bytes(int64_t outputs, int64_t inputs, int64_t height, int64_t width) {
  return vq::padded(outputs) * height * vq::padded(width * vq::channel_bytes(inputs));
}

int vq_pack_kernel(const vq_pack_kernel_args* a) {
  if (!vq::packable(a)) return VQ_BAD_ARGUMENT;
  auto task = [&](int64_t panel, int) { vq::pack_outputs(*a, panel); };
  vq::parallel_for(vq::padded(a->outputs) / vq::kPanel, a->threads, task);
  return VQ_OK;
}

int vq_convolution(const vq_convolution_args* a) {
  if (!vq::valid(a)) return VQ_BAD_ARGUMENT;
  vq::Convolution job = vq::make_job(a);
  const int64_t panels = vq::padded(a->outputs) / vq::kPanel, strips = a->images * job.strips;
  job.partial = vq::room_for(job, strips * panels * vq::kPanel);
  if (!vq::ran_in_words(job, strips, panels)) vq::run_strips(job, strips, panels);
  if (a->moments.sum) vq::combine(job);
  return VQ_OK;
}

}  // extern "C"
