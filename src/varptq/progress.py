"""Progress of long runs: what a stage reports, and two ways to listen.

Every slow call takes an argument `progress` and calls progress(stage, done, total): with done = 0
before the first step, then after every step; done == total ends the stage. `silent` ignores the
calls, `RichProgress` shows them on stderr; any function with these arguments works. Nothing here
touches stdout or the results.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import rich.progress as bars
from rich.console import Console
from rich.text import Text

# A step may take minutes; rich's default window of 30 s would then never hold two samples.
SPEED_WINDOW_SECONDS = 600.0
# A log gets a line about a long stage this often.
LOG_EVERY_SECONDS = 30.0


class Progress(Protocol):
    """The function that a slow call reports to."""

    def __call__(self, stage: str, done: int, total: int, info: str = "") -> None:
        """`done` of `total` steps of `stage` are finished; `info` is a remark, e.g. a loss."""
        ...


def silent(stage: str, done: int, total: int, info: str = "") -> None:
    """A `Progress` that shows nothing."""


def pace(steps_per_second: float) -> str:
    """A rate people can read: "12.5/s", or "3.2 s each" below one step per second."""
    if steps_per_second >= 1:
        return f"{steps_per_second:.1f}/s"
    return f"{1 / steps_per_second:.1f} s each" if steps_per_second > 0 else ""


class _PaceColumn(bars.ProgressColumn):
    def render(self, task: bars.Task) -> Text:
        return Text(pace(task.finished_speed or task.speed or 0.0))


@dataclass
class _Stage:
    first: int = 0
    done: int = -1
    started: float = 0.0
    printed: float = 0.0
    bar: bars.TaskID | None = None


class RichProgress:
    """A `Progress` on stderr, used as a context manager.

    On a terminal every stage has a bar with its pace and remaining time. Elsewhere (a log file, CI)
    a stage prints one line at its start, one at its end and some between. A count that goes back
    restarts the stage.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._stages: dict[str, _Stage] = {}
        self._bars = bars.Progress(
            # markup off: "blocks[3]" is a layer, not a style.
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            _PaceColumn(),
            bars.TimeRemainingColumn(elapsed_when_finished=True),
            bars.TextColumn("{task.fields[info]}", markup=False),
            console=self._console,
            disable=not self._console.is_interactive,
            refresh_per_second=4,
            speed_estimate_period=SPEED_WINDOW_SECONDS,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Nor does a terminal that has closed.
        with suppress(OSError):
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, info: str = "") -> None:
        state = self._stages.setdefault(stage, _Stage())
        begins = state.done < 0 or done < state.done
        if begins:
            state.first, state.done, state.started = done, -1, time.monotonic()
            state.printed = state.started
        ends = state.done < total <= done
        state.done = done
        if self._console.is_interactive:
            self._draw(stage, state, total, info, begins)
            return
        if begins:
            self._print(f"{stage}: {total - done} steps")
        if ends:
            self._print(_summary(f"{stage}: done in", state, info))
        elif not begins and time.monotonic() - state.printed >= LOG_EVERY_SECONDS:
            self._print(_summary(f"{stage}: {done} of {total} after", state, info, total))
            state.printed = time.monotonic()

    def _draw(self, stage: str, state: _Stage, total: int, info: str, begins: bool) -> None:
        if state.bar is None:
            state.bar = self._bars.add_task(stage, total=total, info=info)
        elif begins:
            self._bars.reset(state.bar)
        self._bars.update(state.bar, completed=state.done, total=total, info=info)

    def _print(self, line: str) -> None:
        # A log that cannot be written does not end the run.
        with suppress(OSError):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _summary(what: str, state: _Stage, info: str, total: int = 0) -> str:
    """A line about the progress of `state`; with a `total`, also the remaining time at this
    pace."""
    seconds = time.monotonic() - state.started
    steps = state.done - state.first
    rate = pace(steps / seconds) if seconds else ""
    left = f"about {rough(seconds / steps * (total - state.done))} left" if total and steps else ""
    return ", ".join(part for part in (f"{what} {seconds:.1f} s", rate, left, info) if part)


def rough(seconds: float) -> str:
    """A rough duration: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
