"""Build the native core: `python -m varptq.native.build [--sanitize] [--force]`.

Every .cpp below src/ is compiled by the first C++17 compiler found ($CXX, which may be a command
with arguments, g++, clang++, c++): once for any processor, or once for each instruction set that
ISAS_OF names; those of machines that the compiler makes no code for are left out.
Objects are kept in build/ under a hash of what went into them, so a rebuild compiles what changed.
The result, _core.so, carries the hash of all sources: `source_hash` tells a stale one. Builds that
run at once take turns by a lock on build/, and whatever is written appears whole.

hatch_build.py at the root of the repository puts the same library into wheels. It runs where no
dependency of varptq is installed, so this file needs the standard library alone.

--sanitize builds and runs the C++ tests under the address and undefined-behaviour sanitizers; of
another machine's compiler with --emulator, a command that runs that machine's programs here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from varptq.errors import ConfigError, OutputError, VarptqError

HERE = Path(__file__).parent
SOURCES = HERE / "src"
OBJECTS = HERE / "build"
LIBRARY = HERE / "_core.so"
DEFAULT_COMPILERS = (["g++"], ["clang++"], ["c++"])
# Folders of what is being written, in build/: the same file system as its place.
PART = ".part"
# Present in a checkout only.
NATIVE_TESTS = HERE.parents[2] / "tests" / "native"

# No contraction: a compiler that fuses multiply and add on its own would give other last bits.
# (Sums are never reassociated either: there is no -ffast-math.)
COMMON = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-pthread"),
)
OPTIMIZED = ("-O3",)
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
_VNNI256 = (*_AVX2, "-DVQ_VNNI256")
# What the extensions below are added to. Not armv8.6-a, which has them all: processors such as
# Neoverse V1 have these products and not the rest. Clang's is the spelling that zig takes, too.
_ARM, _ARM_OF_CLANG = "-march=armv8.2-a", "-mcpu=generic"
PORTABLE = "portable"
# Flags of an instruction set; its source sees its name as VQ_ISA, by which src/machine/isa.h keeps
# the symbols of one source compiled several times apart.
FLAGS_OF_ISA = {
    PORTABLE: (),
    "avx2": _AVX2,
    "avxvnni": (*_VNNI256, "-mavxvnni"),
    "avxvnni_evex": (*_VNNI256, "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=256"),
    "avx512vnni": (*_AVX512, "-mprefer-vector-width=512"),
    "amx": (*_AVX512, "-mamx-tile", "-mamx-int8", "-mprefer-vector-width=512"),
    "neon_dotprod": ("-DVQ_NEON", f"{_ARM}+dotprod"),
    "neon_i8mm": ("-DVQ_NEON", f"{_ARM}+dotprod+i8mm"),
}
# The sets of a machine, and how its sources know that their kernels are there (src/machine/isa.h).
ISAS_OF_MACHINE = {
    "x86_64": ("avx2", "avxvnni", "avxvnni_evex", "avx512vnni", "amx"),
    "aarch64": ("neon_dotprod", "neon_i8mm"),
}
_MACRO_OF_MACHINE = {"x86_64": "-DVQ_X86", "aarch64": "-DVQ_ARM"}
_VECTOR = (PORTABLE, "avx2", "avx512vnni", "neon_dotprod")
# Add products of bytes to avx2 and neon_dotprod.
_BYTES = ("avxvnni", "avxvnni_evex", "neon_i8mm")
# What each source below src/ is compiled for; those without a row are portable.
ISAS_OF = {
    "attention/kernel.cpp": (*_VECTOR, *_BYTES),
    "convolution/kernel.cpp": (*_VECTOR, *_BYTES),
    "convolution/map_kernel.cpp": _VECTOR,
    "phi/kernel.cpp": _VECTOR,
    "quantize/kernel.cpp": _VECTOR,
    "sampler/kernel.cpp": _VECTOR,
    "linear/gemm_avx2.cpp": ("avx2",),
    "linear/gemm_avx512vnni.cpp": ("avx512vnni",),
    "linear/gemm_amx.cpp": ("amx",),
    "linear/gemm_bytes.cpp": ("neon_dotprod", *_BYTES),
    "convolution/kernel_amx.cpp": ("amx",),
    "convolution/kernel_words.cpp": ("avx2", "avx512vnni", "avxvnni", "avxvnni_evex"),
}


WITHOUT = "without the native core artifacts draw images on a CPU more slowly than float models"


def compiler() -> list[str]:
    """The command of a C++ compiler. Raises `ConfigError` where there is none."""
    asked = os.environ.get("CXX", "")
    named = [shlex.split(asked, posix=os.name == "posix")] if asked.strip() else DEFAULT_COMPILERS
    for name, *arguments in named:
        if found := shutil.which(name):
            return [found, *arguments]
    raise ConfigError(
        f"no C++ compiler ({asked or 'g++, clang++ or c++'}): install one, or name it in CXX; "
        f"{WITHOUT}"
    )


class Target(NamedTuple):
    """What a compiler makes code for, in the words of Python's platform tags.

    machine: "x86_64", "aarch64" or "other"; system: "linux", "macos", "windows" or "other".
    """

    machine: str
    system: str


_MACHINES = {"__x86_64__": "x86_64", "__aarch64__": "aarch64"}
_SYSTEMS = {"__linux__": "linux", "__APPLE__": "macos", "_WIN32": "windows"}


def _macros(command: Sequence[str]) -> set[str]:
    """The macros that a compiler and its C++ library define. Raises `ConfigError` where the command
    is no compiler."""
    said = _run([*command, "-dM", "-E", "-x", "c++", "-include", "cstddef", os.devnull])
    return {line.split()[1] for line in said.splitlines() if line.startswith("#define ")}


def target_of(command: Sequence[str]) -> Target:
    """Asks a compiler, since it need not make code for this machine. Raises `ConfigError` where
    the command is no compiler."""
    macros = _macros(command)
    return Target(
        *(
            next((name for macro, name in names.items() if macro in macros), "other")
            for names in (_MACHINES, _SYSTEMS)
        )
    )


def _asked(command: Sequence[str], question: str) -> str:
    """What a compiler says of itself; empty where it does not know the question."""
    done = subprocess.run([*command, question], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _link_flags(command: Sequence[str], target: Target) -> list[str]:
    """Flags with which the library needs no C++ runtime of its users' systems, and shows none of
    its own to the other libraries of the process. Some distributions leave the static one out."""
    if target.system == "windows":
        return ["-static", "-s"]
    if target.system != "linux":
        return []
    archive = _asked(command, "-print-file-name=libstdc++.a")
    if "__GLIBCXX__" not in _macros(command) or not os.path.isabs(archive):
        return ["-s"]
    return ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-s"]


class Unit(NamedTuple):
    """A source compiled for one instruction set."""

    source: Path
    isa: str = PORTABLE

    @property
    def name(self) -> str:
        """Name of its object file, e.g. "attention-kernel-avx2"."""
        folder = self.source.parent
        own = folder.relative_to(SOURCES).parts if folder.is_relative_to(SOURCES) else ()
        return "-".join((*own, self.source.stem, self.isa))


def units(machine: str) -> list[Unit]:
    """The sources and instruction sets that make the core of a machine, named as in `Target`."""
    isas = (PORTABLE, *ISAS_OF_MACHINE.get(machine, ()))
    found = [
        Unit(source, isa)
        for source in sorted(SOURCES.rglob("*.cpp"))
        for isa in ISAS_OF.get(source.relative_to(SOURCES).as_posix(), (PORTABLE,))
    ]
    return [unit for unit in found if unit.isa in isas]


def flags_of(isa: str, *, clang: bool) -> list[str]:
    """What has g++, or clang++, make code for an instruction set."""
    flags = [*FLAGS_OF_ISA[isa], f"-DVQ_ISA={isa}"]
    return [flag.replace(_ARM, _ARM_OF_CLANG) for flag in flags] if clang else flags


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def source_hash() -> str:
    """Hash of everything that decides what _core.so does, but for the compiler."""
    files = sorted(p for p in SOURCES.rglob("*") if p.suffix in {".h", ".cpp"})
    named = ((p.relative_to(SOURCES).as_posix().encode(), p.read_bytes()) for p in files)
    tables = (FLAGS_OF_ISA, ISAS_OF, ISAS_OF_MACHINE, _MACRO_OF_MACHINE)
    flags = repr((COMMON, OPTIMIZED, *tables)).encode()
    return _digest([flags, *itertools.chain.from_iterable(named)])


def _run(command: Sequence[str]) -> str:
    """What the compiler prints. Raises `ConfigError` with its first error where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        first = next((line for line in lines if "error" in line), lines[-1])
        sys.stderr.write(done.stderr)
        raise ConfigError(f"{Path(command[0]).name} cannot build the native core: {first}")
    return done.stdout


