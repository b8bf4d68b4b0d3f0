// The queries of one row and head, from codes to outputs. Written on lanes.h, compiled once per
// instruction set; codes.h makes the codes, products.h holds the inner loops.
//
// With theta a span is swept twice: the order of a key needs the probabilities of all its queries.
#include "attention/kernel.h"

#include "attention/products.h"

namespace vq {
namespace {

struct Task {
  Head head;
  const AttentionScratch& scratch;
  int64_t span, first;   // query of the block
  int64_t keys, padded;  // rounded up to 16
  const int8_t* values;
  float largest_step;
};

// With theta the rows of scores hold probabilities, without it exponentials.
inline bool with_theta(const Task& task) { return task.head.args.theta >= 0; }
inline bool folded(const Task& task) { return task.head.args.policy == VQ_POLICY_TOKEN; }

inline int64_t trace_at(const Task& task, int64_t query) {
  return task.head.index() * task.head.args.queries + query;
}

// Scores of up to kQueryTile queries and, in their place, exponentials: as they are with theta,
// else times the relative steps.
inline void softmax_rows(const Task& task, int64_t first, int count, float* rows, RowSums* sums) {
  const Head& head = task.head;
  const float* factors = folded(task) && !with_theta(task) ? task.scratch.relative : nullptr;
  const int64_t at = first - task.first;
  const int64_t channels = head.call.layout.channels;
  const AttentionScratch& scratch = task.scratch;
  const Queries queries = {scratch.query_codes + at * channels, channels,
                           scratch.query_pairs + at, scratch.query_scale + at};
  Floats best[kQueryTile];
  for (Floats& one : best) one = all(kLowest);
  by_tiles(count, [&](auto size, int q0) {
    constexpr int kCount = decltype(size)::value;
    if (head.call.layout.packed_keys())
      score_queries<true, kCount>(head, queries, q0, task.keys, rows, best);
    else
      score_queries<false, kCount>(head, queries, q0, task.keys, rows, best);
  });
  for (int i = 0; i < count; ++i) {
    float* row = rows + i * head.call.stride;
    if (head.args.trace)
      std::memcpy(head.args.trace->scores + trace_at(task, first + i) * head.args.capacity, row,
                  static_cast<size_t>(task.keys) * sizeof(float));
    sums[i] = exponentials(row, task.padded, largest_of(best[i]), factors);
  }
}

// Probabilities of all queries of the span, and their sums per key in the order of the queries.
inline void mean_probabilities(const Task& task, int64_t first, int64_t last) {
  const int64_t stride = task.head.call.stride;
  float* mean = task.scratch.mean;
  for (int64_t j = 0; j < task.padded; j += kLanes) store(mean + j, all(0.0f));
  for (int64_t query = first; query < last; query += kQueryTile) {
    const int count = static_cast<int>(last - query < kQueryTile ? last - query : kQueryTile);
    float* rows = task.scratch.scores + (query - first) * stride;
    RowSums sums[kQueryTile];
    softmax_rows(task, query, count, rows, sums);
    for (int i = 0; i < count; ++i) {
      const Floats divisor = all(sums[i].total);
      for (int64_t j = 0; j < task.padded; j += kLanes) {
        const Floats p = load(rows + i * stride + j) / divisor;
        store(rows + i * stride + j, p);
        store(mean + j, load(mean + j) + p);
      }
    }
  }
}

// Order of each key: how many of theta, 2 theta, 4 theta, ... its mean probability exceeds.
inline void find_orders(const Task& task, int64_t queries) {
  const vq_attention_args& args = task.head.args;
  for (int64_t j = 0; j < task.padded; ++j) {
    const float mean = task.scratch.mean[j] / static_cast<float>(queries);
    int32_t order = 0;
    for (int32_t n = 0; n < args.max_order; ++n)
      order += mean > args.theta * static_cast<float>(1 << n);
    task.scratch.orders[j] = order;
  }
  if (args.trace) {
    const int64_t heads = args.batch * args.heads;
    std::memcpy(args.trace->orders + (task.span * heads + task.head.index()) * args.capacity,
                task.scratch.orders, static_cast<size_t>(task.keys) * sizeof(int32_t));
  }
}

// One byte of each group of four to its order: a rounding shift, and back to units of the finest.
template <int byte>
inline Ints shifted_byte(Ints group, int shift, int back) {
  const Ints fine = shift_right<24>(shift_left<24 - 8 * byte>(group));
  const Ints step = shift_right(fine + all_int((1 << shift) >> 1), shift);
  return shift_left<8 * byte>(shift_left(step, back) & all_int(0xFF));
}

// Cached integers to the orders of this span. Where keys share a scale ("segment") they stay in
// units of the finest order.
inline void values_at_orders(const Task& task) {
  const Head& head = task.head;
  const int64_t channels = head.call.layout.channels;
  const int32_t most = head.args.max_order;
  const int8_t* cached = head.at<int8_t>(head.call.layout.values);
  const Piece* last = head.call.pieces + head.call.num_pieces;
  for (const Piece* piece = head.call.pieces; piece < last; ++piece) {
    const int64_t end = piece->end < task.keys ? piece->end : task.keys;
    for (int64_t j = piece->start; j < end; j += 4) {
      int shift[4] = {}, back[4] = {};
      for (int i = 0; i < 4 && j + i < end; ++i) {
        shift[i] = most - task.scratch.orders[j + i];
        back[i] = folded(task) ? 0 : shift[i];
      }
      const int64_t at = (piece->place + j - piece->start) * channels;
      const auto* from = reinterpret_cast<const int32_t*>(cached + at);
      auto* to = reinterpret_cast<int32_t*>(task.scratch.values + at);
      for (int64_t c = 0; c < channels; c += kLanes) {
        const Ints group = load(from + c);
        store(to + c, shifted_byte<0>(group, shift[0], back[0]) |
                          shifted_byte<1>(group, shift[1], back[1]) |
                          shifted_byte<2>(group, shift[2], back[2]) |
                          shifted_byte<3>(group, shift[3], back[3]));
      }
    }
  }
}

// What probabilities are multiplied by before their codes: the step of a key over the largest step,
// 1 where keys share a scale, 0 behind the last key.
inline void find_relative(Task& task) {
  const Head& head = task.head;
  const float* scale = head.at<float>(head.call.layout.value_scale);
  float* relative = task.scratch.relative;
  Floats best = all(0.0f);
  for (int64_t j = 0; j < task.padded; j += kLanes) {
    Floats step = all(1.0f);
    if (folded(task)) step = load(scale + j);
    if (folded(task) && with_theta(task))  // divided by 2^order
      step = step / floats_of(shift_left<23>(load(task.scratch.orders + j) + all_int(127)));
    const Floats left = all(static_cast<float>(task.keys - j));
    step = where_less(to_float(load(kIndex)), left, step, all(0.0f));
    best = larger(best, step);
    store(relative + j, step);
  }
  // Steps of 0 belong to values of 0.
  task.largest_step = largest_of(best) > kLeastScale ? largest_of(best) : kLeastScale;
  const Floats divisor = all(task.largest_step);
  for (int64_t j = 0; j < task.padded; j += kLanes)
    store(relative + j, load(relative + j) / divisor);
}

inline void write_rows(const Task& task, const float* rows, int64_t first, int count) {
  const vq_attention_args& args = task.head.args;
  for (int i = 0; i < count; ++i) {
    const int64_t token = task.head.row * args.queries + first + i;
    float* out = args.out + (token * args.heads + task.head.head) * args.width;
    std::memcpy(out, rows + i * kMaxHeadWidth, static_cast<size_t>(args.width) * sizeof(float));
  }
}

inline void trace_rows(const Task& task, int64_t first, int count, const float* scale) {
  const vq_attention_args& args = task.head.args;
  for (int i = 0; i < count; ++i) {
    const int64_t at = trace_at(task, first + i);
    args.trace->row_scale[at] = scale[i];
    const uint8_t* codes = task.scratch.codes + i * task.head.call.layout.places;
    for (int64_t j = 0; j < task.keys; ++j)
      args.trace->probability_codes[at * args.capacity + j] = codes[place_of(task.head.call, j)];
  }
}

// Outputs of `count` queries whose rows hold probabilities, times relative steps, times the total.
inline void mix_rows(const Task& task, int64_t first, int count, const float* rows,
                     const RowSums* sums) {
  const Head& head = task.head;
  const AttentionCall& call = head.call;
  const CacheLayout& layout = call.layout;
  alignas(64) float out[kQueryTile * kMaxHeadWidth];
  float scale[kQueryTile];
  for (int i = 0; i < count; ++i) {
    uint8_t* codes = task.scratch.codes + i * layout.places;
    scale[i] = probability_codes(head, rows + i * call.stride, task.keys, sums[i], codes);
    if (folded(task)) scale[i] *= task.largest_step;
  }
  if (head.args.trace) trace_rows(task, first, count, scale);
  Mixture mix = {layout, task.values, head.value_coding.table, {}, {}, out, true};
  for (const Piece* piece = call.pieces; piece < call.pieces + call.num_pieces; ++piece) {
    if (piece->start >= task.keys) break;
    const int64_t end = piece->end < task.keys ? piece->end : task.keys;
    const int64_t last = piece->place + end - piece->start;
    float step = folded(task) ? 1.0f : head.at<float>(layout.value_scale)[piece->start];
    if (!folded(task) && with_theta(task)) step /= static_cast<float>(1 << head.args.max_order);
    for (int i = 0; i < count; ++i) {
      mix.scale[i] = folded(task) ? scale[i] : scale[i] * step;
      const uint8_t* codes = task.scratch.codes + i * layout.places;
      mix.zero_sum[i] =
          with_theta(task)
              ? 0
              : zero_point_sum(codes, head.at<int8_t>(layout.value_zero), piece->place, last,
                               end == task.keys);
    }
    by_tiles(count, [&](auto size, int q0) {
      constexpr int kCount = decltype(size)::value;
      if (layout.packed_values)
        mix_queries<true, kCount>(mix, task.scratch.codes, q0, piece->place, last);
      else
        mix_queries<false, kCount>(mix, task.scratch.codes, q0, piece->place, last);
    });
    mix.first = false;
  }
  write_rows(task, out, first, count);
}

bool attend(const AttentionCall& call, int64_t row, int64_t head, const QueryBlock& block,
            const AttentionScratch& scratch) {
  const Head one(call, row, head);
  const int64_t keys = call.args->spans[3 * block.span + 2];
  Task task = {one, scratch, block.span, block.first, keys, (keys + kLanes - 1) / kLanes * kLanes,
               one.at<int8_t>(call.layout.values), 1.0f};
  if (!quantize_queries(one, block.first, block.last, scratch)) return false;
  if (with_theta(task)) {
    mean_probabilities(task, block.first, block.last);
    find_orders(task, block.last - block.first);
    values_at_orders(task);
    task.values = scratch.values;
  }
  if (folded(task) || with_theta(task)) find_relative(task);
  for (int64_t query = block.first; query < block.last; query += kQueryTile) {
    const int64_t left = block.last - query;
    const int count = static_cast<int>(left < kQueryTile ? left : kQueryTile);
    RowSums sums[kQueryTile];
    float* rows = scratch.scores;
    if (!with_theta(task)) {
      softmax_rows(task, query, count, rows, sums);
    } else {
      rows += (query - block.first) * call.stride;
      for (int i = 0; i < count; ++i)
        sums[i] = {1.0f, times(rows + i * call.stride, task.padded, scratch.relative)};
    }
    mix_rows(task, query, count, rows, sums);
  }
  return true;
}

}  // namespace

AttentionKernels attention_kernels(Set<kIsa>) { return {append, attend}; }

}  // namespace vq
