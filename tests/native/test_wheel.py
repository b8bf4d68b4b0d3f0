"""Wheels: what they hold, what their name promises, and what is said where there is no compiler."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from varptq.native import build

ROOT = Path(__file__).parents[2]
hatch_build = pytest.importorskip("hatch_build", reason="hatchling is not installed")


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
def test_a_wheel_holds_the_core_and_promises_no_more_than_that_keeps(tmp_path: Path) -> None:
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
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
    # The auditor of the index agrees; it exits with an error where the name promises too much.
    auditor = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    said = subprocess.run(auditor, capture_output=True, text=True, check=False)
    assert said.returncode == 0 and "manylinux_2_" in said.stdout, said.stdout + said.stderr


@pytest.mark.slow
def test_without_a_compiler_a_wheel_says_in_one_line_what_is_slower(tmp_path: Path) -> None:
    wheel, said = wheel_in(tmp_path, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "varptq/native/_core.so" not in zipfile.ZipFile(wheel).namelist()
    (line,) = [line for line in said.splitlines() if "no native core" in line]
    assert "no C++ compiler (no-such-compiler)" in line and build.WITHOUT in line


def compiled(folder: Path, *flags: str) -> Path:
    """A small library that throws, and so needs a C++ runtime."""
    source, library = folder / "one.cpp", folder / "one.so"
    source.write_text('extern "C" int one() { try { throw 1; } catch (int i) { return i; } }\n')
    command = [*build.compiler(), "-shared", "-fPIC", *flags, str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_a_library_that_needs_a_cpp_runtime_is_for_this_machine_alone(tmp_path: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("no g++")
    shared = compiled(tmp_path)
    assert hatch_build.glibc_minor(shared) is None
    assert hatch_build.platform_tag(shared, "x86_64", "linux") == "linux_x86_64"
    own = compiled(tmp_path, "-static-libstdc++", "-static-libgcc")
    assert hatch_build.platform_tag(own, "x86_64", "linux").startswith("manylinux_2_")


def test_a_mac_s_wheel_names_the_oldest_system_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", "11.0")
    assert hatch_build.platform_tag(Path(), "aarch64", "macos") == "macosx_11_0_arm64"
