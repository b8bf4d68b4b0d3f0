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


# Seconds after the start: importing; samples, reconstruction, saving of one that has imported.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("imported", "delay"), [(False, 1.0), (True, 0.7), (True, 2.5)], ids=["import", "soon", "later"]
)
def test_a_terminated_calibration_leaves_nothing_half_written(
    imported: bool, delay: float, tmp_path: Path, warm: Path, counted: Callable[[], None]
) -> None:
    counted()
    out, python = tmp_path / "model", str(warm / "python") if imported else sys.executable
    words = ("--config", "w4a4", "--samples", "8", "--steps", "2", "--out", str(out))
    process = subprocess.Popen(
        [python, "-m", "varptq", "quantize", "demo", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
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
