"""Run by tests/robustness/test_fork.py: a program that computes on two threads, forks, and draws in
its children. Prints one line per child; a child that hangs is ended by its alarm.

    python tests/helpers/forking.py ARTIFACT
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable

import torch

import varptq
from conftest import build_tiny
from varptq import CalibrationConfig, Pipeline, QuantConfig

SECONDS = 60
CONFIG = QuantConfig.preset("w4a4+paper").replace(rules=())
CALIBRATION = CalibrationConfig(num_samples=2, steps=2, tune_steps=2)


def tokens(pipe: Pipeline) -> list[int]:
    return varptq.generate(pipe, [0, 3], seed=5).tokens.flatten().tolist()


def in_child(name: str, work: Callable[[], object]) -> None:
    """Fork, work there, and say how it ended."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}"[:200], flush=True)
            os._exit(1)
        os._exit(0)
    print(f"{name}: {os.waitpid(child, 0)[1]}", flush=True)


def same(pipe: Pipeline, expected: list[int]) -> None:
    assert tokens(pipe) == expected


def calibrated() -> None:
    varptq.quantize(build_tiny(depth=1), CONFIG, method="brecq", calibration=CALIBRATION)


def spawned(folder: str, pipes: dict[str, Pipeline], expected: dict[str, list[int]]) -> None:
    torch.set_num_threads(1)
    same(varptq.load(folder, runtime="cpu"), expected["cpu"])
    for name, pipe in pipes.items():
        same(pipe, expected[name])


def main(folder: str) -> None:
    torch.set_num_threads(2)
    x = torch.randn(600, 600, generator=torch.Generator().manual_seed(0))
    x.exp().sum()  # OpenMP's team is there from now on
    pipes = {name: varptq.load(folder, runtime=name) for name in ("simulated", "reference", "cpu")}
    pipes["float"] = build_tiny(depth=1)
    drawn = {name: tokens(pipe) for name, pipe in pipes.items()}
    calibrated()
    for name, pipe in pipes.items():
        in_child(name, lambda pipe=pipe, name=name: same(pipe, drawn[name]))

    def again() -> None:
        torch.set_num_threads(2)
        same(pipes["float"], drawn["float"])

    def deeper() -> None:
        in_child("grandchild", lambda: same(pipes["cpu"], drawn["cpu"]))

    in_child("threads set again", again)
    in_child("child of a child", deeper)
    thread = threading.Thread(
        target=in_child, args=("from a thread", lambda: same(pipes["float"], drawn["float"]))
    )
    thread.start()
    thread.join()

    # Not the same losses: a calibration depends on the number of threads, which is one there.
    in_child("calibration", calibrated)
    process = multiprocessing.get_context("spawn").Process(
        target=spawned, args=(folder, pipes, drawn)
    )
    process.start()
    process.join(SECONDS)
    print(f"spawn: {process.exitcode}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
