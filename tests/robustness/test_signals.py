"""SIGTERM at any stage of a real process: no half-written artifact, and one line of why."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from varptq import artifact

EXIT_TERMINATED = 143


def started(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "varptq", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Seconds after the start: importing, samples, theta, reconstruction, saving.
@pytest.mark.slow
@pytest.mark.parametrize("delay", [2.0, 3.0, 4.5])
def test_a_terminated_calibration_leaves_nothing_half_written(
    delay: float, tmp_path: Path, counted: Callable[[], None]
) -> None:
    counted()
    out = tmp_path / "model"
    process = started(
        "quantize", "demo", "--config", "w4a4", "--samples", 8, "--steps", 2, "--out", out
    )  # fmt: skip
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    if out.exists():
        artifact.load(out)
        assert process.returncode in (0, EXIT_TERMINATED)
        return
    assert process.returncode in (EXIT_TERMINATED, -signal.SIGTERM)
    assert "Traceback" not in errors
    assert not list(tmp_path.glob(".varptq-*"))


def test_a_signal_after_the_work_changes_nothing() -> None:
    # Modules are torn down after Python has given signals their default back.
    script = """
import os, signal
from varptq.cli.main import app

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), signum=signal.SIGTERM):
        kill(pid, signum)

late = Late()
app(["--version"])
"""
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("varptq ")
