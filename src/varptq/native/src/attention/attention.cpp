// Attention on codes: checks, the cache's layout, and how a call is cut into tasks.
//
// A task is a row and head: its keys and values enter the cache, then its queries are answered
// while that cache is warm. Where there are too few of those for the threads, keys and values enter
// first and the queries follow in blocks.
#include "attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "attention/kernel.h"
#include "machine/isa.h"
#include "machine/pool.h"

namespace vq {
namespace {

constexpr int64_t kBlockQueries = 8 * kQueryTile;

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

CacheLayout layout_of(int64_t width, int64_t capacity, int64_t segments, bool packed_keys,
                      bool packed_values) {
  CacheLayout layout = {};
  layout.quads = round_up(width, 4) / 4;
  layout.stored_quads = packed_keys ? round_up(layout.quads, 2) / 2 : layout.quads;
  layout.packed_values = packed_values;
  layout.channels = round_up(width, 16);
  layout.tokens = round_up(capacity, 16);
  // 16 codes are written at a time, from the start of a piece on.
  layout.places = round_up(capacity + 3 * segments + 16, 64);
  int64_t offset = 0;
  const auto take = [&offset](int64_t bytes) {
    const int64_t start = offset;
    offset += round_up(bytes, 64);
    return start;
  };
  layout.keys = take(layout.tokens * layout.stored_quads * 4);
  layout.pairs = take(layout.tokens * 4);
  layout.key_scale = take(layout.tokens * 4);
  layout.values = take(layout.places * layout.channels / (packed_values ? 2 : 1));
  layout.value_zero = take(layout.places + 64);
  layout.value_scale = take(layout.tokens * 4);
  layout.bytes = offset;
  return layout;
}

bool sizes_fit(int64_t width, int64_t capacity, int64_t segments, bool packed_keys) {
  if (packed_keys && (width % 4 != 0 || width < 8)) return false;
  return width >= 1 && width <= kMaxHeadWidth && capacity >= 1 && capacity <= 1 << 20 &&
         segments >= 1 && segments <= capacity;
}

bool bits_fit(int32_t bits) { return bits >= 2 && bits <= 8; }

bool spans_fit(const vq_attention_args& args) {
  for (int64_t i = 0; i < args.num_spans; ++i) {
    const int64_t* span = args.spans + 3 * i;
    if (span[0] < 0 || span[1] < span[0] || span[1] > args.queries) return false;
    if (span[2] < 1 || span[2] > args.start + args.tokens) return false;
  }
  return true;
}

bool segments_fit(const vq_attention_args& args) {
  int64_t before = 0;
  bool starts = args.start == 0, ends = false;
  for (int64_t i = 0; i < args.segments; ++i) {
    if (args.ends[i] <= before) return false;
    before = args.ends[i];
    starts = starts || before == args.start;
    ends = ends || before == args.start + args.tokens;
  }
  // A segment's range is that of all its tokens, so they come in one call.
  const bool whole = args.policy == VQ_POLICY_TOKEN || args.tokens == 0 || (starts && ends);
  return before == args.capacity && whole;
}

bool acceptable(const vq_attention_args& args) {
  if (!sizes_fit(args.width, args.capacity, args.segments, args.packed_keys != 0)) return false;
  if (args.packed_keys && (args.key_bits > 4 || args.key_book.count > kHalfEntries)) return false;
  if (args.packed_values &&
      (args.value_bits > 4 || args.value_book.count > kHalfEntries || args.theta >= 0))
    return false;
  if (args.batch < 0 || args.heads < 1 || args.start < 0) return false;
  if (args.tokens < 0 || args.queries < 0) return false;
  if (args.start + args.tokens > args.capacity) return false;
  if (args.cosine && (!args.sine || args.width % 2 || args.start + args.queries > args.capacity))
    return false;
  if (args.policy != VQ_POLICY_TOKEN && args.policy != VQ_POLICY_SEGMENT) return false;
  if (!bits_fit(args.query_bits) || !bits_fit(args.key_bits) || !bits_fit(args.value_bits))
    return false;
  if (!bits_fit(args.probability_bits) || args.max_order < 0 || args.max_order > 3) return false;
  if (args.theta >= 0 && ((1 << args.value_bits) - 1) << args.max_order > 127) return false;
  for (const vq_codebook* book : {&args.query_book, &args.key_book, &args.value_book})
    if (book->count < 0 || book->count > VQ_MOST_ENTRIES) return false;
  if (args.value_book.count && (args.policy != VQ_POLICY_TOKEN || args.max_order != 0))
    return false;
  return segments_fit(args) && spans_fit(args);
}

std::vector<Piece> pieces_of(const vq_attention_args& args) {
  if (args.policy == VQ_POLICY_TOKEN) return {{0, args.capacity, 0}};
  std::vector<Piece> pieces;
  int64_t start = 0, place = 0;
  for (int64_t i = 0; i < args.segments; ++i) {
    pieces.push_back({start, args.ends[i], place});
    place = round_up(place + args.ends[i] - start, 4);
    start = args.ends[i];
  }
  return pieces;
}

// One worker's buffers, 64-byte aligned in one block.
class Buffers {
 public:
  Buffers(const AttentionCall& call, const std::vector<QueryBlock>& blocks) {
    const vq_attention_args& args = *call.args;
    int64_t queries = 0;
    for (const QueryBlock& block : blocks) queries = std::max(queries, block.last - block.first);
    queries = round_up(queries, 16);
    const int64_t rows = args.theta >= 0 ? std::max<int64_t>(kQueryTile, queries) : kQueryTile;
    const int64_t floats = rows * call.stride, places = call.layout.places;
    const int64_t values = args.theta >= 0 ? places * call.layout.channels : 0;
    // Zeros: what lies behind the last key is read, multiplied by nothing.
    const int64_t bytes = (floats + 3 * call.stride) * 4 + kQueryTile * places + values +
                          queries * (call.layout.channels + 8);
    memory_.assign(static_cast<size_t>(bytes + 64), 0);
    auto* at = reinterpret_cast<uint8_t*>(
        round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory_.data())), 64));
    scratch.scores = reinterpret_cast<float*>(at);
    scratch.relative = scratch.scores + floats;
    scratch.mean = scratch.relative + call.stride;
    scratch.orders = reinterpret_cast<int32_t*>(scratch.mean + call.stride);
    scratch.codes = reinterpret_cast<uint8_t*>(scratch.orders + call.stride);
    scratch.values = reinterpret_cast<int8_t*>(scratch.codes + kQueryTile * places);
    scratch.query_codes = reinterpret_cast<uint8_t*>(scratch.values + values);
    scratch.query_pairs =
        reinterpret_cast<int32_t*>(scratch.query_codes + queries * call.layout.channels);
    scratch.query_scale = reinterpret_cast<float*>(scratch.query_pairs + queries);
  }

  Buffers(Buffers&&) = default;  // not copied: scratch points into memory_

  AttentionScratch scratch = {};

 private:
  std::vector<uint8_t> memory_;
};

