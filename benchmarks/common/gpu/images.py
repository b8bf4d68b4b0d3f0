"""Whole images of one model by every variant there is, in turns, with the memory they take."""

from __future__ import annotations

import random
import signal
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.common.gpu.models import depth, one_block
from benchmarks.common.gpu.page import NOT_REACHED
from benchmarks.common.gpu.timer import PARTS, Run, timed
from benchmarks.common.gpu.variants import PRESETS, NotInstalledError, Variant, variants
from varptq.models.graphs import Graphs

BATCHES = (1, 8)
# Interpreted, an image takes ten seconds, and minutes with codebooks.
DRY_PRESETS: dict[str, tuple[str, ...]] = {"var-d16": ("w8a8",), "var-d30": ()}
DRY_BATCHES = (1,)
# Of the time of a model: how much making and warming up may take, and one variant of what is left.
PREPARING, ONE = 0.6, 0.4
MOST_ROUNDS = 50
Found = dict[str, Any]
Save = Callable[[], None]


class Ready(NamedTuple):
    """What draws a number of images, and what it drew first, by that number."""

    run: Callable[[int], Run]
    first: dict[int, Run]


class OutOfTimeError(Exception):
    """Something took longer than its share."""


class Limit:
    """What is done within this context is cut off after `seconds`, between two steps of Python:
    `OutOfTimeError`, or what a library makes of it, and `reached` is true."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.reached = seconds, False

    def _stop(self, *_: object) -> None:
        self.reached = True
        raise OutOfTimeError

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGALRM, self._stop)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)

    def said(self, error: BaseException) -> str:
        """Why what was cut off, or failed by itself, has no result."""
        if self.reached:
            return f"{NOT_REACHED}: more than {self.seconds:.0f} s to be made"
        return one_line(error)


def measure(model: str, device: str, seconds: float, dry: bool, found: Found, save: Save) -> None:
    """Fill `found` with a row for each variant, with CUDA graphs and without: by batch its
    milliseconds and bytes, or why there are none. `save` is called after each step."""
    started = time.monotonic()
    batches = DRY_BATCHES if dry else BATCHES
    made = variants(
        one_block(model, dry), depth(model, dry), device, DRY_PRESETS[model] if dry else PRESETS
    )
    names = (name for variant in made for name in both(variant.name))
    found.update({name: {"why not": NOT_REACHED} for name in names})
    save()
    runs: dict[str, Ready] = {}
    for variant in made:
        left = PREPARING * seconds - (time.monotonic() - started)
        if left > 0:
            limit = Limit(ONE * left)
            runs |= _prepared(variant, device, limit, batches, found)
            save()
    for number, batch in enumerate(batches):
        left = seconds - (time.monotonic() - started)
        times = {name: [ready.first[batch]] for name, ready in runs.items()}
        if not dry:
            times = _in_turns(runs, batch, left / (len(batches) - number))
        for name, taken in times.items():
            found[name][f"batch {batch}"] |= _medians(taken)
        save()


def both(name: str) -> tuple[str, str]:
    """The rows of a variant: as it is, and with CUDA graphs."""
    return name, f"{name}, CUDA graphs"


def _prepared(
    variant: Variant, device: str, limit: Limit, batches: tuple[int, ...], found: Found
) -> dict[str, Ready]:
    """What draws, of a variant that is made and has drawn once at each size of batch; its rows in
    `found`, or why there are none."""
    ready: dict[str, Ready] = {}
    name = variant.name
    try:
        with limit:
            before, started = _allocated(device), time.monotonic()
            pipe = variant.build()
            weights = _allocated(device) - before
            if device != "cuda":
                pipe.graphs = Graphs(lambda _: called_again)
            run = timed(pipe)
            for graphs, name in enumerate(both(variant.name)):
                row: Found = {"weights, bytes": weights}
                ready[name] = Ready(partial(run, graphs=bool(graphs)), {})
                for batch in batches:
                    first, peak = _peak(device, partial(ready[name].run, batch))
                    row[f"batch {batch}"] = {"peak, bytes": peak}
                    ready[name].first[batch] = first
                row["making, seconds"] = time.monotonic() - started
                if graphs:
                    row["same tokens"] = _same(*(ready[n].first for n in both(variant.name)))
                found[name] = row
    except NotInstalledError as error:
        found |= {name: {"why not": str(error)} for name in both(variant.name)}
    except Exception as error:  # whatever a library makes of a GPU it was not written on
        ready.pop(name, None)
        found[name] = {"why not": limit.said(error)}
    return ready


def called_again(work: Callable[[], Any], *, lasting: bool = False) -> Callable[[], Any]:
    """Stands in for a CUDA graph where there is no GPU."""
    return work


def _same(plain: dict[int, Run], graphs: dict[int, Run]) -> bool:
    return all(torch.equal(plain[batch].tokens, graphs[batch].tokens) for batch in plain)


def one_line(error: BaseException) -> str:
    """Kind and message, cut where the message goes on."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _peak(device: str, call: Callable[[], Run]) -> tuple[Run, int]:
    """What a call finds, and the bytes that it takes beyond what is there before it."""
    if device != "cuda":
        return call(), 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run = call()
    torch.cuda.synchronize()
    return run, torch.cuda.max_memory_allocated() - before


def _in_turns(runs: dict[str, Ready], batch: int, seconds: float) -> dict[str, list[Run]]:
    """Each variant once a round, in another order each time; at least one round."""
    started, order = time.monotonic(), random.Random(0)
    found: dict[str, list[Run]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(MOST_ROUNDS):
        taken = (time.monotonic() - started) / max(number, 1)
        if number and time.monotonic() - started + taken > seconds:
            break
        order.shuffle(names)
        for name in names:
            found[name].append(runs[name].run(batch))
    return found


def _medians(taken: list[Run]) -> Found:
    parts = {part: statistics.median(run.taken[part] for run in taken) for part in PARTS}
    whole = statistics.median(sum(run.taken.values()) for run in taken)
    return {"milliseconds": whole, "parts": parts, "rounds": len(taken)}
