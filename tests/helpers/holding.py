"""A model that draws nothing before it is told, so that a test can look at what waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from varptq.models.pipeline import Pipeline
from varptq.models.sampling import Sampler

PATIENCE = 60.0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@dataclass
class Held(Sampler):
    """A sampler that draws once `free` is set. scales: how often it was asked."""

    inner: Sampler
    free: threading.Event = field(default_factory=threading.Event)
    scales: int = 0

    def draw(self, *args: Any, **kwargs: Any) -> Any:
        self.scales += 1
        assert self.free.wait(PATIENCE)
        return self.inner.draw(*args, **kwargs)


def held(pipe: Pipeline) -> tuple[Pipeline, Held]:
    """The same model with such a sampler, and that."""
    sampler = Held(pipe.sampler)
    return replace(pipe, sampler=sampler), sampler
