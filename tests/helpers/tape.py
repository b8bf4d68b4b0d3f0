"""Recorders that stand in for CUDA graphs on any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What waits for a number, and no graph holds.
aten = torch.ops.aten
FORBIDDEN = {
    *(aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default),
    *(aten.equal.default, aten.nonzero.default, aten.masked_select.default),
}
# What moves a tensor between devices, where there is more than one.
MOVES = {aten.to.dtype_layout, aten.to.device}


class Again:
    """Calls the work again. `recorded` counts what was recorded, `runs` how often any of it ran."""

    def __init__(self, device: torch.device) -> None:
        self.recorded = self.runs = 0

    def __call__(self, work: Callable[[], Any], *, lasting: bool = False) -> Callable[[], Any]:
        work()
        self.recorded += 1

        def run() -> Any:
            self.runs += 1
            return work()

        return run


class _Listening(TorchDispatchMode):
    def __init__(self, forbidden: set[Any]) -> None:
        super().__init__()
        self.forbidden = forbidden
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.forbidden, f"{func} in what is recorded"
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made


class Watched(Again):
    """Fails where the work, once it has run, does what no graph holds, also on another device."""

    def __call__(self, work: Callable[[], Any], *, lasting: bool = False) -> Callable[[], Any]:
        def watched() -> Any:
            with _Listening(FORBIDDEN | MOVES):
                return work()

        return super().__call__(watched, lasting=lasting)


class Tape(Again):
    """As a CUDA graph: operators of torch alone run again, on the tensors of the first time, and
    write over what they had made. No line of Python of ours does."""

    def __call__(self, work: Callable[[], Any], *, lasting: bool = False) -> Callable[[], Any]:
        work()
        self.recorded += 1
        with _Listening(FORBIDDEN) as tape:
            made = work()

        def run() -> Any:
            self.runs += 1
            for func, args, kwargs, before in tape.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
            return made

        return run
