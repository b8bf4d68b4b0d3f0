// Attention, sampler, token map and their polynomials under the sanitizers.
//
// Polynomials against libm in double precision; every instruction set against the portable code, on
// odd shapes and at the ends of the codes. Prints what differs; exit code 1 if anything does.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "attention/attention.h"
#include "lanes/vmath.h"
#include "phi/phi.h"
#include "sampler/sampler.h"
#include "sets.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

using Random = std::mt19937;

std::vector<float> normal(Random& random, size_t count, float spread = 1.0f) {
  std::normal_distribution<float> draw(0.0f, spread);
  std::vector<float> out(count);
  for (float& x : out) x = draw(random);
  return out;
}

template <class Run>
void on_every_set(const char* what, Run run) {
  expect(vq_select_isa("portable") == VQ_OK, "portable kernels run");
  const std::vector<float> first = run();
  for (const char* name : kSets) {
    if (vq_select_isa(name) != VQ_OK) continue;
    const std::vector<float> got = run();
    const bool same = !std::memcmp(first.data(), got.data(), got.size() * sizeof(float));
    if (!same) std::printf("%s: ", name);
    expect(same, what);
  }
}

// A sweep in steps of a 5000th.
template <class Ours, class Exact, class Bound>
void sweep(const char* what, float low, float high, Ours ours, Exact exact, Bound bound) {
  for (double x = low; x <= high; x += (std::fabs(x) + 1e-3) * 2e-4) {
    float lanes[vq::kLanes];
    for (float& lane : lanes) lane = static_cast<float>(x);
    const double want = exact(static_cast<double>(lanes[0]));
    vq::store(lanes, ours(vq::load(lanes)));
    if (std::fabs(lanes[0] - want) > bound(static_cast<double>(static_cast<float>(x)), want))
      return expect(false, what);
  }
}

void polynomials() {
  sweep(
      "exp", -87.0f, 88.0f, vq::exp_of, [](double x) { return std::exp(x); },
      [](double x, double y) { return (2e-7 + 8e-8 * std::fabs(x)) * y; });
  sweep(
      "log", 1e-30f, 1e30f, vq::log_of, [](double x) { return std::log(x); },
      [](double, double y) { return 2e-7 * std::fabs(y); });
  sweep(
      "log(1 - u)", 2.9802322e-8f, 0.99999994f, vq::log_one_minus,
      [](double u) { return std::log1p(-u); },
      [](double, double y) { return 3e-7 * std::fabs(y); });
  float zero[vq::kLanes] = {}, one[vq::kLanes];
  vq::store(one, vq::exp_of(vq::load(zero)));
  expect(one[5] == 1.0f, "exp(0) is 1");
}

// Against libm's, also where two roundings give another float than one: products and sums that lie
// between two floats, but for a last bit far below.
void fused_operation() {
  Random random(11);
  std::uniform_int_distribution<int> exponent(-90, 40), bit(0, 1);
  std::uniform_real_distribution<float> mantissa(1.0f, 2.0f);
  for (int i = 0; i < 200000; ++i) {
    const float a = std::ldexp(bit(random) ? 1.0f + 0x1p-12f * static_cast<float>(i % 4096)
                                           : mantissa(random), bit(random));
    const float b = std::ldexp(bit(random) ? 1.0f + 0x1p-12f : mantissa(random), bit(random));
    const float added = std::ldexp(a * b, exponent(random));
    const float c = bit(random) ? added : -added;
    float lanes[vq::kLanes];
    vq::store(lanes, vq::fused(vq::all(a), vq::all(b), vq::all(c)));
    const float want = std::fma(a, b, c);
    if (std::memcmp(&lanes[3], &want, sizeof want) != 0) return expect(false, "a b + c");
  }
}

struct Shape {
  int64_t batch, heads, width;
  int32_t policy, bits;
  float theta;
  bool rotary = false, packed = false;

  bool keys_pack() const { return packed && bits <= 4 && width % 4 == 0 && width > 4; }
  bool values_pack() const { return packed && bits <= 4 && theta < 0; }
};

// The third scale ends within 64 places of its beginning, the fourth far behind.
constexpr int64_t kTokens = 105;

