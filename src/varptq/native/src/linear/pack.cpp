// Weight codes to panels; the layout is described in linear.h.
#include <algorithm>
#include <cstring>

#include "linear/gemm.h"
#include "machine/pool.h"

namespace {

using vq::kBlock;
using vq::kPanel;

int32_t stored(int32_t code, int32_t num_bits) { return num_bits == 8 ? code - 128 : code; }

// The correction of a segment of at most kShortSegment inputs is one product of 16-bit pairs,
// (za, A1 - L za) with (-W1, -zc), so this is what is kept; longer ones keep W1.
int32_t panel_entry(int32_t sum, int32_t zero, int64_t segment, int64_t inputs) {
  if (!vq::is_short(segment, inputs)) return sum;
  const uint32_t low = static_cast<uint16_t>(-sum), high = static_cast<uint16_t>(-zero);
  return static_cast<int32_t>(low | high << 16);
}

// The bytes of output n in the block of inputs `block`, four inputs at a stride of kPanel * 4;
// nibbles of odd blocks are the upper ones.
struct Place {
  uint8_t* bytes;
  int shift;
};

Place place_of(const vq_pack_args& a, int64_t blocks, int64_t n, int64_t block) {
  const bool nibbles = a.num_bits <= 4;
  const int64_t per_panel = nibbles ? (blocks + 1) / 2 : blocks;
  const int64_t at = n / kPanel * per_panel + (nibbles ? block / 2 : block);
  uint8_t* bytes = a.packed + at * (kBlock / 4) * (kPanel * 4) + n % kPanel * 4;
  return {bytes, nibbles && block % 2 ? 4 : 0};
}

// One block of the panel, of output n: kBlock values, 0 beyond the last input.
void put_block(Place place, const uint8_t* values) {
  for (int64_t i = 0; i < kBlock; i += 4) {
    uint8_t* at = place.bytes + i * kPanel;
    uint32_t four;
    std::memcpy(&four, values + i, sizeof four);
    if (place.shift) {
      // The lower halves are there. A shift of four bytes at once stays within them, since codes
      // of nibbles have four bits.
      uint32_t before;
      std::memcpy(&before, at, sizeof before);
      four = before | four << place.shift;
    }
    std::memcpy(at, &four, sizeof four);
  }
}

// At most kBlock inputs of output n; the sum of what their codes stand for.
int32_t pack_block(const vq_pack_args& a, Place place, const uint8_t* codes, int64_t count) {
  uint8_t values[kBlock] = {};
  std::memcpy(values, codes, count);
  int32_t sum = 0;
  if (a.table) {
    for (int64_t i = 0; i < count; ++i) sum += a.table[codes[i]];
  } else {
    const uint8_t middle = a.num_bits == 8 ? 128 : 0;
    for (int64_t i = 0; i < kBlock; ++i) values[i] -= middle;
    std::memset(values + count, 0, kBlock - count);
    for (int64_t i = 0; i < kBlock; ++i) sum += static_cast<int8_t>(values[i]);
  }
  put_block(place, values);
  return sum;
}

// One panel, all of whose padding is 0. Block by block, so that what is written, 4 kB of a panel,
// stays in the cache while every output adds its four bytes here and there.
void pack_panel(const vq_pack_args& a, int64_t panel) {
  const int64_t segments = a.inputs / a.segment, groups = a.inputs / a.group;
  const int64_t per_segment = vq::padded(a.segment) / kBlock;
  const int64_t bytes = vq_packed_bytes(kPanel, a.inputs, a.segment, a.num_bits);
  const int64_t first = panel * kPanel, last = std::min(first + kPanel, a.outputs);
  std::memset(a.packed + panel * bytes, 0, bytes);
  std::fill_n(a.panel_scale + first * groups, kPanel * groups, 0.0f);
  std::fill_n(a.panel_zero + first * groups, kPanel * groups, 0);
  std::fill_n(a.panel_sum + first * segments, kPanel * segments, 0);
  for (int64_t n = first; n < last; ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = vq::panel_index(n, g, groups);
      a.panel_scale[at] = a.scale[n * groups + g];
      a.panel_zero[at] = stored(a.zero_point[n * groups + g], a.num_bits);
    }
  }
  for (int64_t s = 0; s < segments; ++s) {
    int32_t sums[kPanel] = {};
    for (int64_t i = 0; i < a.segment; i += kBlock) {
      const int64_t count = std::min<int64_t>(kBlock, a.segment - i);
      for (int64_t n = first; n < last; ++n) {
        const Place place = place_of(a, segments * per_segment, n, s * per_segment + i / kBlock);
        const uint8_t* codes = a.codes + n * a.inputs + s * a.segment + i;
        sums[n - first] += pack_block(a, place, codes, count);
      }
    }
    for (int64_t n = first; n < last; ++n) {
      const int32_t zero = a.panel_zero[vq::panel_index(n, s * a.segment / a.group, groups)];
      const int32_t entry = panel_entry(sums[n - first], zero, a.segment, a.inputs);
      a.panel_sum[vq::panel_index(n, s, segments)] = entry;
    }
  }
}

bool valid(const vq_pack_args* a) {
  return a && a->outputs > 0 && a->inputs > 0 && a->codes && a->zero_point && a->scale &&
         a->num_bits >= 2 && a->num_bits <= (a->table ? 4 : 8) && a->packed && a->panel_scale && a->panel_zero &&
         a->panel_sum && a->group > 0 && a->segment > 0 &&
         a->segment <= vq::kLongestSegment && a->inputs % a->group == 0 &&
         a->group % a->segment == 0;
}

}  // namespace

extern "C" {

int64_t vq_packed_bytes(int64_t outputs, int64_t inputs, int64_t segment, int32_t num_bits) {
  const int64_t blocks = inputs / segment * vq::padded(segment) / kBlock;
  return vq::padded(outputs) * kBlock * (num_bits <= 4 ? (blocks + 1) / 2 : blocks);
}

int vq_pack(const vq_pack_args* a) {
  if (!valid(a)) return VQ_BAD_ARGUMENT;
  auto task = [&](int64_t panel, int) { pack_panel(*a, panel); };
  vq::parallel_for(vq::padded(a->outputs) / kPanel, a->threads, task);
  return VQ_OK;
}

}  // extern "C"
