"""docs/paper.md: of every row the paper's cell and ours, or that it was not run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.common.pages import DOCS, replace, table
from benchmarks.common.paper import cells
from benchmarks.common.paper.protocol import COUNT
from benchmarks.common.paper.rows import (
    ABLATION,
    CLASS,
    COLUMNS,
    IMAGES,
    MAIN,
    TEXTS,
    Row,
    rows,
)
from benchmarks.common.results import Line, read_lines

PAGE = DOCS / "paper.md"
NOT_RUN, NOT_REPORTED = "not run", "-"
HEADINGS: Mapping[str, tuple[str, str]] = {
    MAIN: ("Main table", "IS / FID / FID2FP."),
    ABLATION: ("Ablation", "IS / FID / FID2FP."),
    "inpaint": ("In-painting", "LPIPS to the original."),
    "outpaint": ("Out-painting", "LPIPS to the original."),
    CLASS: ("Change of class", "Cosine of CLIP."),
    TEXTS: ("Infinity", "ImageReward / GenEval."),
}
# Digits behind the point, by the names of `COLUMNS`; the paper's own.
DIGITS = {"is": 1, "fid": 2, "fid2fp": 2, "lpips": 4, "clip": 4, "image_reward": 3, "geneval": 3}


def cell(kind: str, values: Sequence[float | None]) -> str:
    """Numbers in the order of `COLUMNS`, as the paper writes them."""
    pairs = zip(COLUMNS[kind], values, strict=True)
    texts = ["-" if value is None else f"{value:.{DIGITS[name]}f}" for name, value in pairs]
    return " / ".join(texts)


def paper_cell(row: Row) -> str:
    return NOT_REPORTED if row.paper is None else cell(row.kind, row.paper)


def our_cell(row: Row, lines: Mapping[str, Line]) -> str:
    """The last result of a row, with what makes it another number than the paper's."""
    if (line := lines.get(row.key)) is None:
        return NOT_RUN
    text = cell(row.kind, [line["values"][name] for name in COLUMNS[row.kind]])
    count = line["settings"]["count"]
    notes = [f"{count:,} images"] if row.kind == IMAGES and count != COUNT else []
    notes += [name for name in line["differs"] if name != IMAGES]
    return f"{text} ({', '.join(notes)})" if notes else text


def section(name: str, lines: Mapping[str, Line]) -> list[str]:
    """The table of one kind, the models side by side."""
    own = [row for row in rows() if row.table == name]
    models = list(dict.fromkeys(row.model for row in own))
    heading, numbers = HEADINGS[name]
    hint = " The paper's cells are second-hand." if name in cells.SECOND_HAND else ""
    head = ["W/A", "method"]
    for model in models:
        head += [f"{model}, paper", f"{model}, ours"]
    return [
        f"### {heading}",
        "",
        numbers + hint,
        "",
        *table(head, [_line(row, models, lines) for row in own if row.model == models[0]]),
    ]


def _line(row: Row, models: Iterable[str], lines: Mapping[str, Line]) -> list[str]:
    found = ["float" if row.is_float else row.width.upper(), row.title]
    for model in models:
        same = Row(row.table, model, row.width, row.method)
        found += [paper_cell(same), our_cell(same, lines)]
    return found


def summary(lines: Mapping[str, Line]) -> str:
    every = {row.key for row in rows()}
    done = every & set(lines)
    text = f"{len(done)} of {len(every)} measurements were run"
    machines = {_machine(lines[key]) for key in done}
    return f"{text}, on {'; '.join(sorted(machines))}." if machines else f"{text}."


def _machine(line: Line) -> str:
    found: dict[str, Any] = line["machine"]
    return f"{line['processes']} x {found['device']}, {found['dtype']}"


def by_key(found: Iterable[Line]) -> dict[str, Line]:
    """Results by `Row.key`, the last one of each."""
    return {line["row"]: line for line in found}


def page(lines: Mapping[str, Line]) -> list[str]:
    """What stands between the markers of the page."""
    text = [summary(lines), ""]
    for name in HEADINGS:
        text += section(name, lines)
    return text


def write_page(name: str) -> None:
    """The section `name` of the page, of the results of that name."""
    replace(PAGE, name, page(by_key(read_lines(name))))
