"""The build of the native core: what it says without a compiler, that a stale library is not used,
what is compiled for which processor, and that builds at the same time, or killed on the way, leave
a whole one."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from varptq.errors import ConfigError
from varptq.native import binding, build


def test_without_a_compiler_the_build_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no C++ compiler (no-such-compiler)" in error


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A path that the binding takes for the library's; what it remembers is forgotten."""
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "_core.so")
    binding.forget()
    return tmp_path / "_core.so"


@pytest.fixture(autouse=True)
def _forget_afterwards() -> Iterator[None]:
    yield
    binding.forget()


def test_a_missing_library_is_a_reason_not_an_error(loading: Path) -> None:
    assert binding.core() is None
    assert "not built: run `python -m varptq.native.build`" in binding.reason()
    assert build.WITHOUT in binding.reason()


def test_a_file_that_is_no_library_is_a_reason_not_an_error(loading: Path) -> None:
    loading.write_bytes(b"\x7fELF but not really")
    assert binding.core() is None
    assert "cannot be loaded" in binding.reason()


@pytest.mark.native
@pytest.mark.parametrize("left", [5000, -4096, -1])
def test_a_library_that_was_cut_is_a_reason_not_a_crash(loading: Path, left: int) -> None:
    built = Path(build.__file__).parent / "_core.so"
    if not built.exists():
        pytest.skip("the native core is not built")
    whole = built.read_bytes()
    if not whole.startswith(b"\x7fELF"):
        pytest.skip("no ELF file")
    loading.write_bytes(whole[:left])
    assert binding.core() is None
    assert "_core.so is only a part of a library" in binding.reason()


@pytest.mark.native
def test_a_library_of_other_sources_is_not_used(
    loading: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Path(build.__file__).parent / "_core.so"
    if not built.exists():
        pytest.skip("the native core is not built")
    shutil.copy(built, loading)
    monkeypatch.setattr(build, "source_hash", lambda: "0123456789abcdef")
    assert binding.core() is None
    assert "built from other sources" in binding.reason()


def test_the_table_names_sources_and_instruction_sets_that_exist() -> None:
    for name, isas in build.ISAS_OF.items():
        assert (build.SOURCES / name).is_file(), name
        assert set(isas) <= set(build.FLAGS_OF_ISA), name
    of_machines = [isa for isas in build.ISAS_OF_MACHINE.values() for isa in isas]
    assert sorted([build.PORTABLE, *of_machines]) == sorted(build.FLAGS_OF_ISA)
    for machine, isas in build.ISAS_OF_MACHINE.items():
        units = build.units(machine)
        assert len({unit.name for unit in units}) == len(units)
        assert {unit.isa for unit in units} == {build.PORTABLE, *isas}


def test_flags_of_arm_are_those_that_a_compiler_takes() -> None:
    """GCC's products want its architecture, and zig, a clang, knows processors alone."""
    assert "-march=armv8.2-a+dotprod+i8mm" in build.flags_of("neon_i8mm", clang=False)
    assert "-mcpu=generic+dotprod+i8mm" in build.flags_of("neon_i8mm", clang=True)
    for isa in build.ISAS_OF_MACHINE["x86_64"]:
        assert build.flags_of(isa, clang=True) == build.flags_of(isa, clang=False)


@pytest.mark.slow
def test_other_processors_get_the_portable_kernels_alone(
    loading: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel of a set that is asked for where there is none would be missing at the load."""
    other = build.Target("other", sys.platform)
    monkeypatch.setattr(build, "target_of", lambda command: other)
    monkeypatch.setattr(build, "OBJECTS", loading.parent / "build")
    monkeypatch.setattr(build, "OPTIMIZED", ("-O0",))
    assert {unit.isa for unit in build.units("other")} == {build.PORTABLE}
    try:
        build.build()
    except ConfigError as error:
        assert "no C++ compiler" in str(error)
        pytest.skip("no C++ compiler")
    assert binding.core() is not None, binding.reason()


def test_a_compiler_says_what_it_makes_code_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not this machine: a cross-compiler makes another's core, and may be a command with words."""
    cross = tmp_path / "cross"
    cross.write_text('#!/bin/sh\necho "#define $1 1"; echo "#define __linux__ 1"\n')
    cross.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{cross}' __aarch64__")
    command = build.compiler()
    assert command == [str(cross), "__aarch64__"]
    assert build.target_of(command) == ("aarch64", "linux")
    assert build.target_of([str(cross), "__sparc__"]) == ("other", "linux")
    with pytest.raises(ConfigError, match="false cannot build the native core: no message"):
        build.target_of([shutil.which("false") or "false"])


SLOW = """#!/bin/sh
case "$*" in
  *--version*) echo slow; exit ;;
  *-dM*|*-print-file-name*) exec {compiler} "$@" ;;
  *) echo "+" >> {log}; sleep 0.4; {compiler} "$@"; code=$?; echo "-" >> {log}; exit $code ;;
esac
"""


@pytest.fixture
def start_build(tmp_path: Path) -> Callable[[], subprocess.Popen[bytes]]:
    """Starts a build, in a process of its own, of one small file with a compiler that takes its
    time and notes when it starts (+) and ends (-) in tmp_path/log."""
    real = next((found for name in ("g++", "clang++") if (found := shutil.which(name))), None)
    if real is None:
        pytest.skip("no C++ compiler")
    sources, slow = tmp_path / "src", tmp_path / "slow"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    slow.write_text(SLOW.format(log=tmp_path / "log", compiler=real))
    slow.chmod(0o755)
    program = (
        "from pathlib import Path; from varptq.native import build; "
        f"here = Path({str(tmp_path)!r}); build.SOURCES = here / 'src'; "
        "build.OBJECTS = here / 'build'; build.LIBRARY = here / '_core.so'; build.build()"
    )
    env = {**os.environ, "CXX": str(slow)}
    # -fvisibility=hidden hides `one`; that the file loads is enough here.
    return lambda: subprocess.Popen(
        [sys.executable, "-c", program], env=env, start_new_session=True
    )


def wait_for(path: Path, text: str) -> None:
    end = time.monotonic() + 60
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_builds_at_once_take_turns_and_compile_once(
    start_build: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    builds = [start_build() for _ in range(2)]
    assert [build.wait(60) for build in builds] == [0, 0]
    # An object and two links, one after another.
    assert "".join((tmp_path / "log").read_text().split()) == "+-" * 3
    ctypes.CDLL(str(tmp_path / "_core.so"))
    (objects,) = (tmp_path / "build").glob("release-*")
    assert len(list(objects.iterdir())) == 1


def test_a_killed_build_leaves_nothing_half_written(
    start_build: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    killed = start_build()
    wait_for(tmp_path / "log", "+")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(60)
    assert not (tmp_path / "_core.so").exists()
    assert start_build().wait(60) == 0
    left, kept = sorted(path.name for path in (tmp_path / "build").iterdir())
    assert left == ".lock" and kept.startswith("release-")
    ctypes.CDLL(str(tmp_path / "_core.so"))
