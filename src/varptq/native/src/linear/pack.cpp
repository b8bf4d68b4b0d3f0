// Weight codes to panels; the layout is described in linear.h.
#include <algorithm>
#include <cstring>

#include "linear/gemm.h"

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

// The bytes of the four inputs of output n from `position` on, a multiple of four; nibbles of odd
// blocks are the upper ones.
struct Place {
  uint8_t* bytes;
  int shift;
};

Place place_of(const vq_pack_args& a, int64_t blocks, int64_t n, int64_t position) {
  const int64_t block = position / kBlock, four = position % kBlock / 4;
  const bool nibbles = a.num_bits <= 4;
  const int64_t per_panel = nibbles ? (blocks + 1) / 2 : blocks;
  const int64_t at = n / kPanel * per_panel + (nibbles ? block / 2 : block);
  uint8_t* bytes = a.packed + (at * (kBlock / 4) + four) * (kPanel * 4) + n % kPanel * 4;
  return {bytes, nibbles && block % 2 ? 4 : 0};
}

// The inputs of a segment, to `position` on; the sum of what their codes stand for.
int32_t pack_segment(const vq_pack_args& a, int64_t blocks, int64_t n, const uint8_t* codes,
                     int64_t position) {
  int32_t sum = 0;
  for (int64_t i = 0; i < a.segment; i += 4) {
    const Place place = place_of(a, blocks, n, position + i);
    const int64_t count = std::min<int64_t>(4, a.segment - i);
    for (int64_t j = 0; j < count; ++j) {
      const int32_t value = stored(codes[i + j], a.num_bits);
      place.bytes[j] |= static_cast<uint8_t>(static_cast<uint32_t>(value) << place.shift);
      sum += a.table ? a.table[value] : value;
    }
  }
  return sum;
}

void pack_row(const vq_pack_args& a, int64_t n) {
  const int64_t segments = a.inputs / a.segment;
  const int64_t groups = a.inputs / a.group;
  const int64_t blocks = segments * vq::padded(a.segment) / kBlock;
  for (int64_t g = 0; g < groups; ++g) {
    a.panel_scale[vq::panel_index(n, g, groups)] = a.scale[n * groups + g];
    a.panel_zero[vq::panel_index(n, g, groups)] = stored(a.zero_point[n * groups + g], a.num_bits);
  }
  for (int64_t s = 0; s < segments; ++s) {
    const uint8_t* codes = a.codes + n * a.inputs + s * a.segment;
    const int32_t sum = pack_segment(a, blocks, n, codes, s * vq::padded(a.segment));
    const int32_t zero = a.panel_zero[vq::panel_index(n, s * a.segment / a.group, groups)];
    a.panel_sum[vq::panel_index(n, s, segments)] = panel_entry(sum, zero, a.segment, a.inputs);
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
  const int64_t columns = vq::padded(a->outputs), groups = a->inputs / a->group;
  std::memset(a->packed, 0, vq_packed_bytes(a->outputs, a->inputs, a->segment, a->num_bits));
  std::memset(a->panel_scale, 0, groups * columns * sizeof(float));
  std::memset(a->panel_zero, 0, groups * columns * sizeof(int32_t));
  std::memset(a->panel_sum, 0, a->inputs / a->segment * columns * sizeof(int32_t));
  for (int64_t n = 0; n < a->outputs; ++n) pack_row(*a, n);
  return VQ_OK;
}

}  // extern "C"
