"""The rows of the methods table, which `methods` measures and `methods_report` shows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import pstdev

NAME = "methods"
WIDTHS = ("w4a4", "w4a6", "w6a6", "w4a8", "w8a8")
# Takes nothing from calibration, so one row says all.
NEAREST = "rtn"
METHODS = (NEAREST, "brecq", "litevar", "sas", "sas+litevar")
# The paper's ablation; its first and last rows are "brecq" and "sas".
ABLATION, ABLATED_WIDTHS = ("brecq+shift", "brecq+resample"), ("w4a4", "w4a6")
# The assignment of quantizers that is compared, whatever a bare width stands for.
PAPER = "+paper"
FLOAT, VQVAE = "float", "vqvae"


def standard_error(without: Sequence[float]) -> float:
    """Of a value whose versions without one group each are given (jackknife)."""
    return (len(without) - 1) ** 0.5 * pstdev(without)
