"""The rows of the paper's tables, each with our bare preset beside them.

Rows of several tables may be one measurement: the ends of the ablation stand in the main table too.
`Row.key` names the measurement, so what one row measured is there for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from benchmarks.common.methods_rows import (
    FLOAT,
    METHODS,
    NEAREST,
    PRESET,
    calibration_method,
    preset_of,
)
from benchmarks.common.paper import cells
from varptq.calibrate.config import CalibrationConfig
from varptq.errors import InputError

IMAGES, CLASS, TEXTS = "images", "class", "infinity"
PAINTING = ("inpaint", "outpaint")
EDITS = (*PAINTING, CLASS)
# What is measured of a row of each kind, in the order in which cells name it.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    IMAGES: ("is", "fid", "fid2fp"),
    "inpaint": ("lpips",),
    "outpaint": ("lpips",),
    CLASS: ("clip",),
    TEXTS: ("image_reward", "geneval"),
}
MAIN, ABLATION = "main", "ablation"
TABLES = (MAIN, ABLATION, *EDITS, TEXTS)
WIDTHS, LOW = tuple(cells.MAIN), "w4a4"
# The authors' schedule for their methods; a preset is calibrated as `varptq quantize` does it.
EFFORTS = {PRESET: "default"}
PAPER_EFFORT = "released"


@dataclass(frozen=True)
class Row:
    """`method` of `model` at `width` in a table; the float model is of width "float"."""

    table: str
    model: str
    width: str
    method: str = FLOAT

    @property
    def name(self) -> str:
        """What `--rows` picks by, such as "main/var-d16/w4a4/sas+litevar"."""
        return f"{self.table}/{self.model}/{self.assignment}"

    @property
    def assignment(self) -> str:
        return FLOAT if self.is_float else f"{self.width}/{self.method}"

    @property
    def kind(self) -> str:
        """A key of `COLUMNS`."""
        return IMAGES if self.table in (MAIN, ABLATION) else self.table

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.model}/{self.assignment}"

    @property
    def is_float(self) -> bool:
        return self.width == FLOAT

    @property
    def preset(self) -> str:
        """The config of a quantized row, by name."""
        return preset_of(self.width, self.method)

    @property
    def calibration_method(self) -> str:
        return calibration_method(self.method)

    @property
    def effort(self) -> str:
        return EFFORTS.get(self.method, PAPER_EFFORT)

    @property
    def runtime(self) -> str:
        """The paper's quantizers are simulated; a preset computes on what it is made for."""
        return "auto" if self.method == PRESET else "simulated"

    @property
    def title(self) -> str:
        """How a table names the method."""
        if self.is_float:
            return "float"
        return "our preset" if self.method == PRESET else cells.TITLES[self.method]

    def calibration(self, samples: int | None, steps: int | None) -> CalibrationConfig:
        """Of this row, with so many samples and steps where they are given."""
        given = {"num_samples": samples, "steps": steps}
        changes = {name: value for name, value in given.items() if value is not None}
        return CalibrationConfig.preset(self.effort).replace(**changes)

    @property
    def paper(self) -> tuple[float | None, ...] | None:
        """The paper's cell in the order of `COLUMNS`; None where it has none."""
        if self.table == TEXTS:
            return cells.INFINITY.get(self.method)
        if self.table in EDITS:
            found = cells.EDITING[self.table].get(self.method)
            return None if found is None else (found,)
        column = cells.MODELS.index(self.model)
        if self.is_float:
            return cells.FLOAT[column]
        table = cells.MAIN if self.table == MAIN else cells.ABLATION
        found = table[self.width].get(self.method)
        return None if found is None else found[column]


def rows() -> list[Row]:
    """All, model by model, so that each is loaded once; the float model's images come first, as the
    others are compared with them."""
    quantized = [method for method in METHODS if method != NEAREST]
    found = []
    for model in cells.MODELS:
        found.append(Row(MAIN, model, FLOAT))
        found += [
            Row(MAIN, model, width, method) for width in WIDTHS for method in (*quantized, PRESET)
        ]
    for width, methods in cells.ABLATION.items():
        columns = len(next(iter(methods.values())))
        found += [Row(ABLATION, m, width, x) for m in cells.MODELS[:columns] for x in methods]
    for task, methods in cells.EDITING.items():
        found.append(Row(task, cells.EDITING_MODEL, FLOAT))
        found += [Row(task, cells.EDITING_MODEL, LOW, x) for x in (*methods, PRESET)]
    found.append(Row(TEXTS, cells.TEXT_MODEL, FLOAT))
    found += [Row(TEXTS, cells.TEXT_MODEL, LOW, x) for x in (*cells.INFINITY, PRESET)]
    order = list(dict.fromkeys(row.model for row in found))
    return sorted(found, key=lambda row: order.index(row.model))


def picked(globs: Sequence[str], among: Iterable[Row]) -> list[Row]:
    """The rows whose names fit one of the patterns, in their order; all without a pattern. Raises
    `InputError` for a pattern that fits none."""
    among = list(among)
    for glob in globs:
        if not any(fnmatchcase(row.name, glob) for row in among):
            raise InputError(
                f"rows {glob!r}: fits none of {len(among)} rows; names are like "
                f"{among[0].name!r}, tables are {', '.join(TABLES)}"
            )
    if not globs:
        return among
    return [row for row in among if any(fnmatchcase(row.name, glob) for glob in globs)]
