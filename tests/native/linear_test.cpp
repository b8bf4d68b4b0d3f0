// The native Linear under the sanitizers: every instruction set against the portable one over
// random shapes and the ends of the codes, in buffers of exactly the size they are said to have, so
// that a read or write beyond them is caught. `python -m varptq.native.build --sanitize` builds and
// runs it.
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "linear/linear.h"
#include "quantize/quantize.h"
#include "sets.h"

namespace {

std::mt19937 random_bits(12345);

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

// On the heap in exact size: the address sanitizer sees the first byte beyond.
template <class T>
using Buffer = std::vector<T>;

struct Shape {
  int64_t rows, outputs, inputs, row_group, weight_group;
  int32_t row_bits, weight_bits, sign_split, hadamard, prologue;
  bool extreme;
  bool table, codebook;  // weights of up to 4 bits are a table's entries; rows are a codebook's
};

Shape random_shape() {
  static const int64_t layouts[][3] = {{37, 37, 37},     {64, 64, 64},    {130, 130, 130},
                                       {256, 64, 128},   {256, 256, 128}, {256, 128, 64},
                                       {192, 64, 192},   {72, 8, 24},     {400, 200, 400},
                                       {400, 400, 200},  {3, 3, 3},       {1024, 64, 128}};
  const auto& layout = layouts[pick(0, 11)];
  Shape s{};
  s.rows = pick(1, 40);
  s.outputs = pick(1, 140);
  s.inputs = layout[0], s.row_group = layout[1], s.weight_group = layout[2];
  s.row_bits = static_cast<int32_t>(pick(2, 8));
  s.weight_bits = static_cast<int32_t>(pick(2, 8));
  s.sign_split = static_cast<int32_t>(pick(0, 1));
  s.hadamard = static_cast<int32_t>(s.inputs & -s.inputs) * static_cast<int32_t>(pick(0, 1));
  s.prologue = static_cast<int32_t>(pick(0, 2));
  s.extreme = pick(0, 1);
  s.table = s.weight_bits <= 4 && pick(0, 1);
  s.codebook = pick(0, 3) == 0;
  if (s.codebook) s.row_bits = 8, s.sign_split = 0;
  return s;
}

// Everything one pass through quantize, pack and linear makes.
struct Result {
  Buffer<uint8_t> codes;
  Buffer<float> scale;
  Buffer<int32_t> zero, sum, products;
  Buffer<float> y;
  bool operator==(const Result& o) const {
    return codes == o.codes && scale == o.scale && zero == o.zero && sum == o.sum &&
           products == o.products && y.size() == o.y.size() &&
           !std::memcmp(y.data(), o.y.data(), y.size() * sizeof(float));
  }
};

struct Problem {
  Shape s;
  int64_t segment, padded, segments, rows;
  Buffer<float> x, gain, shift, means, weight_scale, bias;
  Buffer<uint8_t> weight;
  Buffer<int32_t> weight_zero;
  Buffer<int8_t> table;

  explicit Problem(const Shape& shape) : s(shape) {
    segment = s.row_group < s.weight_group ? s.row_group : s.weight_group;
    padded = (segment + 63) / 64 * 64;
    segments = s.inputs / segment;
    rows = s.rows * (s.sign_split ? 2 : 1);
    std::normal_distribution<float> normal;
    const auto floats = [&](Buffer<float>& v, int64_t n) {
      v.resize(n);
      for (float& value : v) value = normal(random_bits);
    };
    floats(x, s.rows * s.inputs);
    floats(gain, s.inputs);
    floats(shift, s.inputs);
    floats(means, s.inputs);
    floats(weight_scale, s.outputs * (s.inputs / s.weight_group));
    floats(bias, s.outputs);
    const int64_t top = (1 << s.weight_bits) - 1;
    const auto code = [&] { return s.extreme ? pick(0, 1) * top : pick(0, top); };
    if (s.extreme)
      for (float& value : x) value = value > 0 ? 1.0f : -1.0f;
    weight.resize(s.outputs * s.inputs);
    for (uint8_t& w : weight) w = static_cast<uint8_t>(code());
    weight_zero.resize(weight_scale.size());
    for (int32_t& z : weight_zero) z = s.table ? 0 : static_cast<int32_t>(code());
    table.resize(s.table ? 16 : 0);
    for (int8_t& entry : table) entry = static_cast<int8_t>(s.extreme ? -127 : pick(-127, 127));
  }

