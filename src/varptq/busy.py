"""Short waits for torch's threads while other programs keep the cores busy.

    with beside_others(threads): ...

A thread of OpenMP that has done its part of an operation waits for the next one by spinning, for
milliseconds. That is right where every thread has a core. Where one has not, it takes the core from
the thread that it waits for, and a calibration beside one other busy process takes thirty times as
long. libgomp spins a thousandth of that when a process has more threads than cores: its manual says
so of GOMP_SPINCOUNT, which it reads once, when it is loaded. So while the cores are short, a second
team of threads exists here. It sleeps; all it does is be counted. How operations are divided among
threads stays as it was, and so does every result.

The cores are watched while a block runs on more than one thread. Other systems than Linux, and
builds of torch with another OpenMP, are left alone.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

STAT, MAPS = Path("/proc/stat"), Path("/proc/self/maps")
# How much of the processor a container gets, in how much time: "200000 100000" are two cores.
QUOTA = Path("/sys/fs/cgroup/cpu.max")
# Of cpuN in /proc/stat: user, nice, system, idle, iowait, irq, softirq, ...
BUSY_COLUMNS = (0, 1, 2, 5, 6)
PERIOD = 0.5
# Seconds that a team is kept after the last block.
KEPT = 5.0
# Of a core, that others may take before it counts, and that must be free again before waits are
# long again.
SHORT, FREE = 0.3, 0.1


class Seconds(NamedTuple):
    """Of the processor: what all programs have used on our cores, and this one; and the clock."""

    everybody: float
    own: float
    clock: float


def read(cores: set[int]) -> Seconds:
    """Now, on these cores."""
    ticks = 0
    for line in STAT.read_text().splitlines():
        name, *columns = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
            ticks += sum(int(columns[place]) for place in BUSY_COLUMNS)
    everybody = ticks / os.sysconf("SC_CLK_TCK")
    return Seconds(everybody, time.process_time(), time.monotonic())


def granted_cores() -> float:
    """What the container may use; spinning is paid from it, too."""
    try:
        quota, period = QUOTA.read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def free_cores(before: Seconds, after: Seconds, cores: int) -> float:
    """How many cores other programs left to this one between two moments."""
    others = (after.everybody - before.everybody) - (after.own - before.own)
    return min(granted_cores(), cores - max(0.0, others) / (after.clock - before.clock))


def are_short(free: float, threads: int, before: bool) -> bool:
    """Whether so many threads have to share cores, which they did `before`."""
    return free < threads - (FREE if before else SHORT)


class Team:
    """A team of OpenMP threads that sleeps, beside the team of `threads`: together they are one
    more than the cores. It ends with its thread."""

    def __init__(self, libraries: list[Any], threads: int, cores: int) -> None:
        self._over = threading.Event()
        self._formed = threading.Event()
        size = max(2, cores - threads + 2)
        work = (libraries, size)
        self._thread = threading.Thread(target=self._hold, args=work, daemon=True)
        self._thread.start()
        self._formed.wait()

    def _hold(self, libraries: list[Any], size: int) -> None:
        # The work of each of its threads is free(NULL), which does nothing.
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
        for library in libraries:
            library.GOMP_parallel(nothing, None, ctypes.c_uint(size), ctypes.c_uint(0))
        self._formed.set()
        self._over.wait()

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def loaded_libgomp() -> list[Any]:
    """The libraries of that name in this process: torch's, and that of other packages."""
    if not (MAPS.exists() and STAT.exists() and hasattr(os, "sched_getaffinity")):
        return []
    paths = {line.split(maxsplit=5)[-1] for line in MAPS.read_text().splitlines() if "gomp" in line}
    names = sorted(path for path in paths if Path(path).name.startswith("libgomp"))
    return [ctypes.CDLL(path) for path in names]


class Watch:
    """Looks twice a second at what others leave of the cores, while a block is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: list[int] = []
        self._most = 0
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self.team: Team | None = None

    def enter(self, threads: int) -> None:
        with self._lock:
            self._inside.append(threads)
            self._most = max(self._most, threads)
            self._wanted.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                with suppress(RuntimeError):  # as many threads as the user may have
                    self._thread.start()

    def leave(self, threads: int) -> None:
        with self._lock:
            self._inside.remove(threads)
            if not self._inside:
                self._wanted.clear()

    def _run(self) -> None:
        """Until the system does not say what runs, or gives no more threads."""
        with suppress(OSError, ValueError, IndexError, RuntimeError):
            self._look_on(loaded_libgomp())

    def _look_on(self, libraries: list[Any]) -> None:
        while libraries:
            # A server's images follow each other, each a block of its own.
            if not self._wanted.wait(None if self.team is None else KEPT):
                self._end()
                continue
            cores = os.sched_getaffinity(0)
            before = read(cores)
            time.sleep(PERIOD)
            self.look(before, read(cores), len(cores), libraries)

    def look(self, before: Seconds, after: Seconds, cores: int, libraries: list[Any]) -> None:
        """Form a team or end it, by what was measured while blocks of so many threads ran."""
        with self._lock:
            threads = min(self._most, cores)
            self._most = max(self._inside, default=0)
        short = are_short(free_cores(before, after, cores), threads, self.team is not None)
        if short and threads > 1 and self.team is None:
            self.team = Team(libraries, threads, cores)
        elif not short:
            self._end()

    def _end(self) -> None:
        if self.team is not None:
            self.team.end()
            self.team = None


_watch = Watch()


@contextmanager
def beside_others(threads: int) -> Iterator[None]:
    """A block that computes on so many threads."""
    if threads < 2:
        yield
        return
    watch = _watch
    watch.enter(threads)
    try:
        yield
    finally:
        watch.leave(threads)


def _forked() -> None:
    """In the child neither the thread that watches nor a team exists, and one thread computes."""
    global _watch
    _watch = Watch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
