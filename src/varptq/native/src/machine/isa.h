// Which instruction set the kernels of this process use.
//
// The choice is made once, at the first call: the best that CPU, operating system and hypervisor
// agree on, no better than VARPTQ_ISA allows. For tests on machines without them, "amx-emulated"
// runs the AMX kernels with tiles made of plain C++, and "avxvnni-evex" those of AVX-VNNI with
// AVX512VL's encoding of the same instruction. Every set gives the same bits.
//
// The build defines VQ_X86 or VQ_ARM where the kernels of x86-64 or of 64-bit ARM are part of it.
#pragma once

namespace vq {

// Those of a processor in the order of preference, then those for tests.
enum class Isa : int {
  portable,
  avx2,
  avxvnni,
  avx512vnni,
  amx,
  neon_dotprod,
  neon_i8mm,
  amx_emulated,
  avxvnni_evex
};

Isa isa();

// avx512vnni for AMX, whose kernels only replace the large products; else isa() itself.
Isa product_isa();

// The same, and avx2 for AVX-VNNI, neon_dotprod for I8MM: these add byte products alone.
Isa vector_isa();

// Changes the choice for the calls that follow; false where this machine cannot run it.
bool select_isa(Isa wanted);

bool supported(Isa wanted);

// A source that is compiled once per instruction set (ISAS_OF in build.py) defines
// `Kernel the_kernel(Set<kIsa>)`, and its header declares that overload for each set: so the
// symbols stay apart. All else in such a source has internal linkage.
template <Isa>
struct Set {};

constexpr Isa kIsa = Isa::VQ_ISA;  // that this file is being compiled for

// What `kernel_of` gives for the vector set in use, as `[](auto set) { return the_kernel(set); }`.
template <class Function>
auto on_vector_isa(Function kernel_of) {
  switch (vector_isa()) {
#if defined(VQ_X86)
    case Isa::avx2:
      return kernel_of(Set<Isa::avx2>{});
    case Isa::avx512vnni:
      return kernel_of(Set<Isa::avx512vnni>{});
#elif defined(VQ_ARM)
    case Isa::neon_dotprod:
      return kernel_of(Set<Isa::neon_dotprod>{});
#endif
    default:
      return kernel_of(Set<Isa::portable>{});
  }
}

// The same of kernels with byte products.
template <class Function>
auto on_product_isa(Function kernel_of) {
  switch (product_isa()) {
#if defined(VQ_X86)
    case Isa::avxvnni:
      return kernel_of(Set<Isa::avxvnni>{});
    case Isa::avxvnni_evex:
      return kernel_of(Set<Isa::avxvnni_evex>{});
#elif defined(VQ_ARM)
    case Isa::neon_i8mm:
      return kernel_of(Set<Isa::neon_i8mm>{});
#endif
    default:
      return on_vector_isa(kernel_of);
  }
}

}  // namespace vq
