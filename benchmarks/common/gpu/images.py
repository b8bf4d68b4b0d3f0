"""Whole images of one model by every variant there is, in turns, with the memory they take."""

from __future__ import annotations

import random
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.gpu.models import depth, one_block
from benchmarks.common.gpu.timer import PARTS, Run, timed
from benchmarks.common.gpu.variants import PRESETS, NotInstalledError, Variant, variants

BATCHES = (1, 8)
# Interpreted, an image takes ten seconds, and minutes with codebooks.
DRY_PRESETS: dict[str, tuple[str, ...]] = {"var-d16": ("w8a8",), "var-d30": ()}
DRY_BATCHES = (1,)
# Of the time of a model: how much making and warming up may take, and one variant of what is left.
PREPARING, ONE = 0.6, 0.4
MOST_ROUNDS = 50
Found = dict[str, Any]
Save = Callable[[], None]


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
            return f"not reached: more than {self.seconds:.0f} s to be made"
        return one_line(error)


def measure(model: str, device: str, seconds: float, dry: bool, found: Found, save: Save) -> None:
    """Fill `found` with a row for each variant: by batch its milliseconds and bytes, or why there
    are none. `save` is called after each step."""
    started = time.monotonic()
    batches = DRY_BATCHES if dry else BATCHES
    made = variants(
        one_block(model, dry), depth(model, dry), device, DRY_PRESETS[model] if dry else PRESETS
    )
    found.update({variant.name: {"why not": "not reached"} for variant in made})
    save()
    runs: dict[str, Callable[[int], Run]] = {}
    for variant in made:
        left = PREPARING * seconds - (time.monotonic() - started)
        if left > 0:
            row, run = _prepared(variant, device, ONE * left, batches)
            found[variant.name] = row
            save()
            if run is not None:
                runs[variant.name] = run
    for number, batch in enumerate(batches):
        left = seconds - (time.monotonic() - started)
        times = _in_turns(runs, batch, left / (len(batches) - number), dry)
        for name, taken in times.items():
            found[name][f"batch {batch}"] |= _medians(taken)
        save()


def _prepared(
    variant: Variant, device: str, seconds: float, batches: tuple[int, ...]
) -> tuple[Found, Callable[[int], Run] | None]:
    """The row of a variant that is made and has drawn once at each size of batch, and what draws;
    or why there is none."""
    row: Found = {}
    limit = Limit(seconds)
    try:
        with limit:
            before = _allocated(device)
            started = time.monotonic()
            run = timed(variant.build())
            row["weights, bytes"] = _allocated(device) - before
            for batch in batches:
                row[f"batch {batch}"] = {"peak, bytes": _peak(device, lambda b=batch: run(b))}
            row["making, seconds"] = time.monotonic() - started
            return row, run
    except NotInstalledError as error:
        return {"why not": str(error)}, None
    except Exception as error:  # whatever a library makes of a GPU it was not written on
        return {"why not": limit.said(error)}, None


def one_line(error: BaseException) -> str:
    """Kind and message, cut where the message goes on."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _peak(device: str, call: Callable[[], object]) -> int:
    """Bytes that a call takes beyond what is there before it."""
    if device != "cuda":
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _in_turns(
    runs: dict[str, Callable[[int], Run]], batch: int, seconds: float, dry: bool
) -> dict[str, list[Run]]:
    """Each variant once a round, in another order each time; at least one round."""
    started, order = time.monotonic(), random.Random(0)
    found: dict[str, list[Run]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(1 if dry else MOST_ROUNDS):
        taken = (time.monotonic() - started) / max(number, 1)
        if number and time.monotonic() - started + taken > seconds:
            break
        order.shuffle(names)
        for name in names:
            found[name].append(runs[name](batch))
    return found


def _medians(taken: list[Run]) -> Found:
    parts = {part: statistics.median(run.taken[part] for run in taken) for part in PARTS}
    whole = statistics.median(sum(run.taken.values()) for run in taken)
    return {"milliseconds": whole, "parts": parts, "rounds": len(taken)}