class _Build:
    """One set of options: compiles files to objects cached in a folder, and links them."""

    def __init__(self, kind: str, options: Sequence[str], *, force: bool = False) -> None:
        self.compiler, self.options, self.force = compiler(), tuple(options), force
        self.target = target_of(self.compiler)
        self.clang = "__clang__" in _macros(self.compiler)
        named = repr((self.compiler, _asked(self.compiler, "--version"))).encode()
        # A folder for each compiler: a cross-build leaves this machine's objects alone.
        self.folder = OBJECTS / f"{kind}-{self.target.machine}-{_digest([named])}"
        headers = sorted(SOURCES.rglob("*.h"))
        self.common = [named, *(p.read_bytes() for p in headers)]

    def objects(self, wanted: Sequence[Unit]) -> list[Path]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
            return list(workers.map(self._object, wanted))

    def _object(self, unit: Unit) -> Path:
        flags = [*COMMON, *self.options, *flags_of(unit.isa, clang=self.clang)]
        if macro := _MACRO_OF_MACHINE.get(self.target.machine):
            flags.append(macro)
        if "VQ_SOURCE_HASH" in unit.source.read_text():
            flags.append(f'-DVQ_SOURCE_HASH="{source_hash()}"')
        key = _digest([*self.common, unit.source.read_bytes(), repr(flags).encode()])
        made = self.folder / f"{unit.name}-{key}.o"
        if self.force or not made.exists():
            self._write(made, [*flags, f"-I{SOURCES}", "-c", str(unit.source)])
        return made

    def forget_old(self, used: Sequence[Path]) -> None:
        """Remove objects of former sources."""
        for old in set(self.folder.glob("*.o")) - set(used):
            old.unlink()

    def link(self, objects: Sequence[Path], target: Path, *flags: str) -> None:
        self._write(target, [*self.options, *flags, *(str(o) for o in objects), "-pthread"])

    def _write(self, target: Path, arguments: Sequence[str]) -> None:
        """Run the compiler; its result appears whole or not at all, since another process may be
        loading the library, and a build may be killed."""
        with tempfile.TemporaryDirectory(dir=OBJECTS, prefix=PART) as folder:
            part = Path(folder) / target.name
            _run([*self.compiler, *arguments, "-o", str(part)])
            part.replace(target)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One build at a time. The system gives the lock back however the process ends; what a killed
    one left half-written is removed by the next."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with (OBJECTS / ".lock").open("w") as lock:
        if os.name == "posix":  # Windows has no flock, and builds for wheels alone
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in OBJECTS.glob(f"{PART}*"):
            shutil.rmtree(left)
        yield


