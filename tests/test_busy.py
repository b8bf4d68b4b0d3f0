"""Waiting beside other programs: what is read, what is decided, and the team that is formed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.holding import until
from varptq import busy
from varptq.torch_state import plain_torch

CORES = 2
FILE = """\
cpu  900 900 900 900 900 900 900 900 0 0
cpu0 100 20 30 5000 40 5 6 70 0 0
cpu1 200 0 0 6000 0 0 0 0 0 0
cpu12 400 0 0 7000 0 0 0 0 0 0
intr 12345
"""
LOOP = [sys.executable, "-c", "while True: pass"]

libgomp = pytest.mark.skipif(not busy.loaded_libgomp(), reason="torch has no libgomp here")


@pytest.fixture(autouse=True)
def _no_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(busy, "QUOTA", tmp_path / "no quota")


def after(seconds: float, everybody: float, own: float) -> busy.Seconds:
    return busy.Seconds(100 + everybody, 10 + own, 1000 + seconds)


def test_what_runs_on_our_cores_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither waiting, nor time that a hypervisor took, nor another core whose name begins so."""
    (tmp_path / "stat").write_text(FILE)
    monkeypatch.setattr(busy, "STAT", tmp_path / "stat")
    tick = os.sysconf("SC_CLK_TCK")
    assert busy.read({0, 1}).everybody == (100 + 20 + 30 + 5 + 6 + 200) / tick
    assert busy.read({12}).everybody == 400 / tick
    assert busy.read({3}).everybody == 0


@pytest.mark.parametrize(
    ("everybody", "own", "free"),
    [(0.0, 0.0, 2.0), (2.0, 2.0, 2.0), (2.0, 1.0, 1.0), (2.0, 0.25, 0.25), (1.9, 2.0, 2.0)],
)
def test_what_others_leave(everybody: float, own: float, free: float) -> None:
    found = busy.free_cores(after(0, 0, 0), after(1, everybody, own), CORES)
    assert found == pytest.approx(free)


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000\n", 2.0), ("50000 100000\n", 0.5), ("400000 100000\n", 2.0)]
)
def test_a_container_may_be_granted_less(
    text: str, cores: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(busy, "QUOTA", tmp_path / "cpu.max")
    assert busy.free_cores(after(0, 0, 0), after(1, 0, 0), CORES) == cores


def test_short_and_free_are_apart() -> None:
    """So that a share between them changes nothing."""
    assert busy.are_short(1.0, 2, before=False) and busy.are_short(1.0, 2, before=True)
    assert not busy.are_short(2.0, 2, before=True)
    assert not busy.are_short(1.8, 2, before=False) and busy.are_short(1.8, 2, before=True)
    assert not busy.are_short(1.0, 1, before=True)


def own_threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


@libgomp
@pytest.mark.parametrize("cores", [2, 4])
def test_a_team_is_one_more_than_the_cores_and_goes_again(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries: list[Any] = busy.loaded_libgomp()
    monkeypatch.setattr(busy, "loaded_libgomp", list)  # it does not look by itself
    watch = busy.Watch()
    idle, crowd = after(1, 1.5, 1.5), after(1, cores, 1.0)
    look = (cores, libraries)
    before = own_threads()
    watch.look(after(0, 0, 0), crowd, *look)
    assert watch.team is None, "nobody computes"
    # A block that is over counts, too: the next one of a series is about to begin.
    watch.enter(2)
    watch.leave(2)
    watch.look(after(0, 0, 0), crowd, *look)
    assert watch.team is not None
    watch.look(after(0, 0, 0), idle, *look)
    until(lambda: not own_threads() - before)
    watch.enter(2)
    watch.look(after(0, 0, 0), idle, *look)
    assert watch.team is None
    watch.look(after(0, 0, 0), crowd, *look)
    formed = watch.team
    assert formed is not None
    # Beside the thread that holds them, which libgomp has not made.
    workers = (len(own_threads() - before) - 1) // len(libraries)
    assert 2 + workers == cores + 1, "with the two that compute"
    watch.look(after(0, 0, 0), crowd, *look)
    assert watch.team is formed
    watch.look(after(0, 0, 0), idle, *look)
    assert watch.team is None
    until(lambda: not own_threads() - before)


@libgomp
@pytest.mark.slow
def test_a_call_beside_busy_programs_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = busy.Watch()
    monkeypatch.setattr(busy, "_watch", watch)
    monkeypatch.setattr(busy, "KEPT", 0.1)
    cores = len(os.sched_getaffinity(0))
    threads, loops = torch.get_num_threads(), list[subprocess.Popen[bytes]]()
    x = torch.randn(512, 700, generator=torch.Generator().manual_seed(0))

    @plain_torch()
    def called(condition: bool) -> torch.Tensor:
        until(lambda: (watch.team is not None) is condition)
        return (x @ x.T).softmax(-1).sum(0)

    try:
        if cores < 2:
            pytest.skip("one core")
        torch.set_num_threads(cores)
        loops = [subprocess.Popen(LOOP) for _ in range(cores)]
        found = called(True)
        assert torch.equal(found, called(True))
        monkeypatch.setattr(busy, "_watch", busy.Watch())
        monkeypatch.setattr(busy, "loaded_libgomp", list)
        assert torch.equal(found, (x @ x.T).softmax(-1).sum(0))
    finally:
        torch.set_num_threads(threads)
        for loop in loops:
            loop.kill()
            loop.wait()
    # Nobody computes any more.
    until(lambda: watch.team is None)


@libgomp
@pytest.mark.parametrize("text", ["", "cpu0 1 2\n", "cpu0 a b c d e f g\n"])
def test_a_system_that_does_not_say_is_left_alone(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stat").write_text(text)
    monkeypatch.setattr(busy, "STAT", tmp_path / "stat")
    monkeypatch.setattr(busy, "PERIOD", 0.01)
    watch = busy.Watch()
    watch.enter(2)
    time.sleep(0.1)
    watch.leave(2)
    assert watch.team is None and not capfd.readouterr().err


def test_one_thread_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "_watch", busy.Watch())
    before = own_threads()
    with busy.beside_others(1):
        assert not own_threads() - before
