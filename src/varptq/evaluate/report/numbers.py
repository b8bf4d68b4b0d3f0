"""Numbers as people read them. Each style of `catalogue.Metric` has its form here."""

from __future__ import annotations

import math


def measured(value: float | None, style: str) -> str:
    """A metric's number with its unit; None (an infinite PSNR has no JSON) is "identical"."""
    if value is None:
        return "identical"
    if style == "share":
        return percent(value)
    if style == "nats":
        return f"{significant(value)} nats"
    if style == "dB":
        return f"{value:.2f} dB"
    return f"{value:.3f}" if style == "score" else f"{value:.2f}"


def percent(share: float) -> str:
    """One digit behind the point, two for small shares."""
    return f"{share:.2%}" if 0 < abs(share) < 0.01 else f"{share:.1%}"


def significant(value: float) -> str:
    """Three significant digits, e.g. 0.0913, 1.42, 16."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 8)}f}"


def plain(value: float) -> str:
    """At most three digits, for the ticks of an axis: 0.25, 3."""
    return f"{value:.3g}"


def megabytes(size: float) -> str:
    """Bytes in MB of 10^6, in kB below a tenth of one."""
    return f"{size / 1e3:.1f} kB" if size < 1e5 else f"{size / 1e6:.2f} MB"


def count(value: float) -> str:
    """A large count with a word: 10.9 G."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{significant(value / factor)} {letter}"
    return f"{value:g}"


def ratio(large: float, small: float) -> str:
    """How many times smaller, e.g. "7.08×"."""
    return f"{significant(large / small)}×" if small else "-"
