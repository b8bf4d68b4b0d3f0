"""`varptq analyze --frontier`: the best bits for every kind of layer within budgets.

Writes `frontier.json` with every number, `frontier.png`, and for each budget a config for `varptq
quantize --config`.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import typer
from rich.table import Table

from varptq import readable
from varptq.cli import common
from varptq.errors import InputError

if TYPE_CHECKING:
    from varptq.analyze.analyze import AnalysisConfig
    from varptq.analyze.budgets import Budgets, Limit
    from varptq.models.pipeline import Pipeline
    from varptq.progress import Progress

FRONTIER_NAME, PICTURE_NAME = "frontier.json", "frontier.png"


@dataclass(frozen=True)
class Frontier:
    """Which bits are best within limits."""

    marker: ClassVar[str] = FRONTIER_NAME
    limits: Sequence[Limit]

    @classmethod
    def read(cls, size: str | None, bops: float | None) -> Self:
        """The budget given, in bit operations, bytes or both, or a list of usual ones."""
        return cls(read_limits(size, bops))

    def answer(self, pipe: Pipeline, settings: AnalysisConfig, progress: Progress) -> Budgets:
        from varptq.analyze.budgets import budgets

        return budgets(pipe, self.limits, settings=settings, progress=progress)

    def write(self, folder: Path, found: Budgets) -> None:
        from varptq.analyze.figures import frontier
        from varptq.pictures import write_png

        named = {f"{name}.json": config.to_dict() for name, config in found.configs.items()}
        for name, values in {FRONTIER_NAME: found.document, **named}.items():
            text = json_module.dumps(values, indent=1) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        write_png(folder / PICTURE_NAME, frontier(found.document))

    def show(self, found: Budgets, out: Path) -> None:
        common.print_table(table(found.document))
        configs = ", ".join(f"{out}/{name}.json" for name in found.configs)
        typer.echo(f"written: {out}/{FRONTIER_NAME}, {configs} and {PICTURE_NAME}")


def read_limits(size: str | None, bops: float | None) -> list[Limit]:
    from varptq.analyze.budgets import RATIOS, Limit

    if size is None:
        return [Limit(bops=ratio) for ratio in (RATIOS if bops is None else (bops,))]
    value, in_megabytes = read_size(size)
    if not 0 < value < float("inf"):
        raise InputError(f"budget {size!r}: expected a number above 0")
    return [Limit.from_dict({"bops": bops, "megabytes" if in_megabytes else "size": value})]


def read_size(size: str) -> tuple[float, bool]:
    """ "1.1" -> (1.1, False), a ratio; "4.5MB" -> (4.5, True)."""
    number = size.lower().removesuffix("mb")
    try:
        return float(number), number != size.lower()
    except ValueError:
        raise InputError(f"budget {size!r}: expected a ratio or a size, 1.1 or 4.5MB") from None


def table(document: dict[str, Any]) -> Table:
    """Budgets in columns, bits of every kind in rows."""
    chosen = document["chosen"]
    title = f"Bits within budgets in units of {document['unit']}: weights x inputs, q and k x v"
    shown = Table("", *chosen, title=title, title_justify="left")
    for index, kind in enumerate(document["kinds"]):
        cells = ["x".join(map(str, point["bits"][index])) for point in chosen.values()]
        shown.add_row(kind["layers"], *cells)
    shown.add_section()
    rows = {
        "bit operations": lambda point: f"{point['bops']:.3f}x",
        "transformer": lambda point: readable.megabytes(point["bytes"]),
        "KL, predicted": lambda point: f"{point['kl']:.4f}",
        "KL, calibrated": lambda point: f"{point['measured']:.4f}",
    }
    for name, said in rows.items():
        shown.add_row(name, *(said(point) for point in chosen.values()))
    return shown
