"""The rows of the methods tables, which `methods` measures and `methods_report` shows, by model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import pstdev

from benchmarks.common.paper.cells import ABLATION as PAPER_ABLATION
from benchmarks.common.paper.cells import INFINITY, MAIN, Cell

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


def preset_of(width: str, method: str) -> str:
    """The preset of a row: the paper's quantizers at that width, unless the method says others."""
    if method == PRESET:
        return width
    # Methods differ in the transformer; the autoencoder is the float one.
    if method == BARE:
        return f"{width}{OURS}+vae32"
    return width + PAPER + preset_part(method)


def preset_part(method: str) -> str:
    """What a method adds to the name of a preset."""
    return "+litevar" if "litevar" in method else ""


def calibration_method(method: str) -> str:
    """LiteVAR is learned rounding with fc2 in float, so a preset and not a method."""
    if method in (BARE, PRESET):
        return BARE_METHOD
    return "brecq" if method == "litevar" else method.removesuffix("+litevar")


def fid2fp(table: Mapping[str, Mapping[str, Sequence[Cell]]], *places: int) -> Cells:
    """FID2FP16 of these columns of a table of the paper."""
    return {
        width: {
            method: [value for place in places if (value := cells[place].fid2fp) is not None]
            for method, cells in rows.items()
        }
        for width, rows in table.items()
    }


STUDIES = {
    "demo": Study(
        "methods",
        WIDTHS,
        METHODS,
        ("w4a4", "w4a6"),
        ("FID2FP, d16", "FID2FP, d30"),
        fid2fp(MAIN, 0, 3),
        ("FID2FP, d16", "FID2FP, d20"),
        fid2fp(PAPER_ABLATION, 0, 1),
    ),
    "demo-text": Study(
        "methods_text",
        ("w4a4", "w6a6", "w4a8"),
        (*METHODS, BARE),
        ("w4a4",),
        ("ImageReward", "GenEval"),
        {"w4a4": INFINITY},
    ),
}


def standard_error(without: Sequence[float]) -> float:
    """Of a value whose versions without one group each are given (jackknife)."""
    return (len(without) - 1) ** 0.5 * pstdev(without)
