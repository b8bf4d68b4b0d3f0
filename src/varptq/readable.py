"""Numbers as people read them: sizes, durations, shares and large counts.

Used by the command line, the studio and the report, so that all three write a number alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def megabytes(size: float) -> str:
    """Bytes in MB of 10^6, in kB below a tenth of one."""
    return f"{size / 1e3:.1f} kB" if size < 1e5 else f"{size / 1e6:.2f} MB"


def seconds(duration: float) -> str:
    """A duration, in minutes from one on: "12.3 s", "2 min 25 s"."""
    minutes, rest = divmod(round(duration), 60)
    return f"{minutes} min {rest} s" if minutes else f"{duration:.1f} s"


def count(value: float) -> str:
    """A large count with a letter for its power of 1000: "10.9 G"."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{significant(value / factor)} {letter}"
    return f"{value:g}"


def percent(share: float) -> str:
    """One decimal, two for shares below 1%."""
    return f"{share:.2%}" if 0 < abs(share) < 0.01 else f"{share:.1%}"


def side(value: int | Sequence[int]) -> str:
    """Of a token map: "3" for a square, "3x2" for height and width."""
    return f"{value}" if isinstance(value, int) else "x".join(map(str, value))


def significant(value: float) -> str:
    """Three significant digits, e.g. 0.0913, 1.42, 16."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 8)}f}"


def plain(value: float) -> str:
    """At most three digits, for the ticks of an axis: 0.25, 3."""
    return f"{value:.3g}"


def ratio(large: float, small: float) -> str:
    """How many times smaller, e.g. "7.08×"."""
    return f"{significant(large / small)}×" if small else "-"


def name_of(*words: str | None) -> str:
    """The words that there are as the name of a file: "demo-w4a4"."""
    joined = "-".join(word for word in words if word)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", joined).strip("-._+")[:64]
