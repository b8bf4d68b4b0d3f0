"""Counts the cases the suite tries, over all workers, and prints the sum at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

CASES = "robustness cases"


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Iterator[Callable[[], None]]:
    """Call it once per case tried."""
    total = 0

    def count() -> None:
        nonlocal total
        total += 1

    yield count
    record_property(CASES, total)
