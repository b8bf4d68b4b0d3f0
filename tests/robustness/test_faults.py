"""A disk that is full, or forbids, at every single write: old content, new content, or nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import varptq
from varptq import artifact
from varptq.errors import OutputError
from varptq.evaluate.image_files import ImageFiles, write_npz
from varptq.evaluate.sampling import sample_set
from varptq.files import write_atomic
from varptq.models.pipeline import Pipeline
from varptq.models.sampling import SamplingSettings
from varptq.progress import silent
from varptq.quant.config import QuantConfig
from varptq.quant.pipeline import QuantizedPipeline
from varptq.work import Piece, Work

CALLS = ("mkdir", "replace", "fsync", "open")


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@contextlib.contextmanager
def forbidden(
    patch: pytest.MonkeyPatch, name: str, place: int, folder: Path
) -> Iterator[list[int]]:
    """The `place`-th call of os.<name> concerning `folder` is refused; yields the calls seen."""
    real, calls = getattr(os, name), [0]

    def refuse(*args: Any, **extra: Any) -> Any:
        where = args[0] if name != "fsync" else None
        if where is None or str(where).startswith(str(folder)):
            calls[0] += 1
            if calls[0] == place:
                raise OSError(
                    errno.EACCES, os.strerror(errno.EACCES), None if where is None else str(where)
                )
        return real(*args, **extra)

    with patch.context() as inside:
        inside.setattr(os, name, refuse)
        yield calls


def save_artifact(pipe: Pipeline, folder: Path) -> None:
    assert isinstance(pipe, QuantizedPipeline)
    artifact.save(pipe, folder / "a")


def check_artifact(folder: Path) -> None:
    artifact.load(folder / "a")


def save_samples(pipe: Pipeline, folder: Path) -> None:
    sample_set(
        pipe, folder / "s", count=5, seed=0, settings=SamplingSettings(top_k=0, top_p=0),
        batch=2, shard_size=2,
    )  # fmt: skip


def check_samples(folder: Path) -> None:
    found = [np.load(path)["images"] for path in sorted((folder / "s").glob("*.npz"))]
    assert sum(len(images) for images in found) == 5


def save_pieces(pipe: Pipeline, folder: Path) -> None:
    """A work folder as a calibration fills it; the second run finds what the first one made."""
    with Work(folder / "w") as work:
        work.begin({"of": "a test"}, silent)
        for index in range(3):
            numbers = torch.arange(2000 * (index + 1))
            work.once(f"piece-{index}", lambda numbers=numbers: Piece({"numbers": numbers}))


def check_pieces(folder: Path) -> None:
    with Work(folder / "w") as work:
        work.begin({"of": "a test"}, silent)
        for index in range(3):
            found = work.read(f"piece-{index}").tensors["numbers"]
            assert found.tolist() == list(range(2000 * (index + 1)))


def save_npz(pipe: Pipeline, folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    write_npz(folder / "images.npz", 9, [(np.arange(9), images, np.arange(9))])


def check_npz(folder: Path) -> None:
    assert sum(len(part) for part in ImageFiles.open(folder / "images.npz").batches(4)) == 9


def save_text(pipe: Pipeline, folder: Path) -> None:
    write_atomic(folder / "report.html", b"<p>" * 5000)


def check_text(folder: Path) -> None:
    assert (folder / "report.html").read_bytes() == b"<p>" * 5000


WRITERS: dict[str, tuple[Callable[[Pipeline, Path], None], Callable[[Path], None], str]] = {
    "artifact": (save_artifact, check_artifact, "a"),
    "samples": (save_samples, check_samples, "s"),
    "pieces": (save_pieces, check_pieces, "w"),
    "npz": (save_npz, check_npz, "images.npz"),
    "report": (save_text, check_text, "report.html"),
}


@pytest.fixture(scope="module")
def written(tiny: Pipeline) -> dict[str, Pipeline]:
    """What each of `WRITERS` is given, made once."""
    quantized = varptq.quantize(tiny, QuantConfig.preset("w8a8+paper"), method="rtn")
    return dict.fromkeys(WRITERS, tiny) | {"artifact": quantized}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(".varptq-")]


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk(
    what: str, written: dict[str, Pipeline], tmp_path: Path, counted: Callable[[], None]
) -> None:
    write, check, _ = WRITERS[what]
    failures = 0
    for number, size in enumerate((0, 1, 100, 1000, 3000, 10_000, 100_000, 2**40)):
        counted()
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            with file_size_limit(size):
                write(written[what], folder)
        except OutputError as error:
            failures += 1
            assert "\n" not in str(error)
            assert not leftovers(folder)
            # The same call again, with room: what the failure left behind does not disturb it.
            write(written[what], folder)
        check(folder)
    assert failures >= 2


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("what", WRITERS)
def test_a_forbidden_step(
    what: str,
    call: str,
    written: dict[str, Pipeline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counted: Callable[[], None],
) -> None:
    """Refuse the first call of this kind, then the second, until none is left to refuse."""
    write, check, name = WRITERS[what]
    for place in range(1, 60):
        counted()
        folder = tmp_path / str(place)
        folder.mkdir()
        error = None
        with forbidden(monkeypatch, call, place, folder) as calls:
            try:
                write(written[what], folder)
            except OutputError as found:
                error = found
        assert error is None or "\n" not in str(error)
        # A refused fsync behind the last rename leaves the new content, whole. Sample sets and
        # work folders are taken up where they stopped.
        if error is not None and (what in ("samples", "pieces") or not (folder / name).exists()):
            write(written[what], folder)
        check(folder)
        assert not leftovers(folder)
        if calls[0] < place:
            return
    pytest.fail("never stopped calling")
