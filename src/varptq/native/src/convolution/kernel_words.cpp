// Strips of 3 x 3 in words (words.h), with a quarter of the products: winograd.h, and upsampled.h
// for maps that are upsampled first. Compiled for sets with products of words.
//
// Sums of integers are exact, whatever their order: P' is that of kernel.cpp, and is finished in
// the same order.
#include "convolution/upsampled.h"
#include "convolution/winograd.h"

namespace vq {
namespace {

constexpr int64_t kLeastChannels = 32;  // fewer are padded with too many
// Of a map, with fewer of which the words of a kernel take longer than is gained.
#if defined(VQ_LANES512) || defined(VQ_VNNI256)
constexpr int64_t kLeastSquares = 32;
#else
constexpr int64_t kLeastSquares = 1;
#endif

int64_t squares_of(const Convolution& job) {
  return (job.out_height + kSquare - 1) / kSquare * ((job.out_width + kSquare - 1) / kSquare);
}

bool gains(const Convolution& job) {
  const vq_convolution_args& a = *job.args;
  return a.kernel_height == kSide && a.kernel_width == kSide && a.stride == 1 &&
         a.inputs >= kLeastChannels &&
         (a.upsample || a.images * squares_of(job) >= kLeastSquares);
}

int64_t panel_words(const Convolution& job) {
  return (job.args->upsample ? kUpParts : kParts) * word_channels(job.args->inputs) * kPanel;
}

void make(const Convolution& job, int64_t panel, int64_t vector, int16_t* kernel) {
  const uint8_t* weights = job.args->packed + panel * job.panel_bytes + vector * 64;
  kernel += vector_start(vector, job.args->upsample ? kUpParts : kParts,
                         word_channels(job.args->inputs));
  job.args->upsample ? upsampled_kernel(job, weights, kernel)
                     : winograd_kernel(job, weights, kernel);
}

void strip_words(const Convolution& job, int64_t image, int64_t strip, int64_t panel,
                 int64_t count, const int16_t* kernels) {
  const vq_convolution_args& a = *job.args;
  const int64_t first = strip * job.strip_rows;
  const WordStrip whole{job, image, first, std::min(first + job.strip_rows, job.out_height),
                        word_channels(a.inputs)};
  thread_local Scratch of_panels, of_moments;
  auto* panels = static_cast<WordPanel*>(of_panels.at_least(count * sizeof(WordPanel)));
  auto* moments = static_cast<PanelMoments*>(of_moments.at_least(count * sizeof(PanelMoments)));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t column = (panel + i) * kPanel, columns = std::min(a.outputs - column, kPanel);
    moments[i].clear();
    panels[i] = {kernels + i * panel_words(job), job.partial.sum ? moments + i : nullptr, column,
                 (columns + kLanes - 1) / kLanes};
  }
  a.upsample ? upsampled_rows(whole, panels, count) : winograd_rows(whole, panels, count);
  for (int64_t i = 0; i < count; ++i)
    keep_moments(job, image, strip, panel + i, panels[i].moments);
}

}  // namespace

WordKernels convolution_words(Set<kIsa>) { return {gains, panel_words, make, strip_words}; }

}  // namespace vq
