"""The native core as a library: found, loaded, and asked about its machine.

core() -> library or None        reason() -> why it is None        isa(), features()
call("vq_linear", arguments)     for the operators: quantize.py, linear.py, attention.py,
                                 sampler.py, phi.py, convolution.py, each with its argument structs
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from pathlib import Path
from typing import NamedTuple

from varptq.native import build

OK, NON_FINITE = 0, 1
# Of little-endian ELF files, Linux's libraries: where the table of sections starts, bytes of an
# entry, and how many there are.
_ELF_OF_64_BITS, _ELF_HEADER = b"\x7fELF\x02\x01", struct.Struct("<40xQ10xHH2x")
# Sets for tests, which run kernels for machines unlike this one; see src/machine/isa.h.
EMULATED = ("amx-emulated", "avxvnni-evex")
# Caps the set; the core reads it when it first computes.
ENVIRONMENT = "VARPTQ_ISA"


class _Loaded(NamedTuple):
    library: ctypes.CDLL | None
    reason: str


def _is_cut(path: Path) -> bool:
    """Whether the end of an ELF file is missing, such as after a copy that was stopped: its table
    of sections comes last. The system would map what is not there, and end the process."""
    with path.open("rb") as file:
        head = file.read(_ELF_HEADER.size)
    if len(head) < _ELF_HEADER.size or not head.startswith(_ELF_OF_64_BITS):
        return False
    *_, start, size, count = _ELF_HEADER.unpack(head)
    return path.stat().st_size < start + size * count


@functools.cache
def _load() -> _Loaded:
    path: Path = build.LIBRARY
    hint = f"run `python -m varptq.native.build`; {build.WITHOUT}"
    if not path.exists():
        return _Loaded(None, f"the native core is not built: {hint}")
    try:
        if _is_cut(path):
            return _Loaded(None, f"{path.name} is only a part of a library: {hint}")
        library = ctypes.CDLL(str(path))
        library.vq_source_hash.restype = ctypes.c_char_p
        found = library.vq_source_hash().decode()
    except (OSError, AttributeError) as error:
        return _Loaded(None, f"{path.name} cannot be loaded ({error}): {hint}")
    if found != build.source_hash():
        return _Loaded(None, f"{path.name} was built from other sources: {hint}")
    library.vq_packed_bytes.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int32]
    library.vq_attention_cache_bytes.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int32] * 2
    library.vq_map_bytes.argtypes = library.vq_kernel_bytes.argtypes = [ctypes.c_int64] * 4
    library.vq_map_bytes.restype = library.vq_kernel_bytes.restype = ctypes.c_int64
    library.vq_packed_bytes.restype = ctypes.c_int64
    library.vq_attention_cache_bytes.restype = ctypes.c_int64
    library.vq_isa.restype = library.vq_features.restype = ctypes.c_char_p
    library.vq_peak_gops.restype = ctypes.c_double
    return _Loaded(library, "")


def core() -> ctypes.CDLL | None:
    """The loaded library, or None where there is none that fits; `reason` says why."""
    return _load().library


def reason() -> str:
    """Why `core` is None, in one sentence with what to do; empty where it is not."""
    return _load().reason


def forget() -> None:
    """Look for the library again at the next call, after a build in this process."""
    _load.cache_clear()


def library() -> ctypes.CDLL:
    """The loaded library, for callers that know it to be there."""
    found = core()
    assert found is not None, reason()
    return found


def call(function: str, arguments: ctypes.Structure) -> bool:
    """Run an operator on its arguments; False where a float among them is NaN or infinite."""
    code = getattr(library(), function)(ctypes.byref(arguments))
    assert code in (OK, NON_FINITE), f"{function}: {code}"
    return code == OK


def isa() -> str:
    """The instruction set in use: "portable", "avx2", "avxvnni", "avx512vnni", "amx",
    "neon-dotprod", "neon-i8mm", or one of `EMULATED`."""
    return library().vq_isa().decode()


def names() -> list[str]:
    """The instruction sets of all machines, ascending, without those for tests."""
    isas = (build.PORTABLE, *(isa for isas in build.ISAS_OF_MACHINE.values() for isa in isas))
    return [name for isa in isas if (name := isa.replace("_", "-")) not in EMULATED]


def unknown_cap() -> str:
    """What is wrong with the environment's cap, which the core then ignores; empty if nothing."""
    asked = os.environ.get(ENVIRONMENT, "")
    if not asked or asked in (*names(), *EMULATED):
        return ""
    known = ", ".join(names())
    return f"environment variable {ENVIRONMENT} {asked!r}: unknown, nothing is capped; use {known}"


def features() -> list[str]:
    """The instruction sets this machine can run."""
    return library().vq_features().decode().split()


def select_isa(name: str) -> bool:
    """Use this instruction set from now on, for tests and benchmarks; False where it cannot run."""
    return library().vq_select_isa(name.encode()) == OK


def usable_threads(asked: int) -> int:
    """How many threads a call that asks for `asked` gets."""
    return library().vq_threads(asked)


def peak_gops() -> float:
    """Measured 10^9 operations a second (two per multiply-add) of the product instruction alone, on
    one thread; 0 for sets without one."""
    return library().vq_peak_gops()