  int quantize(Result& r, int32_t threads) const {
    r.codes.resize(rows * segments * padded);
    r.scale.resize(rows * (s.inputs / s.row_group));
    r.zero.resize(r.scale.size());
    r.sum.resize(rows * segments);
    vq_quantize_args a{};
    a.rows = s.rows, a.width = a.row_stride = s.inputs, a.x = x.data();
    a.prologue = s.prologue, a.gain = gain.data(), a.shift = shift.data();
    a.rows_per_image = s.rows, a.eps = 1e-6f, a.hadamard = s.hadamard;
    a.means = s.hadamard ? means.data() : nullptr;
    a.num_bits = s.row_bits, a.sign_split = s.sign_split;
    if (s.codebook) a.codebook = {{7, 22, 40, 61, 90, 127}, 6, 1.1f};
    a.group = s.row_group, a.segment = segment;
    a.codes = r.codes.data(), a.scale = r.scale.data(), a.zero_point = r.zero.data();
    a.sum = r.sum.data(), a.threads = threads;
    return vq_quantize(&a);
  }

  int linear(Result& r, int32_t threads) const {
    const int64_t panels = (s.outputs + 63) / 64, groups = s.inputs / s.weight_group;
    Buffer<uint8_t> packed(vq_packed_bytes(s.outputs, s.inputs, segment, s.weight_bits));
    Buffer<float> panel_scale(panels * 64 * groups);
    Buffer<int32_t> panel_zero(panels * 64 * groups), panel_sum(panels * 64 * segments);
    vq_pack_args p{s.outputs,     s.inputs,           weight.data(),     weight_zero.data(),
                   weight_scale.data(), s.weight_bits, entries(), s.weight_group, segment,
                   packed.data(), panel_scale.data(), panel_zero.data(), panel_sum.data(), threads};
    if (const int code = vq_pack(&p)) return code;
    r.y.resize(s.rows * s.outputs);
    r.products.resize(rows * s.outputs * segments);
    vq_linear_args a{};
    a.rows = rows, a.outputs = s.outputs, a.inputs = s.inputs;
    a.row_group = s.row_group, a.weight_group = s.weight_group, a.segment = segment;
    a.row_bits = s.row_bits, a.weight_bits = s.weight_bits, a.pairs = s.sign_split;
    a.codes = r.codes.data(), a.scale = r.scale.data(), a.zero_point = r.zero.data();
    a.sum = r.sum.data(), a.packed = packed.data(), a.table = entries(), a.panel_scale = panel_scale.data();
    a.panel_zero = panel_zero.data(), a.panel_sum = panel_sum.data();
    a.bias = bias.data(), a.rows_per_image = s.rows;
    a.y = r.y.data(), a.y_stride = s.outputs, a.y_type = VQ_FLOAT32, a.threads = threads;
    a.products = r.products.data();
    const int code = vq_linear(&a);
    return code ? code : vq_accumulate(&a);
  }

  const int8_t* entries() const { return s.table ? table.data() : nullptr; }

  bool run(const char* name, int32_t threads, Result& r) const {
    return vq_select_isa(name) == VQ_OK && quantize(r, threads) == VQ_OK &&
           linear(r, threads) == VQ_OK;
  }
};

}  // namespace

int main() {
  int compared = 0;
  for (int turn = 0; turn < 150; ++turn) {
    const Problem problem(random_shape());
    Result want;
    if (!problem.run("portable", 1, want)) return std::puts("portable failed"), 1;
    for (const char* name : kSets) {
      if (vq_select_isa(name) != VQ_OK) continue;
      Result got;
      if (!problem.run(name, 1 + turn % 2, got) || !(got == want)) {
        const Shape& s = problem.s;
        std::printf("%s differs: %lld x %lld x %lld, groups %lld %lld, bits %d %d, split %d table %d\n",
                    name,
                    (long long)s.rows, (long long)s.inputs, (long long)s.outputs,
                    (long long)s.row_group, (long long)s.weight_group, s.row_bits, s.weight_bits,
                    s.sign_split, s.table);
        return 1;
      }
      ++compared;
    }
  }
  std::printf("linear_test: %d comparisons with the portable kernels\n", compared);
  return 0;
}
