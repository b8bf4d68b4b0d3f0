"""Calls timed against each other, and the rate of reading memory."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch


def alternate(
    calls: dict[str, Callable[[], object]], budget: float, threads: int
) -> dict[str, float]:
    """Median seconds of each call, taking turns for about `budget` seconds, in another order
    each time: what ran before leaves the caches to the next."""
    # Of the process: a library may compute in a thread of its own.
    clock = time.process_time if threads == 1 else time.perf_counter
    start, found = time.perf_counter(), {name: list[float]() for name in calls}
    for call in calls.values():
        call()
    names, turns, order = list(calls), 0, random.Random(0)
    while turns < 5 or (time.perf_counter() - start < budget and turns < 200):
        order.shuffle(names)
        for name in names:
            before = clock()
            calls[name]()
            found[name].append(clock() - before)
        turns += 1
    return {name: statistics.median(times) for name, times in found.items()}


def copy_rate(threads: int) -> float:
    """Bytes a second that a sum over a buffer larger than the caches reads."""
    buffer = torch.ones(16 * 2**20)
    seconds = alternate({"sum": lambda: buffer.sum()}, 0.5, threads)["sum"]
    return buffer.nbytes / seconds