def build(*, force: bool = False, library: Path | None = None) -> Path:
    """Compile what changed and link `library`, by default _core.so beside this file; returns its
    path. Raises `ConfigError` without a compiler, `OutputError` where a folder cannot be written.
    """
    library = library or LIBRARY
    for folder in (OBJECTS.parent, library.parent):
        if not os.access(folder, os.W_OK):
            raise OutputError(f"{folder} cannot be written; build the native core as its owner")
    maker = _Build("release", OPTIMIZED, force=force)
    with _alone():
        objects = maker.objects(units(maker.target.machine))
        maker.link(objects, library, "-shared", *_link_flags(maker.compiler, maker.target))
        maker.forget_old(objects)
    return library


def sanitize(emulator: Sequence[str] = ()) -> int:
    """Build the C++ tests with all sources under the sanitizers and run them, each by the command
    `emulator` if there is one; their exit code."""
    tests = sorted(NATIVE_TESTS.glob("*.cpp"))
    if not tests:
        raise ConfigError(f"no C++ tests in {NATIVE_TESTS}; run this in a checkout")
    maker = _Build("sanitized", SANITIZED)
    with _alone():
        core = maker.objects(units(maker.target.machine))
        programs = [maker.folder / test.stem for test in tests]
        for test, program in zip(tests, programs, strict=True):
            maker.link([*core, *maker.objects([Unit(test)])], program)
    commands = [[*emulator, str(program)] for program in programs]
    return max(subprocess.run(command, check=False).returncode != 0 for command in commands)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m varptq.native.build", description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="run the C++ tests instead")
    parser.add_argument("--emulator", default="", metavar="COMMAND", help="what runs these tests")
    parser.add_argument("--force", action="store_true", help="compile everything again")
    options = parser.parse_args(arguments)
    try:
        if options.sanitize:
            return sanitize(shlex.split(options.emulator))
        sys.stdout.write(f"{build(force=options.force)}\n")
    except VarptqError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
