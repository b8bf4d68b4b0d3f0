"""Wheels: what they hold, what their name promises, and what is said where there is no compiler."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers.wheel_audit import complaint
from varptq.errors import ConfigError
from varptq.native import build

ROOT = Path(__file__).parents[2]
hatch_build = pytest.importorskip("hatch_build", reason="hatchling is not installed")


@pytest.fixture
def compiler() -> list[str]:
    try:
        return build.compiler()
    except ConfigError as error:
        pytest.skip(str(error))


def wheel_in(folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel of this checkout, built into `folder`, and what the build said."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
@pytest.mark.usefixtures("compiler")
def test_a_wheel_holds_the_core_and_promises_no_more_than_that_keeps(tmp_path: Path) -> None:
    wheel, _ = wheel_in(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        library = Path(archive.extract("varptq/native/_core.so", tmp_path))
    assert wheel.name.startswith("varptq-") and "-py3-none-manylinux_2_" in wheel.name
    assert {"varptq/native/src/varptq.h", "varptq/assets/imagenet_classes.txt"} <= names
    # Neither objects of the build nor what the tests and Python leave behind.
    assert not [n for n in names if n.endswith((".o", ".pyc")) or "/build/" in n]
    assert all(n.startswith(("varptq/", "varptq-")) for n in names)
    core = ctypes.CDLL(str(library))
    core.vq_source_hash.restype = ctypes.c_char_p
    assert core.vq_source_hash().decode() == build.source_hash()
    assert complaint(wheel) is None
    # The same wheel under the name of an older system.
    old = wheel.with_name(re.sub(r"manylinux_2_\d+", "manylinux_2_5", wheel.name))
    wheel.rename(old)
    assert "auditwheel finds" in (complaint(old) or "")


@pytest.mark.slow
def test_without_a_compiler_a_wheel_says_in_one_line_what_is_slower(tmp_path: Path) -> None:
    wheel, said = wheel_in(tmp_path, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "varptq/native/_core.so" not in zipfile.ZipFile(wheel).namelist()
    (line,) = [line for line in said.splitlines() if "no native core" in line]
    assert "no C++ compiler (no-such-compiler)" in line and build.WITHOUT in line


def compiled(compiler: list[str], folder: Path, *flags: str) -> Path:
    """A small library that throws, and so needs a C++ runtime."""
    source, library = folder / "one.cpp", folder / "one.so"
    source.write_text('extern "C" int one() { try { throw 1; } catch (int i) { return i; } }\n')
    command = [*compiler, "-shared", "-fPIC", *flags, str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_a_library_that_needs_a_cpp_runtime_is_for_this_machine_alone(tmp_path: Path) -> None:
    if not (gcc := shutil.which("g++")):
        pytest.skip("no g++")
    shared = compiled([gcc], tmp_path)
    assert hatch_build.glibc_minor(shared) is None
    assert hatch_build.platform_tag(shared, "x86_64", "linux") == "linux_x86_64"
    own = compiled([gcc], tmp_path, "-static-libstdc++", "-static-libgcc")
    assert hatch_build.platform_tag(own, "x86_64", "linux").startswith("manylinux_2_")


def test_a_mac_s_wheel_names_the_oldest_system_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", "11.0")
    assert hatch_build.platform_tag(Path(), "aarch64", "macos") == "macosx_11_0_arm64"
