"""What the paper reports (Moon and Ham, Shift-and-Sum Quantization for VAR, ICLR 2026).

The main table is that of the authors' project page. The rows of the ablation between its ends, the
table of edits and that of Infinity are known from public reading notes of the paper alone
(`SECOND_HAND`), so they are hints. Methods and widths go by the names they have here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

MODELS = ("var-d16", "var-d20", "var-d24", "var-d30")
EDITING_MODEL, TEXT_MODEL = "var-d30", "infinity-2b"
SECOND_HAND = ("ablation", "inpaint", "outpaint", "class", "infinity")
TITLES = {
    "brecq": "BRECQ",
    "litevar": "LiteVAR",
    "sas": "S&S",
    "sas+litevar": "S&S+LiteVAR",
    "brecq+shift": "BRECQ, shift-and-sum",
    "brecq+resample": "BRECQ, resampling",
}


class Cell(NamedTuple):
    """Of 50,000 images: Inception Score, FID, and FID to images of the 16-bit model."""

    score: float
    fid: float
    fid2fp: float | None


# Columns are `MODELS`.
FLOAT = (
    Cell(274.8, 3.41, None),
    Cell(302.9, 2.73, None),
    Cell(313.2, 2.17, None),
    Cell(303.5, 1.97, None),
)


def _row(*numbers: float) -> Sequence[Cell]:
    return [Cell(*numbers[at : at + 3]) for at in range(0, len(numbers), 3)]


MAIN: Mapping[str, Mapping[str, Sequence[Cell]]] = {
    "w6a6": {
        "brecq": _row(202.9, 5.56, 4.29, 239.5, 3.23, 2.72, 261.4, 2.73, 2.44, 250.9, 3.38, 2.55),
        "litevar": _row(212.1, 5.17, 4.05, 247.8, 3.13, 2.50, 261.8, 2.76, 2.43, 258.5, 3.27, 2.48),
        "sas": _row(213.5, 4.46, 3.14, 249.5, 3.01, 2.34, 264.8, 2.59, 2.30, 262.7, 2.88, 2.09),
        "sas+litevar": _row(
            *(226.1, 4.08, 2.64, 253.3, 2.89, 2.09, 269.9, 2.38, 1.97, 266.8, 2.66, 1.85)
        ),
    },
    "w4a8": {
        "brecq": _row(203.8, 6.07, 4.76, 226.2, 4.21, 3.82, 261.7, 2.90, 2.23, 270.4, 2.91, 1.96),
        "litevar": _row(217.8, 5.56, 3.85, 242.6, 3.58, 2.93, 270.4, 2.72, 2.19, 273.4, 2.85, 2.03),
        "sas": _row(212.5, 5.71, 4.05, 241.0, 3.71, 2.98, 275.8, 2.60, 1.91, 276.8, 2.71, 1.81),
        "sas+litevar": _row(
            *(227.8, 4.83, 3.00, 256.4, 3.32, 2.32, 285.6, 2.50, 1.73, 279.4, 2.60, 1.76)
        ),
    },
    "w4a6": {
        "brecq": _row(
            *(145.6, 11.16, 10.57, 189.1, 6.74, 6.62, 215.8, 4.89, 4.82, 221.4, 5.09, 4.17)
        ),
        "litevar": _row(158.1, 9.93, 9.09, 205.6, 5.23, 5.06, 225.4, 4.23, 4.04, 218.9, 5.41, 4.60),
        "sas": _row(162.1, 9.20, 8.44, 202.2, 5.36, 5.09, 230.7, 3.96, 3.90, 227.8, 4.59, 3.74),
        "sas+litevar": _row(
            *(189.3, 6.62, 5.28, 219.2, 4.46, 3.98, 248.1, 3.32, 3.01, 235.3, 4.43, 3.56)
        ),
    },
    "w4a4": {
        "brecq": _row(
            *(67.6, 33.03, 32.82, 94.1, 23.03, 22.42, 119.0, 16.89, 17.07, 125.3, 15.71, 14.66)
        ),
        "litevar": _row(
            *(66.9, 35.87, 36.67, 100.7, 21.71, 21.10, 128.6, 15.75, 16.81, 149.3, 12.25, 11.11)
        ),
        "sas": _row(
            *(90.7, 24.57, 24.35, 116.8, 17.74, 17.28, 148.0, 12.04, 11.71, 177.5, 9.26, 8.68)
        ),
        "sas+litevar": _row(
            *(110.9, 18.92, 18.32, 145.4, 12.43, 12.03, 172.7, 8.85, 8.24, 180.6, 9.12, 8.48)
        ),
    },
}
# Columns are the first two of `MODELS`; its ends are rows of the main table.
ABLATION: Mapping[str, Mapping[str, Sequence[Cell]]] = {
    "w4a6": {
        "brecq": MAIN["w4a6"]["brecq"][:2],
        "brecq+shift": _row(155.4, 10.15, 9.55, 194.8, 6.10, 6.03),
        "brecq+resample": _row(152.8, 10.19, 9.74, 195.3, 5.86, 5.61),
        "sas": MAIN["w4a6"]["sas"][:2],
    }
}
# In-painting and out-painting by LPIPS, a change of class by the cosine of CLIP; W4A4.
EDITING: Mapping[str, Mapping[str, float]] = {
    "inpaint": {"brecq": 0.2912, "sas": 0.2888, "sas+litevar": 0.2879},
    "outpaint": {"brecq": 0.2207, "sas": 0.2181, "sas+litevar": 0.2172},
    "class": {"brecq": 0.2289, "sas": 0.2358, "sas+litevar": 0.2363},
}
# ImageReward and GenEval; W4A4.
INFINITY: Mapping[str, tuple[float, float]] = {
    "brecq": (0.346, 0.563),
    "litevar": (0.407, 0.626),
    "sas": (0.575, 0.653),
    "sas+litevar": (0.748, 0.672),
}
