"""A model loaded before a fork (multiprocessing, a server that preloads) works in the child."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import varptq
from varptq import Pipeline, QuantConfig

PROGRAM = Path(__file__).parents[1] / "helpers" / "forking.py"


@pytest.mark.slow
def test_a_forked_child_draws_the_same_tokens(
    make_tiny: Callable[..., Pipeline], tmp_path: Path, counted: Callable[[], None]
) -> None:
    made = varptq.quantize(make_tiny(depth=1), QuantConfig.preset("w4a4"), method="rtn")
    varptq.save(made, tmp_path / "artifact")
    environment = {name: v for name, v in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path / "artifact")],
        env={
            **environment,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_WAIT_POLICY": "passive",  # two threads on a busy machine
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = done.stdout.splitlines()
    for _ in lines:
        counted()
    assert len(lines) == 10, done.stdout + done.stderr
    assert all(line.endswith(": 0") for line in lines), done.stdout + done.stderr
