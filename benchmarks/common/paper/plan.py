"""What the rows will take on this machine: one step of everything, timed on random weights.

    row = calibration + images * (drawing + decoding) + images * features

A model is timed with one and with two blocks of its real shape; the line through both gives the
others, as all blocks cost the same. A unit is trained for a few steps, or solved from one image.
Where attention over all tokens would not fit many times into
memory, a smaller size is timed and multiplied by the multiply-adds. Nothing is kept. Processes
share the work, and each times it beside the others, as it will be.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

import varptq
from benchmarks.common.calibration_steps import random_samples
from benchmarks.common.paper.job import SETTINGS, Job
from benchmarks.common.paper.models import Shape
from benchmarks.common.paper.protocol import images_bytes, layout_of
from benchmarks.common.paper.rows import EDITS, FLOAT, IMAGES, PRESET, Row
from benchmarks.common.runtime_variants import simulated
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.reconstruct import (
    reconstruct_unit,
    start,
    train,
    unit_generator,
    unit_layers,
)
from varptq.calibrate.record import Recorder, Unit
from varptq.evaluate.features import FeatureNetwork, InceptionFeatures
from varptq.evaluate.networks.inception import Inception
from varptq.models.generate import generate
from varptq.models.memory import free_bytes
from varptq.models.pipeline import Pipeline
from varptq.models.presets import preset
from varptq.progress import Progress
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert

# Steps of a unit, the first of which sets things up; calls shorter than this are repeated.
TIMED_STEPS, SHORT = 3, 2.0
# Copies of the attention scores that a step has, and the share of memory they may take.
SCORE_COPIES, SCORE_SHARE = 6, 1 / 8
# A unit is passed once per layer, two at most, and once more to add up the moments; smoothing and
# centring read the samples once each.
PASSES_OF_UNITS, PASSES_OF_PRESETS = 3, 3
ROWS = 2
Seconds = dict[str, float]
DRAW, DECODE, RECORD, STEP, SOLVE, STORED = "draw", "decode", "record", "step", "solve", "bytes"


class Parts(NamedTuple):
    """Hours of a row, and bytes on disk: what it leaves, and its images."""

    calibration: float
    images: float
    measuring: float
    kept: float
    samples: float

    @property
    def hours(self) -> float:
        return self.calibration + self.images + self.measuring


def kind_of(row: Row) -> str:
    """Which quantizers a row has; the same ones take the same time."""
    if row.is_float:
        return FLOAT
    return PRESET if row.method == PRESET else "paper"


@dataclass
class Planner:
    """`row` for one row after the other: what an earlier one made is there for the next. What it
    adds up is timed when it is first asked for, or by `time`."""

    job: Job
    shape: Shape
    network: FeatureNetwork | None
    notes: list[str] = field(default_factory=list)
    _timed: dict[tuple[str, str], Seconds] = field(default_factory=dict)
    _features: dict[tuple[int, int], float] = field(default_factory=dict)
    _made: set[str] = field(default_factory=set)
    _layouts: dict[str, Pipeline] = field(default_factory=dict)

    def time(self, rows: Sequence[Row], progress: Progress) -> None:
        """All that these rows need."""
        floats = [Row(row.table, row.model, FLOAT) for row in rows]
        needed = {(row.model, kind_of(row)): row for row in (*rows, *floats)}
        for index, row in enumerate(needed.values()):
            progress("time steps", index, len(needed), row.name)
            self.timed(row)
        progress("time steps", len(needed), len(needed))

    def row(self, row: Row) -> Parts:
        """What it adds: nothing, where its measurement stands in a table before."""
        job = self.job
        if not self._first(row.key):
            return Parts(0.0, 0.0, 0.0, 0.0, 0.0)
        if row.model not in self._layouts:
            self._layouts[row.model] = layout_of(job, row.model)
        layout = self._layouts[row.model]
        own = self.timed(row)
        kept = own[STORED] if self._first(f"{row.model}/{row.assignment}") else 0.0
        calibration = 0.0 if row.is_float or not kept else self._calibration(row, own)
        image, samples = own[DRAW] + own[DECODE], float(images_bytes(job, row, layout))
        images, measuring = 0.0, 0.0
        if row.kind == IMAGES:
            images = job.count * image
            per_image = self._seconds_of_features(layout.vae.image_size)
            measuring = job.count * per_image * (1 if row.is_float else 2)
            floats = Row(row.table, row.model, FLOAT)
            if not row.is_float and self._first(floats.key):
                beside = self.timed(floats)
                images += job.count * (beside[DRAW] + beside[DECODE])
        elif row.kind in EDITS:
            # The encoder costs about what the decoder does.
            images = job.edits * (image + own[DECODE])
        else:
            images = sum(suite.count for suite in job.suites) * image
        ranks = job.ranks.size
        return Parts(
            calibration / 3600, images / ranks / 3600, measuring / ranks / 3600, kept, samples
        )

    def _first(self, what: str) -> bool:
        """Whether no row before needed it."""
        fresh = what not in self._made
        self._made.add(what)
        return fresh

    def _calibration(self, row: Row, own: Seconds) -> float:
        config, ranks = self.job.calibration(row), self.job.ranks.size
        count = config.num_samples
        drawn = count * self.timed(Row(row.table, row.model, FLOAT))[DRAW]
        if row.method == PRESET:
            units = own[SOLVE] + PASSES_OF_UNITS * own[RECORD] * count
            return (drawn + units) / ranks + PASSES_OF_PRESETS * own[RECORD] * count
        theta = 2 * config.theta_samples * own[DRAW] if "sas" in row.method else 0.0
        return (drawn + config.steps * own[STEP]) / ranks + own[RECORD] * count + theta

    def timed(self, row: Row) -> Seconds:
        """Of the whole model that the row measures; widths do not differ, kinds of quantizers
        do."""
        kind = kind_of(row)
        if (row.model, kind) not in self._timed:
            arch, _ = self.job.source.archs(preset(row.model))
            one, two = (self._at(row, blocks) for blocks in (1, 2))
            found = {
                name: value + (arch.depth - 1) * max(0.0, two[name] - value)
                for name, value in one.items()
            }
            if not row.is_float:
                found |= self._rounding(row, arch.depth)
            self._timed[row.model, kind] = found
        return self._timed[row.model, kind]

    def _at(self, row: Row, blocks: int) -> Seconds:
        """Of drawing, decoding and recording an image with so many blocks, and bytes of the
        artifact."""
        whole, pipe = self._models(row, blocks)
        ratio, area = _costs(whole) / _costs(pipe), _area(whole) / _area(pipe)
        made, stored = (pipe, 0.0) if row.is_float else self._artifact(row, pipe)
        drawing, decoding = self._drawing(made)
        recorder = _recorder(pipe)
        record = self._seconds(lambda: list(recorder.units()))
        return {
            **{DRAW: ratio * drawing, DECODE: area * decoding},
            **{RECORD: ratio * record, STORED: stored},
        }

    def _models(self, row: Row, blocks: int) -> tuple[Pipeline, Pipeline]:
        """The model at its own size, and at the one that is timed."""
        whole = dataclasses.replace(self.shape, blocks=blocks).build(row.model)
        whole = whole.to(device=self.job.device, dtype=self.job.dtype)
        return whole, self._small_enough(whole)

    def _artifact(self, row: Row, pipe: Pipeline) -> tuple[Pipeline, float]:
        """The model of a row on its runtime, rounded to nearest, and bytes on disk."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / "model"
            varptq.save(simulated(pipe, row.preset), path)
            placement = {"device": self.job.device, "dtype": self.job.dtype}
            made = varptq.load(path, runtime=row.runtime, **placement)
            made.encoder = pipe.encoder
            return made, float(sum(file.stat().st_size for file in path.iterdir()))

    def _small_enough(self, pipe: Pipeline) -> Pipeline:
        """The model at the largest of its sizes at which attention is small in memory."""
        room, sized = free_bytes(pipe.device), pipe
        smaller = reversed([size for size in pipe.var.sizes() if ":" not in size])
        while room is not None and _scores(sized) > SCORE_SHARE * room:
            if (name := next(smaller, None)) is None:
                break
            sized = pipe.sized(name)
        height, width = sized.vae.image_size
        note = f"{pipe.name}: timed at {height} x {width}, multiplied by multiply-adds and pixels"
        if sized is not pipe and note not in self.notes:
            self.notes.append(note)
        return sized

    def _drawing(self, pipe: Pipeline) -> tuple[float, float]:
        """Seconds of the tokens of an image, and of its pixels."""
        count = 1 if pipe.device.type == "cpu" else self.job.batch
        pool = pipe.pool()
        asked = pool[torch.arange(count) % len(pool)]
        settings = {} if pipe.var.READS_TEXTS else SETTINGS.to_dict()
        maps = pipe.vae.zeros(count)

        def decode() -> None:
            with torch.inference_mode():
                pipe.vae.decode_features(maps)

        drawing = self._seconds(lambda: generate(pipe, asked, decode=False, **settings))
        return drawing / count, self._seconds(decode) / count

    def _rounding(self, row: Row, depth: int) -> Seconds:
        """Of a step of all units, or of solving them, by the units of one block."""
        whole, pipe = self._models(row, 1)
        calibration = self.job.calibration(row)
        # One image has two rows. Equations are as many at every size.
        more = calibration.batch_size / ROWS * _costs(whole) / _costs(pipe)
        name, call = (SOLVE, self._solved) if row.method == PRESET else (STEP, self._stepped)
        total = 0.0
        for unit in _recorder(pipe, QuantConfig.preset(row.preset)).units():
            if unit_layers(unit):
                seconds = call(unit, calibration)
                seconds *= more if name == STEP and not unit.sees_vectors else 1.0
                total += seconds * (depth if unit.name.startswith("blocks.") else 1)
        return {name: total}

    def _stepped(self, unit: Unit, calibration: CalibrationConfig) -> float:
        stamps: list[float] = []
        train(
            unit,
            [start(layer, calibration) for layer in unit_layers(unit)],
            calibration.replace(steps=TIMED_STEPS),
            unit_generator(0, unit.name),
            lambda *_: stamps.append(self._now()),
        )
        return min(b - a for a, b in pairwise(stamps))

    def _solved(self, unit: Unit, calibration: CalibrationConfig) -> float:
        before = self._now()
        reconstruct_unit(unit, calibration.replace(rounding="gptq"), 0)
        return self._now() - before

    def _seconds_of_features(self, size: tuple[int, int]) -> float:
        """Of an image."""
        if size not in self._features:
            network = self.network or self._inception()
            count = 1 if self.job.device == "cpu" else self.job.batch
            pixels = torch.zeros(count, *size, 3, dtype=torch.uint8)
            self._features[size] = self._seconds(lambda: network(pixels)) / count
        return self._features[size]

    def _inception(self) -> FeatureNetwork:
        """Of no weights, which takes as long."""
        with torch.random.fork_rng(devices=[]):
            network = Inception(with_fc=True).eval().requires_grad_(False)
        network.fold()
        return InceptionFeatures(network, self.job.device, legacy_resize=True)

    def _seconds(self, call: Callable[[], object]) -> float:
        """Of a call that is not the first, where that is short."""
        found: list[float] = []
        while len(found) < 1 or (len(found) < 2 and found[0] < SHORT):
            before = self._now()
            call()
            found.append(self._now() - before)
        return min(found)

    def _now(self) -> float:
        if torch.device(self.job.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _recorder(pipe: Pipeline, config: QuantConfig | None = None) -> Recorder:
    """Over one image of random tokens; its units are those of the converted model, if any."""
    model = pipe.var if config is None else convert(pipe.var, config)
    settings = CalibrationConfig(num_samples=1)
    return Recorder(pipe, model.get_submodule, random_samples(pipe, 1), settings)


def _costs(pipe: Pipeline) -> float:
    """Multiply-adds of the transformer for an image."""
    return sum(_recorder(pipe).costs().values())


def _scores(pipe: Pipeline) -> int:
    """Bytes of the attention scores of a step on one image."""
    return ROWS * pipe.var.num_heads * pipe.scales.num_tokens**2 * 4 * SCORE_COPIES


def _area(pipe: Pipeline) -> int:
    height, width = pipe.vae.image_size
    return height * width
