"""What a call would take on a whole model, from the same call on its first block."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from varptq.models.pipeline import Pipeline


@dataclass
class Spell:
    """Seconds of what a `with` held. inside: of `spent`, in the forward pass of the block."""

    depth: int
    spent: float = 0.0
    inside: float = 0.0

    @property
    def share(self) -> float:
        """Of the block, 0 where nothing took any time."""
        return self.inside / self.spent if self.spent > 0 else 0.0

    @property
    def whole(self) -> float:
        """On a model of `depth` blocks."""
        return self.scaled(self.share)

    def scaled(self, share: float) -> float:
        """The same where so much of it is known to be the block's, as of a pass back, which no
        module shows."""
        return self.spent * (1 + (self.depth - 1) * share)


class BlockClock:
    """Listens to the one block of a cut model, whose modules nobody else uses, and to the copies
    that are made of it: a copy of a module keeps its hooks."""

    def __init__(self, pipe: Pipeline, depth: int) -> None:
        self._pipe, self._depth = pipe, depth
        self._entered = self._inside = 0.0
        block = pipe.var.get_submodule("blocks.0")
        block.register_forward_pre_hook(self._enter)
        # Whoever wants the input of a layer alone leaves the pass by an exception.
        block.register_forward_hook(self._leave, always_call=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockClock:
        return self

    @contextmanager
    def spell(self) -> Iterator[Spell]:
        """What is done meanwhile; filled in when it ends. They do not nest."""
        found = Spell(self._depth)
        self._inside, began = 0.0, now(self._pipe)
        yield found
        found.spent, found.inside = now(self._pipe) - began, self._inside

    def _enter(self, *_: Any) -> None:
        self._entered = now(self._pipe)

    def _leave(self, *_: Any) -> None:
        self._inside += now(self._pipe) - self._entered


def now(pipe: Pipeline) -> float:
    """Seconds of the processor, or of the clock where a GPU computes."""
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
        return time.perf_counter()
    return time.process_time()
