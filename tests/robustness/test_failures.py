"""What the machine does to a run: memory, disks under stdout, users without a home, odd names."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError

from helpers.cli_calls import run
from varptq import __main__, generate
from varptq.cli import failures
from varptq.errors import CheckpointError, OutOfMemoryError
from varptq.evaluate.networks.weights import download_inception, read_script
from varptq.evaluate.report import page
from varptq.files import StagedFolder
from varptq.models import memory
from varptq.models.pipeline import Pipeline
from varptq.models.presets import ASSETS
from varptq.models.prompts import Prompts
from varptq.models.state_file import read_state
from varptq.progress import RichProgress

SRC = Path(__file__).parents[2] / "src"
TORCH_WORDS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 5242880000 bytes. Error code 12 (Cannot allocate memory)"
)


def system(code: int) -> OSError:
    return OSError(code, os.strerror(code), "/some/file")


MACHINE: dict[str, tuple[BaseException, str]] = {
    "memory, Python": (MemoryError(), "memory: not enough"),
    "memory, torch": (RuntimeError(TORCH_WORDS), "memory: not enough"),
    "memory, CUDA": (torch.OutOfMemoryError("CUDA out of memory. Tried"), "memory: not enough"),
    "memory, C++": (RuntimeError("std::bad_alloc"), "memory: not enough"),
    "memory, a library": (ImportError("failed to map segment from shared object"), "memory"),
    "memory, a mapping": (system(errno.ENOMEM), "memory: not enough"),
    "full disk": (system(errno.ENOSPC), "free some space"),
    "quota": (system(errno.EDQUOT), "quota"),
    "read-only": (system(errno.EROFS), "another place"),
    "stale handle": (system(errno.ESTALE), "run again"),
    "broken disk": (system(errno.EIO), "the disk fails"),
    "open files": (system(errno.EMFILE), "ulimit -n"),
    "no permission": (system(errno.EACCES), "permissions"),
    "a name too long": (system(errno.ENAMETOOLONG), "shorter"),
    "a pipe of a helper": (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
    "a tensor file": (SafetensorError("Error while reading"), "tensors"),
    "recursion": (RecursionError("maximum recursion depth"), "nested too deeply"),
    "no UTF-8": (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates"), "not UTF-8"),
}


@pytest.mark.parametrize("what", MACHINE)
def test_a_failure_of_the_machine_is_one_line(
    what: str, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    error, words = MACHINE[what]

    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("varptq.cli.model_choice.ModelChoice.load", broken)
    monkeypatch.setattr("varptq.cli.model_choice.ModelChoice.load_float", broken)
    counted()
    ran = run("generate", "demo", "--classes", "3", "--out", "/nowhere")
    assert ran.code == 2 and not ran.out
    assert ran.err.count("\n") == 1 and ran.err.startswith("error: ") and words in ran.err


def test_every_verb_says_what_to_lower(counted: Callable[[], None]) -> None:
    for verb, option in (
        ("generate", "--batch-size"),
        ("edit", "--candidates"),
        ("evaluate", "--batch-size"),
        ("quantize", "continues where it was"),
        ("analyze", "--images"),
        ("demo", "--samples"),
        ("info", "smaller model"),
    ):
        counted()
        assert option in str(failures.line(MemoryError(), verb))
    # A batch that only the verb chooses is not the user's to lower.
    inner = OutOfMemoryError("lower batch_size to 3")
    assert "batch_size to 3" in str(failures.line(inner, "generate"))
    assert "batch_size to" not in str(failures.line(inner, "quantize")).split(";")[1]
    assert failures.line(ZeroDivisionError("a bug"), "generate") is None


def test_a_batch_too_large_says_how_many_fit(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    from varptq.models import generate as module

    real = getattr(module, "_generate_batch")  # noqa: B009

    def limited(pipe: Pipeline, prompts: Prompts, *rest: Any) -> Any:
        if len(prompts) > 3:
            raise RuntimeError(TORCH_WORDS)
        return real(pipe, prompts, *rest)

    monkeypatch.setattr(module, "_generate_batch", limited)
    for free, words in ((3.5, "lower batch_size .--batch-size. to 3$"), (0.5, "free some memory")):
        counted()
        room = int(free * memory.image_bytes(tiny, 1.5) / memory.USABLE)
        monkeypatch.setattr(memory, "free_bytes", lambda _, room=room: room)
        with pytest.raises(OutOfMemoryError, match=words):
            generate(tiny, [0] * 8, batch_size=8)
    assert len(generate(tiny, [0] * 8, batch_size=3).tokens) == 8
    with pytest.raises(MemoryError):
        generate(tiny, [0] * 8, batch_size=8)


LIMITED = """
import re, resource
import varptq
from varptq.models import memory
pipe = varptq.load_model("demo")
varptq.generate(pipe, [0])
size = memory._field(memory.Path("/proc/self/status"), "VmSize") + 60 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (size, size))
try:
    varptq.generate(pipe, [0] * 80, batch_size=80)
