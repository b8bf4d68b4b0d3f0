"""Checks that layers make of their numbers: at once or, while work is recorded to be run again,
kept until it has run, since what is recorded cannot branch on values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from varptq.errors import NonFiniteError


class KeptChecks:
    """The checks of one recording: tensors of one bool each, and what is wrong where one is
    false."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._messages: list[str] = []
        self._passed: Tensor | None = None

    def keep(self, found: Tensor, message: str) -> None:
        self._found.append(found)
        self._messages.append(message)

    def join(self) -> None:
        """All checks as one tensor, which is part of what is recorded."""
        if self._found:
            self._passed = torch.stack(self._found).all()

    def verify(self) -> None:
        """Raises `NonFiniteError` with the message of the first check that failed when the
        recording ran last. Waits for the device if there are checks."""
        if self._passed is None or bool(self._passed):
            return
        failed = next(i for i, found in enumerate(self._found) if not bool(found))
        raise NonFiniteError(self._messages[failed])


_kept: ContextVar[KeptChecks | None] = ContextVar("kept", default=None)


@contextmanager
def kept_checks() -> Iterator[KeptChecks]:
    """The checks of this thread are kept, during a block."""
    kept = KeptChecks()
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)
    kept.join()


def are_kept() -> bool:
    """Whether checks are kept at present."""
    return _kept.get() is not None


def require(found: Tensor, message: str) -> None:
    """`found` is a tensor of one bool, such as `x.isfinite().all()`. Raises `NonFiniteError` where
    it is false, now or when what is recorded has run."""
    kept = _kept.get()
    if kept is not None:
        kept.keep(found, message)
    elif not bool(found):
        raise NonFiniteError(message)
