// Which instruction set the kernels of this process use.
//
// The choice is made once, at the first call: the best that CPU, operating system and hypervisor
// agree on, no better than VARPTQ_ISA allows. "amx-emulated" runs the AMX kernels with tiles made
// of plain C++, for tests on machines without them. Every set gives the same bits.
#pragma once

namespace vq {

enum class Isa : int { portable = 0, avx2 = 1, avx512vnni = 2, amx = 3, amx_emulated = 4 };

Isa isa();

// avx512vnni for AMX, whose kernels only replace the large products; else isa() itself.
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
#if !defined(VQ_PORTABLE_ONLY)
    case Isa::avx2:
      return kernel_of(Set<Isa::avx2>{});
    case Isa::avx512vnni:
      return kernel_of(Set<Isa::avx512vnni>{});
#endif
    default:
      return kernel_of(Set<Isa::portable>{});
  }
}

}  // namespace vq
