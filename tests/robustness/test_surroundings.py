"""Language, time zone, clock and file times of the machine do not reach the bytes we write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.cli_calls import succeed

ARTIFACT = ("quantize", "demo", "--config", "w8a8+paper", "--method", "rtn")
# What one process can have at once.
SURROUNDINGS: dict[str, dict[str, str]] = {
    "C, date line": {
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        **{"TZ": "Pacific/Kiritimati", "SOURCE_DATE_EPOCH": "0"},
    },
    "Turkish, hash seed": {
        **{"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "PYTHONHASHSEED": "12345"},
    },
}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def quantized(out: Path, changes: dict[str, str]) -> dict[str, bytes]:
    command = [sys.executable, "-m", "varptq", *ARTIFACT, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return content(out)


@pytest.mark.slow
def test_the_same_bytes_everywhere(tmp_path: Path, counted: Callable[[], None]) -> None:
    succeed(*ARTIFACT, "--out", tmp_path / "plain")
    plain = content(tmp_path / "plain")
    for name, changes in SURROUNDINGS.items():
        counted()
        assert quantized(tmp_path / name, changes) == plain, name


def test_a_clock_that_goes_backwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    """Progress with a rate and an ETA on a clock that jumps: no crash, no negative time."""
    import io

    from rich.console import Console

    from varptq.progress import RichProgress

    counted()
    ticks = iter([100.0, 50.0, 1e9, -5.0] * 50)
    monkeypatch.setattr("time.time", lambda: next(ticks))
    with RichProgress(Console(file=io.StringIO())) as progress:
        for done in range(10):
            progress("stage", done, 10)


def test_files_from_before_1980(tmp_path: Path, counted: Callable[[], None]) -> None:
    """The zip format knows no earlier years; reading does not care."""
    import numpy as np

    from varptq.evaluate.image_files import ImageFiles, write_npz

    counted()
    images = np.zeros((3, 8, 8, 3), np.uint8)
    write_npz(tmp_path / "x.npz", 3, [(np.arange(3), images, np.arange(3))])
    os.utime(tmp_path / "x.npz", (0, 0))
    assert sum(len(part) for part in ImageFiles.open(tmp_path / "x.npz").batches(2)) == 3
