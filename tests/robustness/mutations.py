"""Damage to real files, drawn by hypothesis, and a limit on what reading them may cost."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

# Generous: a tiny file is read in milliseconds; this catches what never ends.
SECONDS = 30


class HangError(Exception):
    """A loader took longer than `SECONDS`."""


@st.composite
def mutated(draw: Any, original: bytes) -> bytes:
    """`original` after one to three changes: cut, bits flipped, bytes replaced, inserted, moved,
    zeroed or repeated."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.sampled_from((1, 2, 8, 64, 1024)))
        kind = draw(st.sampled_from(("cut", "flip", "replace", "insert", "zero", "repeat", "drop")))
        piece = bytes(data[at : at + size])
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "replace":
            data[at : at + size] = draw(st.binary(min_size=1, max_size=size))
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=size))
        elif kind == "zero":
            data[at : at + size] = bytes(len(piece))
        elif kind == "repeat":
            data[at:at] = piece
        else:
            del data[at : at + size]
    return bytes(data)


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Raise `HangError` in the block after `SECONDS`."""

    def ring(*_: object) -> None:
        raise HangError(f"took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
