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

}  // namespace vq
