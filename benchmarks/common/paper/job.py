"""One run of paper.py: what all of its rows share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.common.paper.models import Source
from benchmarks.common.paper.rows import CLASS, IMAGES, TEXTS, Row
from varptq.calibrate.config import CalibrationConfig
from varptq.distributed import Ranks
from varptq.errors import InputError
from varptq.evaluate.layouts import check_layout
from varptq.models.generate import DEFAULT_BATCH
from varptq.models.prompt_files import PROMPT, PromptFile, prompt_file
from varptq.models.sampling import SamplingSettings

# As the paper draws images of classes; texts are drawn as the model's own settings say.
SETTINGS = SamplingSettings(cfg=1.5, top_k=900, top_p=0.96)
# The square that edits redraw, or keep, relative to the image.
BOX = (0.25, 0.25, 0.75, 0.75)
# What measures a row of each kind, by the options of `instruments.Files`.
JUDGES: Mapping[str, tuple[str, ...]] = {
    IMAGES: ("network", "reference"),
    "inpaint": ("lpips", "reference"),
    "outpaint": ("lpips", "reference"),
    CLASS: ("clip", "reference"),
    TEXTS: (),
}


@dataclass(frozen=True)
class Suite:
    """Prompts of a suite of text-to-image. name: of its number in `rows.COLUMNS`. layout: of its
    pictures, as `evaluate.layouts` calls it. option: that names its file. usual: how many prompts
    that has; per_prompt: pictures of each. most: how many prompts of the file are taken, None for
    all."""

    name: str
    layout: str
    option: str
    usual: int
    per_prompt: int
    path: Path | None = None
    most: int | None = None

    def or_from(self, path: Path | None) -> Suite:
        """With these prompts where none are given."""
        return self if self.path is not None else replace(self, path=path)

    @cached_property
    def file(self) -> PromptFile:
        """Raises `InputError` for a file that is missing or cannot be used."""
        if self.path is None:
            raise InputError(f"no prompts; give its file of prompts with {self.option}")
        found = prompt_file(self.path)
        return PromptFile(found.prompts[: self.most], found.records[: self.most])

    @property
    def count(self) -> int:
        """Of pictures."""
        prompts = self.usual if self.path is None else len(self.file.records)
        return prompts * self.per_prompt

    def described(self) -> str:
        """What it asks for. Raises `InputError` as `file` and `check_layout` do."""
        check_layout(self.layout, self.file.records, self.count)
        first = self.file.records[0][PROMPT]
        each = f"{self.per_prompt} pictures each"
        return f"{len(self.file.records)} prompts of {self.path}, {each}, the first {first!r:.50}"


@dataclass(frozen=True)
class Job:
    """out: for artifacts, images and what measuring leaves. count: images of a row of the main
    table; edits: real images that are edited. samples, steps: of calibration, None for those of the
    row's effort. judges: names of what measures, by the options that name it. keep: the images of a
    row stay after it was measured."""

    out: Path
    source: Source
    count: int
    edits: int
    seed: int = 0
    samples: int | None = None
    steps: int | None = None
    suites: tuple[Suite, ...] = ()
    judges: Mapping[str, str | None] = field(default_factory=dict)
    batch: int = DEFAULT_BATCH
    device: str = "cpu"
    dtype: str = "float32"
    keep: bool = False
    ranks: Ranks = field(default_factory=Ranks)

    def calibration(self, row: Row) -> CalibrationConfig:
        return row.calibration(self.samples, self.steps)

    def made(self, row: Row) -> dict[str, Any]:
        """What the model of a row depends on besides its weights, as plain values."""
        facts = {"weights": self.source.kind, "seed": self.seed, "dtype": self.dtype}
        return facts if row.is_float else {**facts, "calibration": self.calibration(row).to_dict()}

    def settings(self, row: Row) -> dict[str, Any]:
        """What a result depends on besides the row, as plain values. A row with a result of these
        is done."""
        counts = {IMAGES: self.count, TEXTS: [suite.count for suite in self.suites]}
        judges = {name: self.judges.get(name) for name in JUDGES[row.kind]}
        return {**self.made(row), "count": counts.get(row.kind, self.edits), **judges}

    def folder(self, row: Row, sources: dict[str, str]) -> Path:
        """Of the model that a row measures, made from these weights. Rows of several tables share
        it; other settings have another one."""
        facts = [self.made(row), sources]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        name = f"{row.assignment.replace('/', '-')}-{digest[:8]}"
        return self.out / self.source.stands_for(row.model) / name
