"""The rows of the methods tables, which `methods` measures and `methods_report` shows, by model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import pstdev

WIDTHS = ("w4a4", "w4a6", "w6a6", "w4a8", "w8a8")
# Takes nothing from calibration, so one row says all.
NEAREST = "rtn"
METHODS = (NEAREST, "brecq", "litevar", "sas", "sas+litevar")
# The paper's ablation; its first and last rows are "brecq" and "sas".
ABLATION = ("brecq+shift", "brecq+resample")
# The assignment of quantizers that is compared, whatever a bare width stands for.
PAPER = "+paper"
# Our own assignment at that width on uniform steps in groups, in the closed form.
BARE, BARE_METHOD, OURS = "bare", "gptq", "+groups"
# A preset as users have it, by its name in place of a width: on integers, decoder included.
PRESET, PRESET_IMAGES = "preset", "preset_images"
FLOAT, VQVAE = "float", "vqvae"

# Per width and method a value of each of the paper's columns.
Cells = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Study:
    """One model's tables. name: of its results (.jsonl), of its page and of its picture. paper,
    ablation: what the paper has in `columns` and `ablation_columns`."""

    name: str
    widths: Sequence[str]
    methods: Sequence[str]
    ablated_widths: Sequence[str]
    columns: Sequence[str]
    paper: Cells
    ablation_columns: Sequence[str] = ()
    ablation: Cells = field(default_factory=dict)

    def has(self, width: str, method: str) -> bool:
        return method in (*self.methods, PRESET) or (
            method in ABLATION and width in self.ablated_widths
        )


# FID2FP16 of the paper's table, 50,000 images: VAR-d16 and VAR-d30.
PAPER_FID2FP = {
    "w6a6": {
        "brecq": (4.29, 2.55),
        "litevar": (4.05, 2.48),
        "sas": (3.14, 2.09),
        "sas+litevar": (2.64, 1.85),
    },
    "w4a8": {
        "brecq": (4.76, 1.96),
        "litevar": (3.85, 2.03),
        "sas": (4.05, 1.81),
        "sas+litevar": (3.00, 1.76),
    },
    "w4a6": {
        "brecq": (10.57, 4.17),
        "litevar": (9.09, 4.60),
        "sas": (8.44, 3.74),
        "sas+litevar": (5.28, 3.56),
    },
    "w4a4": {
        "brecq": (32.82, 14.66),
        "litevar": (36.67, 11.11),
        "sas": (24.35, 8.68),
        "sas+litevar": (18.32, 8.48),
    },
}
# Its ablation at W4A6, FID2FP16: VAR-d16 and VAR-d20.
PAPER_ABLATION = {
    "w4a6": {
        "brecq": (10.57, 6.62),
        "brecq+shift": (9.55, 6.03),
        "brecq+resample": (9.74, 5.61),
        "sas": (8.44, 5.09),
    }
}
# Infinity-2B at W4A4: ImageReward and GenEval, of which more is better.
PAPER_INFINITY = {
    "w4a4": {
        "brecq": (0.346, 0.563),
        "litevar": (0.407, 0.626),
        "sas": (0.575, 0.653),
        "sas+litevar": (0.748, 0.672),
    }
}
STUDIES = {
    "demo": Study(
        "methods",
        WIDTHS,
        METHODS,
        ("w4a4", "w4a6"),
        ("FID2FP, d16", "FID2FP, d30"),
        PAPER_FID2FP,
        ("FID2FP, d16", "FID2FP, d20"),
        PAPER_ABLATION,
    ),
    "demo-text": Study(
        "methods_text",
        ("w4a4", "w6a6", "w4a8"),
        (*METHODS, BARE),
        ("w4a4",),
        ("ImageReward", "GenEval"),
        PAPER_INFINITY,
    ),
}


def standard_error(without: Sequence[float]) -> float:
    """Of a value whose versions without one group each are given (jackknife)."""
    return (len(without) - 1) ** 0.5 * pstdev(without)
