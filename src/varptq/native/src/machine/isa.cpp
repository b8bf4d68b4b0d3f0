#include "machine/isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "varptq.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace vq {
namespace {

constexpr const char* kNames[] = {"portable",     "avx2",         "avxvnni",
                                  "avx512vnni",   "amx",          "neon-dotprod",
                                  "neon-i8mm",    "amx-emulated", "avxvnni-evex"};
constexpr int kCount = 9;
constexpr int kBest = static_cast<int>(Isa::neon_i8mm);  // those behind it are for tests

#if defined(__x86_64__)
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned part) {
  Registers r;
  if (!__get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

bool bit(unsigned word, int index) { return (word >> index) & 1; }

// State that the operating system saves: without it the registers cannot be used.
unsigned long long saved_state() {
  if (!bit(cpuid(1, 0).c, 27)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long long>(high) << 32 | low;
}

bool saves(unsigned long long mask) { return (saved_state() & mask) == mask; }

bool has_avx2() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  return saves(0x6) && bit(one.c, 12) && bit(one.c, 28) && bit(seven.b, 5);  // fma, avx, avx2
}

bool has_avxvnni() { return has_avx2() && bit(cpuid(7, 1).a, 4); }

bool has_avx512vnni() {
  const Registers seven = cpuid(7, 0);
  const bool all = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31) &&
                   bit(seven.c, 11);  // f, dq, bw, vl, vnni
  return has_avx2() && saves(0xE6) && all;
}

// Some hypervisors show the bits without a palette, and Linux gives tiles only on request.
bool has_amx() {
  const Registers seven = cpuid(7, 0);
  if (!has_avx512vnni() || !bit(seven.d, 24) || !bit(seven.d, 25) || !saves(0x60000)) return false;
  if (cpuid(0x1D, 0).a < 1) return false;
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#else
bool has_avx2() { return false; }
bool has_avxvnni() { return false; }
bool has_avx512vnni() { return false; }
bool has_amx() { return false; }
#endif

#if defined(__aarch64__) && defined(__linux__)
// By number, since older headers lack the name of the second bit.
bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20) & 1; }
bool has_i8mm() { return has_dotprod() && ((getauxval(AT_HWCAP2) >> 13) & 1); }
#elif defined(__aarch64__) && defined(__APPLE__)
// Not run yet: no such machine was at hand.
bool says(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value == 1;
}
bool has_dotprod() { return says("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dotprod() && says("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

int best_below(int cap) {
  while (cap > 0 && !supported(static_cast<Isa>(cap))) --cap;
  return cap;
}

int first_choice() {
  const char* asked = std::getenv("VARPTQ_ISA");
  if (!asked || !*asked) return best_below(kBest);
  for (int i = 0; i < kCount; ++i) {
    if (std::strcmp(asked, kNames[i])) continue;
    if (i <= kBest) return best_below(i);
    if (supported(static_cast<Isa>(i))) return i;
  }
  return best_below(kBest);
}

std::atomic<int> chosen{-1};

}  // namespace

bool supported(Isa wanted) {
  static const bool avx2 = has_avx2(), half = has_avxvnni(), vnni = has_avx512vnni();
  static const bool amx = has_amx(), dotprod = has_dotprod(), i8mm = has_i8mm();
  switch (wanted) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avxvnni:
      return half;
    case Isa::avx512vnni:
    case Isa::amx_emulated:
    case Isa::avxvnni_evex:
      return vnni;
    case Isa::amx:
      return amx;
    case Isa::neon_dotprod:
      return dotprod;
    case Isa::neon_i8mm:
      return i8mm;
  }
  return false;
}

Isa isa() {
  int now = chosen.load(std::memory_order_relaxed);
  if (now < 0) {
    now = first_choice();
    chosen.store(now, std::memory_order_relaxed);
  }
  return static_cast<Isa>(now);
}

Isa product_isa() {
  const Isa now = isa();
  return now == Isa::amx || now == Isa::amx_emulated ? Isa::avx512vnni : now;
}

Isa vector_isa() {
  const Isa now = product_isa();
  if (now == Isa::neon_i8mm) return Isa::neon_dotprod;
  return now == Isa::avxvnni || now == Isa::avxvnni_evex ? Isa::avx2 : now;
}

bool select_isa(Isa wanted) {
  if (!supported(wanted)) return false;
  chosen.store(static_cast<int>(wanted), std::memory_order_relaxed);
  return true;
}

}  // namespace vq

extern "C" {

const char* vq_isa(void) { return vq::kNames[static_cast<int>(vq::isa())]; }

const char* vq_features(void) {
  static char text[64];
  int used = 0;
  for (int i = 0; i < vq::kCount; ++i)
    if (vq::supported(static_cast<vq::Isa>(i)) && i <= vq::kBest)
      used += std::snprintf(text + used, sizeof text - used, used ? " %s" : "%s", vq::kNames[i]);
  return text;
}

int vq_select_isa(const char* name) {
  for (int i = 0; i < vq::kCount; ++i)
    if (!std::strcmp(name, vq::kNames[i]))
      return vq::select_isa(static_cast<vq::Isa>(i)) ? VQ_OK : VQ_BAD_ARGUMENT;
  return VQ_BAD_ARGUMENT;
}

const char* vq_source_hash(void) { return VQ_SOURCE_HASH; }

}  // extern "C"