// Four scales in one call; `extreme` inputs have codes at the ends only.
std::vector<float> attention(const Shape& shape, bool extreme, int threads) {
  const int64_t ends[] = {1, 4, 40, kTokens};
  const int64_t spans[] = {0, 1, 1, 1, 4, 4, 4, 40, 40, 40, kTokens, kTokens};
  const int64_t width = shape.heads * shape.width;
  Random random(7);
  std::vector<float> qkv = normal(random, static_cast<size_t>(shape.batch * kTokens * 3 * width));
  if (extreme)
    for (float& x : qkv) x = x > 0 ? 1.0f : -1.0f;
  const std::vector<float> bias = normal(random, static_cast<size_t>(width), extreme ? 0.0f : 1.0f);
  const std::vector<float> factor(static_cast<size_t>(shape.heads), 2.0f);
  const size_t angles = static_cast<size_t>(kTokens * (shape.width / 2));
  const std::vector<float> cosine = normal(random, angles), sine = normal(random, angles);
  const int64_t bytes =
      vq_attention_cache_bytes(shape.width, kTokens, 4, shape.keys_pack(), shape.values_pack());
  // What a cache holds behind its tokens must not count.
  std::vector<uint8_t> cache(static_cast<size_t>(shape.batch * shape.heads * bytes), 0xA5);
  std::vector<float> out(static_cast<size_t>(shape.batch * kTokens * width));
  vq_attention_args a = {};
  a.batch = shape.batch;
  a.heads = shape.heads;
  a.width = shape.width;
  a.queries = a.tokens = a.capacity = kTokens;
  a.ends = ends;
  a.segments = a.num_spans = 4;
  a.spans = spans;
  a.policy = shape.policy;
  a.query_bits = a.key_bits = a.value_bits = shape.bits;
  a.probability_bits = 8;
  a.packed_keys = shape.keys_pack();
  a.packed_values = shape.values_pack();
  a.l2_norm = !extreme;
  a.max_order = 3;
  a.theta = shape.theta;
  a.query = qkv.data();
  a.key = a.query + width;
  a.value = a.key + width;
  a.query_stride = a.key_stride = 3 * width;
  a.query_bias = a.value_bias = bias.data();
  a.query_factor = factor.data();
  a.cosine = shape.rotary ? cosine.data() : nullptr;
  a.sine = shape.rotary ? sine.data() : nullptr;
  a.cache = cache.data();
  a.out = out.data();
  a.threads = threads;
  expect(vq_attention(&a) == VQ_OK, "attention returns 0");
  a.sine = nullptr;
  expect((vq_attention(&a) == VQ_OK) != shape.rotary, "cosines without sines are refused");
  return out;
}

// A text of `keys` tokens that enters in one call; five queries of two scales ask it in another.
std::vector<float> over_text(const Shape& shape, int64_t keys, int threads) {
  const int64_t ends[] = {keys}, spans[] = {0, 1, keys, 1, 5, keys};
  const int64_t width = shape.heads * shape.width;
  Random random(9);
  const std::vector<float> kv = normal(random, static_cast<size_t>(shape.batch * keys * 2 * width));
  const std::vector<float> q = normal(random, static_cast<size_t>(shape.batch * 5 * width), 3.0f);
  const std::vector<float> bias = normal(random, static_cast<size_t>(width));
  const std::vector<float> factor(static_cast<size_t>(shape.heads), 0.125f);
  const int64_t bytes =
      vq_attention_cache_bytes(shape.width, keys, 1, shape.keys_pack(), shape.values_pack());
  // What a cache holds behind its tokens must not count.
  std::vector<uint8_t> cache(static_cast<size_t>(shape.batch * shape.heads * bytes), 0xA5);
  std::vector<float> out(q.size());
  vq_attention_args a = {};
  a.batch = shape.batch;
  a.heads = shape.heads;
  a.width = shape.width;
  a.tokens = a.capacity = keys;
  a.ends = ends;
  a.segments = 1;
  a.policy = shape.policy;
  a.query_bits = a.key_bits = a.value_bits = shape.bits;
  a.probability_bits = 8;
  a.packed_keys = shape.keys_pack();
  a.packed_values = shape.values_pack();
  a.max_order = 3;
  a.theta = shape.theta;
  a.key = kv.data();
  a.value = a.key + width;
  a.key_stride = 2 * width;
  a.value_bias = bias.data();
  a.cache = cache.data();
  a.threads = threads;
  expect(vq_attention(&a) == VQ_OK, "a text enters");
  a.start = keys;
  a.tokens = 0;
  a.queries = 5;
  a.spans = spans;
  a.num_spans = 2;
  a.query = q.data();
  a.query_stride = width;
  a.query_factor = factor.data();
  a.out = out.data();
  expect(vq_attention(&a) == VQ_OK, "a text answers");
  return out;
}

