// The native convolution under the sanitizers: every instruction set against the portable one over
// random shapes and the ends of the codes, in buffers of exactly the size they are said to have, so
// that a read or write beyond them is caught. `python -m varptq.native.build --sanitize` builds and
// runs it.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "convolution/convolution.h"
#include "sets.h"

namespace {

std::mt19937 random_bits(12345);

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
}

// Everything one pass through codes, weights and convolution makes.
struct Result {
  std::vector<uint8_t> codes;
  std::vector<float> scale, y, low, high;
  std::vector<int32_t> zero;
  std::vector<double> sum, square;
  bool operator==(const Result& o) const {
    return same(codes, o.codes) && same(scale, o.scale) && same(zero, o.zero) && same(y, o.y) &&
           same(sum, o.sum) && same(square, o.square) && same(low, o.low) && same(high, o.high);
  }
};

struct Problem {
  vq_convolution_args shape{};
  int64_t out_height, out_width, groups;
  bool silu, residual_wanted;
  std::vector<float> x, gain, shift, scale, bias, residual;
  std::vector<int8_t> weight;

  Problem() {
    vq_convolution_args& s = shape;
    s.images = pick(1, 2), s.height = pick(2, 18), s.width = pick(2, 40);
    s.inputs = pick(1, 4) == 1 ? pick(1, 7) * 64 : pick(1, 70), s.outputs = pick(1, 150);
    // Half of them 3 x 3, which words have ways of their own for.
    const bool square = pick(0, 1);
    s.kernel_height = square ? 3 : pick(1, 3), s.kernel_width = square ? 3 : pick(1, 3);
    s.upsample = static_cast<int32_t>(pick(0, 1)), s.stride = s.upsample ? 1 : pick(1, 2);
    s.left = pick(0, 1), s.right = pick(0, 1), s.top = pick(0, 1), s.bottom = pick(0, 1);
    const int64_t up = s.upsample ? 2 : 1;
    // Two rows under a kernel of three need padding.
    if (s.height * up + s.top + s.bottom < s.kernel_height) s.top = 1;
    if (s.width * up + s.left + s.right < s.kernel_width) s.left = 1;
    out_height = (s.height * up + s.top + s.bottom - s.kernel_height) / s.stride + 1;
    out_width = (s.width * up + s.left + s.right - s.kernel_width) / s.stride + 1;
    groups = pick(0, 2) == 0 ? 0 : s.inputs % 2 ? 1 : 2;
    silu = pick(0, 1), residual_wanted = pick(0, 1);
    std::normal_distribution<float> normal;
    const auto floats = [&](std::vector<float>& v, int64_t n) {
      v.resize(n);
      for (float& value : v) value = normal(random_bits);
    };
    floats(x, s.images * s.height * s.width * s.inputs);
    floats(gain, s.inputs), floats(shift, s.inputs);
    const int64_t columns = (s.outputs + 63) / 64 * 64;
    floats(scale, columns), floats(bias, columns);
    floats(residual, s.images * out_height * out_width * s.outputs);
    const bool extreme = pick(0, 1), alike = pick(0, 1);
    weight.resize(s.outputs * s.inputs * s.kernel_height * s.kernel_width);
    for (int8_t& w : weight) w = static_cast<int8_t>(extreme ? -127 : pick(-127, 127));
    if (extreme)
      for (float& value : x) value = value > 0 && !alike ? 1.0f : -1.0f;
  }

  int code(Result& r, int32_t threads) const {
    const vq_convolution_args& s = shape;
    r.codes.assign(vq_map_bytes(s.images, s.height, s.width, s.inputs), 0);
    r.scale.resize(s.images), r.zero.resize(s.images);
    vq_map_codes_args a{};
    a.images = s.images, a.height = s.height, a.width = s.width, a.channels = s.inputs;
    a.x = x.data(), a.groups = groups, a.gain = gain.data(), a.shift = shift.data();
    a.eps = 1e-6, a.silu = silu, a.codes = r.codes.data();
    a.scale = r.scale.data(), a.zero_point = r.zero.data(), a.threads = threads;
    return vq_map_codes(&a);
  }

  int convolve(Result& r, int32_t threads) const {
    const int64_t columns = scale.size(), moments = shape.images * shape.outputs;
    std::vector<uint8_t> packed(vq_kernel_bytes(shape.outputs, shape.inputs, shape.kernel_height,
                                                shape.kernel_width));
    std::vector<int32_t> panel_sum(columns);
    vq_pack_kernel_args p{shape.outputs,      shape.inputs,  shape.kernel_height,
                          shape.kernel_width, weight.data(), packed.data(),
                          panel_sum.data(),    threads};
    if (const int code = vq_pack_kernel(&p)) return code;
    r.y.resize(residual.size());
    r.sum.resize(moments), r.square.resize(moments), r.low.resize(moments), r.high.resize(moments);
    vq_convolution_args a = shape;
    a.codes = r.codes.data(), a.scale = r.scale.data(), a.zero_point = r.zero.data();
    a.packed = packed.data(), a.panel_sum = panel_sum.data();
    a.panel_scale = scale.data(), a.panel_bias = bias.data(), a.y = r.y.data();
    a.residual = residual_wanted ? residual.data() : nullptr;
    a.moments = {r.sum.data(), r.square.data(), r.low.data(), r.high.data()};
    a.threads = threads;
    return vq_convolution(&a);
  }

  bool run(const char* name, int32_t threads, Result& r) const {
    return vq_select_isa(name) == VQ_OK && code(r, threads) == VQ_OK &&
           convolve(r, threads) == VQ_OK;
  }
};

}  // namespace

int main() {
  int compared = 0;
  for (int turn = 0; turn < 100; ++turn) {
    const Problem problem;
    Result want;
    if (!problem.run("portable", 1, want)) return std::puts("portable failed"), 1;
    for (const char* name : kSets) {
      if (vq_select_isa(name) != VQ_OK) continue;
      Result got;
      if (!problem.run(name, 1 + turn % 2, got) || !(got == want)) {
        const vq_convolution_args& s = problem.shape;
        std::printf("%s differs: %lld x %lld x %lld to %lld, kernel %lld x %lld, stride %lld, up %d\n",
                    name, (long long)s.height, (long long)s.width, (long long)s.inputs,
                    (long long)s.outputs, (long long)s.kernel_height, (long long)s.kernel_width,
                    (long long)s.stride, s.upsample);
        return 1;
      }
      ++compared;
    }
  }
  std::printf("convolution_test: %d comparisons with the portable kernels\n", compared);
  return 0;
}