except MemoryError as error:
    fits = int(re.search(r"to (\\d+)$", str(error))[1])
varptq.generate(pipe, [0] * fits, batch_size=fits)
print("fits" if fits > 2 else fits)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its own size from /proc")
def test_the_batch_that_is_named_fits(warm: Path, counted: Callable[[], None]) -> None:
    counted()
    done = subprocess.run(
        [str(warm / "python"), "-c", LIMITED], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "fits\n", done.stderr[-1500:]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_streams_that_take_nothing(counted: Callable[[], None]) -> None:
    """A full disk under stdout or stderr, a reader who has left, streams that are closed."""
    program = f"{sys.executable} -m varptq"
    for line, code, lines in (
        (f"{program} --version >/dev/full", 2, 1),
        (f"PYTHONUNBUFFERED=1 {program} --version >/dev/full", 2, 1),
        (f"{program} --help >/dev/full", 2, 1),
        (f"{program} info --nonsense 2>/dev/full", 2, 0),
        (f"{program} --version >&-", 0, 0),
        (f"{program} --version 2>&-", 0, 0),
        (f"{program} --version | true; exit ${{PIPESTATUS[0]}}", 1, 0),
    ):
        counted()
        environment = {**os.environ, "PYTHONPATH": str(SRC), "PYTHONUNBUFFERED": ""}
        done = subprocess.run(
            ["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, (line, done.returncode, done.stderr)
        assert done.stderr.count("\n") == lines and "Traceback" not in done.stderr, line


class _Full:
    """A log on a disk without room."""

    encoding = "utf-8"

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def isatty(self) -> bool:
        return False


def test_a_log_on_a_full_disk_does_not_end_the_run(counted: Callable[[], None]) -> None:
    counted()
    with RichProgress(Console(file=_Full())) as progress:  # pyright: ignore[reportArgumentType]
        for done in range(3):
            progress("stage", done, 2)


def test_ctrl_c_while_the_program_loads(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    counted: Callable[[], None],
) -> None:
    class Interrupt:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "varptq.cli.main":
                raise KeyboardInterrupt

    counted()
    monkeypatch.delitem(sys.modules, "varptq.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupt(), *sys.meta_path])
    with pytest.raises(SystemExit) as left:
        __main__.main()
    assert left.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user without HOME and without a line in the passwd file."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    yield


def test_a_user_without_a_home(nobody: None, tmp_path: Path, counted: Callable[[], None]) -> None:
    counted()
    for content in (b"old", b"new"):
        with StagedFolder(tmp_path / "out", force=True, marker="x") as folder:
            (folder / "x").write_bytes(content)
    assert (tmp_path / "out" / "x").read_bytes() == b"new"
    counted()
    with pytest.raises(CheckpointError, match="set XDG_CACHE_HOME"):
        download_inception()


def test_a_home_that_cannot_be_written_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counted: Callable[[], None]
) -> None:
    counted()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("varptq.evaluate.networks.weights.urlopen", lambda *_, **__: io.BytesIO())
    ran = run("evaluate", "demo", "--network", "inception:download", "--out", tmp_path / "out")
    assert ran.code == 2 and ran.err.count("\n") == 1 and "cannot be written" in ran.err


def test_control_characters_in_a_name(counted: Callable[[], None]) -> None:
    """They reach no terminal."""
    for name in ("a\x1b[31mred", "a\nb", "[bold]x[/bold]", "%s{0}", "caf\udce9", "n" * 300):
        counted()
        ran = run("info", name)
        assert ran.code == 2 and ran.err.count("\n") == 1 and ran.err[:-1].isprintable()


def test_checkpoints_and_programs_in_an_odd_folder(
    tmp_path: Path, counted: Callable[[], None]
) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    state = read_state(ASSETS / "demo" / "vae_demo.safetensors", "vae")
    torch.save(state, odd / "vae.pth")
    (odd / os.fsdecode(b"\xe9.safetensors")).symlink_to(ASSETS / "demo" / "vae_demo.safetensors")
    torch.jit.script(torch.nn.Identity()).save(tmp_path / "net.pt")
    (tmp_path / "net.pt").rename(odd / "net.pt")
    counted()
    for name in ("vae.pth", os.fsdecode(b"\xe9.safetensors")):
        found = read_state(odd / name, "vae")
        assert all(torch.equal(found[key], state[key]) for key in state)
    counted()
    assert read_script(odd / "net.pt")(torch.ones(1)) == 1


def test_a_report_that_names_an_odd_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    counted()
    monkeypatch.setattr(page, "render", lambda *_: "<p>caf\udce9</p>")
    page.write_report(tmp_path / "report.html", {})
    assert (tmp_path / "report.html").read_text() == "<p>caf\\udce9</p>"