// Queries of all spans; with theta a span is one block, since its orders depend on all its queries.
std::vector<QueryBlock> blocks_of(const vq_attention_args& args, int64_t queries) {
  std::vector<QueryBlock> blocks;
  for (int64_t span = 0; span < args.num_spans; ++span) {
    const int64_t first = args.spans[3 * span], last = args.spans[3 * span + 1];
    const int64_t step = args.theta >= 0 ? std::max<int64_t>(last - first, 1) : queries;
    for (int64_t query = first; query < last; query += step)
      blocks.push_back({span, query, std::min(query + step, last)});
  }
  return blocks;
}

int run(const vq_attention_args& args) {
  const std::vector<Piece> pieces = pieces_of(args);
  const CacheLayout layout = layout_of(args.width, args.capacity, args.segments,
                                       args.packed_keys != 0, args.packed_values != 0);
  const AttentionCall call = {&args, layout, pieces.data(), static_cast<int64_t>(pieces.size()),
                              layout.tokens + 16};
  const int threads = usable_threads(args.threads);
  const int64_t heads = args.batch * args.heads;
  const AttentionKernels kernels =
      on_product_isa([](auto set) { return attention_kernels(set); });
  // With a few tasks a thread the threads end within a fraction of a task of each other.
  const bool whole_heads = threads == 1 || heads >= 4 * threads;
  const std::vector<QueryBlock> blocks = blocks_of(args, whole_heads ? args.queries : kBlockQueries);
  std::vector<Buffers> buffers;
  buffers.reserve(static_cast<size_t>(threads));
  for (int worker = 0; worker < threads; ++worker) buffers.emplace_back(call, blocks);
  std::atomic<bool> finite{true};
  const int64_t spare = threads == 1 ? kMostHeads : heads / (4 * threads);
  const int64_t together = whole_heads ? std::min({kMostHeads, args.heads, spare}) : 1;
  const int64_t groups = (args.heads + together - 1) / together;
  auto enter = [&](int64_t index, int) {
    const int64_t first = index % groups * together;
    const int64_t some = std::min(together, args.heads - first);
    if (!kernels.append(call, index / groups, first, some)) finite = false;
  };
  auto answer = [&](int64_t index, const QueryBlock& block, int worker) {
    const AttentionScratch& scratch = buffers[static_cast<size_t>(worker)].scratch;
    if (finite && !kernels.attend(call, index / args.heads, index % args.heads, block, scratch))
      finite = false;
  };
  auto some_heads = [&](int64_t index, int worker) {
    enter(index, worker);
    const int64_t first = index % groups * together;
    const int64_t row = index / groups * args.heads;
    const int64_t last = std::min(first + together, args.heads);
    for (int64_t one = first; one < last; ++one)
      for (const QueryBlock& block : blocks) answer(row + one, block, worker);
  };
  const int64_t count = static_cast<int64_t>(blocks.size());
  auto part = [&](int64_t index, int worker) {
    answer(index / count, blocks[static_cast<size_t>(index % count)], worker);
  };
  if (whole_heads) {
    parallel_for(args.batch * groups, threads, some_heads);
  } else {
    parallel_for(args.batch * groups, threads, enter);
    parallel_for(heads * count, threads, part);
  }
  return finite ? VQ_OK : VQ_NON_FINITE;
}

}  // namespace
}  // namespace vq

extern "C" {

int64_t vq_attention_cache_bytes(int64_t width, int64_t capacity, int64_t segments,
                                 int32_t packed_keys, int32_t packed_values) {
  const bool keys = packed_keys != 0;
  if (!vq::sizes_fit(width, capacity, segments, keys)) return 0;
  return vq::layout_of(width, capacity, segments, keys, packed_values != 0).bytes;
}

int vq_attention(const vq_attention_args* args) {
  if (!args || !vq::acceptable(*args)) return VQ_BAD_ARGUMENT;
  try {
    return vq::run(*args);
  } catch (const std::bad_alloc&) {
    return VQ_BAD_ARGUMENT;
  }
}

}  // extern "C"