void attentions() {
  const Shape shapes[] = {{1, 1, 1, VQ_POLICY_TOKEN, 8, -1.0f},   {2, 3, 20, VQ_POLICY_TOKEN, 8, -1.0f},
                          {1, 2, 64, VQ_POLICY_TOKEN, 4, 0.01f},  {3, 1, 128, VQ_POLICY_TOKEN, 8, -1.0f},
                          {2, 2, 37, VQ_POLICY_SEGMENT, 6, -1.0f}, {1, 2, 64, VQ_POLICY_SEGMENT, 4, 0.02f},
                          {2, 2, 20, VQ_POLICY_TOKEN, 8, -1.0f, true}, {1, 1, 128, VQ_POLICY_SEGMENT, 4, 0.02f, true},
                          {1, 6, 24, VQ_POLICY_TOKEN, 8, -1.0f},   {1, 5, 16, VQ_POLICY_SEGMENT, 8, -1.0f},
                          {2, 3, 20, VQ_POLICY_TOKEN, 3, -1.0f, false, true},
                          {1, 5, 64, VQ_POLICY_TOKEN, 4, -1.0f, false, true},
                          {2, 2, 12, VQ_POLICY_SEGMENT, 4, -1.0f, false, true},
                          {1, 2, 37, VQ_POLICY_TOKEN, 2, -1.0f, false, true},
                          {1, 2, 16, VQ_POLICY_SEGMENT, 4, 0.02f, false, true}};
  const auto unpacked = [](Shape shape) {
    shape.packed = false;
    return shape;
  };
  for (const Shape& shape : shapes)
    for (const bool extreme : {false, true})
      on_every_set("attention differs between instruction sets", [&] {
        const std::vector<float> one = attention(shape, extreme, 1);
        expect(one == attention(shape, extreme, 2), "attention depends on threads");
        expect(one == attention(unpacked(shape), extreme, 1), "attention depends on packing");
        return one;
      });
  for (const Shape& shape : shapes)
    for (const int64_t keys : {1, 7, 77})
      on_every_set("cross-attention differs between instruction sets", [&] {
        const std::vector<float> one = over_text(shape, keys, 1);
        expect(one == over_text(shape, keys, 2), "cross-attention depends on threads");
        expect(one == over_text(unpacked(shape), keys, 1), "cross-attention depends on packing");
        return one;
      });
}

void samplers() {
  for (const int64_t vocabulary : {1, 15, 16, 37, 1000}) {
    Random random(3);
    const int64_t rows = 5;
    const size_t size = static_cast<size_t>(rows * vocabulary);
    const std::vector<float> logits = normal(random, size, 3.0f), other = normal(random, size, 3.0f);
    std::uniform_real_distribution<float> draw(1e-7f, 0.9999f);
    std::vector<float> uniform(size);
    for (float& x : uniform) x = draw(random);
    on_every_set("the sampler differs between instruction sets", [&] {
      std::vector<float> out(size);
      std::vector<int64_t> ids(static_cast<size_t>(rows));
      vq_sample_args a = {};
      a.rows = rows;
      a.vocabulary = vocabulary;
      a.logits = logits.data();
      a.unconditional = other.data();
      a.guidance = 1.5f;
      a.guidance_plus_one = 2.5f;
      a.top_k = 30;
      a.top_p = 0.9;
      a.temperature = 1.0f;
      a.uniform = uniform.data();
      a.ids = ids.data();
      a.filtered = out.data();
      a.threads = 2;
      expect(vq_sample(&a) == VQ_OK, "the sampler returns 0");
      for (int64_t id : ids) out.push_back(static_cast<float>(id));
      return out;
    });
  }
}

void maps() {
  for (const int64_t side : {1, 3, 16, 17}) {
    Random random(5);
    const size_t size = static_cast<size_t>(2 * 6 * side * side);
    const std::vector<float> h = normal(random, size), f_hat = normal(random, size);
    const std::vector<float> weight = normal(random, 6 * 6 * 9), bias = normal(random, 6);
    on_every_set("the token map differs between instruction sets", [&] {
      std::vector<float> out(size);
      const vq_phi_args a = {2,           6,           side,         h.data(), weight.data(),
                             bias.data(), f_hat.data(), out.data(), 2};
      expect(vq_phi(&a) == VQ_OK, "the token map returns 0");
      return out;
    });
  }
}

}  // namespace

int main() {
  polynomials();
  fused_operation();
  attentions();
  samplers();
  maps();
  std::printf("attention_test: %s on %d sets\n", failures ? "failed" : "passed", sets_here());
  return failures ? 1 : 0;
}
