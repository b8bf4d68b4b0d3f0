"""Seconds of every part of a method, measured on the first block or two of a model.

On a CPU they are seconds of the processor, which other programs on the machine change little.

A part takes `fixed` seconds, and `each` more for every image that it reads or every step. It is
timed at its real shapes, on a few images that the cut model draws and with a few steps. All blocks
cost the same, so the line through one and two blocks leads to all of them (forecast.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import Tensor

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.means import center
from varptq.calibrate.methods import Method
from varptq.calibrate.reconstruct import (
    EVALUATED_ROWS,
    corrects,
    evaluate,
    reconstruct,
    start,
    train,
    unit_generator,
    unit_layers,
)
from varptq.calibrate.record import Recorder, Unit
from varptq.calibrate.resample import resample
from varptq.calibrate.run import Run
from varptq.calibrate.samples import calibration_set
from varptq.calibrate.smoothing import smooth, smoothed
from varptq.calibrate.solve import cross_moments, input_moments, solve
from varptq.calibrate.theta import choose_theta
from varptq.calibrate.tune import descend, learnable, mean_kl
from varptq.models.generate import DEFAULT_BATCH
from varptq.models.pipeline import Pipeline
from varptq.models.transformer import Transformer
from varptq.quant.config import QuantConfig
from varptq.quant.find import quant_linears
from varptq.quant.presets import TARGETS

# Seconds that drawing may take, of which the number of images follows, and how often parts are
# timed that take less than `SHORT` together.
LONG, SHORT, REPEATS = 0.25, 0.15, 2
# Images, where units are solved on all of them, too.
SOLVED_IMAGES = 2
# Passes of the float model that an image goes through in a method, and in one that reconstructs;
# what a pass with quantizers comes to. Roughly, to tell what takes no time at all.
PASSES, SOLVING_PASSES, QUANTIZED = 4, 12, 3
# Steps of learning that are timed; the first sets things up.
STEPS = 3


@dataclass(frozen=True)
class Cost:
    """Seconds: `fixed`, and `each` for an image or a step."""

    fixed: float = 0.0
    each: float = 0.0

    def of(self, count: float) -> float:
        return self.fixed + self.each * count

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.fixed + other.fixed, self.each + other.each)

    def beyond(self, other: Cost) -> Cost:
        """What is more than in `other`, nothing where it is less."""
        return Cost(max(0.0, self.fixed - other.fixed), max(0.0, self.each - other.each))

    def times(self, factor: float) -> Cost:
        return Cost(self.fixed * factor, self.each * factor)


Costs = dict[str, Cost]
CONVERT, DRAW, SMOOTH, CENTER, THETA = "converting", "drawing", "smoothing", "means", "theta"
RECORD, SOLVE, EVALUATE, LEARN = "recording", "solving", "comparing", "learning"
TUNE, GATE = "tuning", "measuring what tuning gains"
# Parts of units, and which of them are counted for all units of all blocks together.
OF_UNITS = (SOLVE, EVALUATE, LEARN)


@dataclass
class Probe:
    """Times the parts that `method` has with these settings.

    draws: whether it reads images. images: how many are read. saved: bytes that a step of learning
    keeps for its gradients, the most of any unit. in_block: what the units of one block take.
    """

    pipe: Pipeline
    config: QuantConfig
    method: Method
    calibration: CalibrationConfig
    draws: bool
    images: int = 1
    saved: int = 0
    in_block: Costs = field(default_factory=dict)

    def costs(self, blocks: int) -> Costs:
        """Of the model with so many blocks, the best of a few times where that is quick. Units are
        timed on one block alone; theirs are in `in_block`, those outside of blocks among the
        result."""
        found: Costs = {}
        for _ in range(REPEATS):
            before = now(self.pipe)
            again = self._once(blocks)
            if not found:
                found = again
            found = {
                name: Cost(min(c.fixed, again[name].fixed), min(c.each, again[name].each))
                for name, c in found.items()
            }
            if now(self.pipe) - before > SHORT:
                break
        return found

    def first_pass(self) -> float:
        """Seconds of an image through one block. From it follows how many images show what a batch
        takes, yet not for long."""
        most = SOLVED_IMAGES if reconstruct in self.method.steps else DEFAULT_BATCH
        most = min(most, self.calibration.num_samples)
        cut, one = self._cut(1), self.calibration.replace(num_samples=1)

        def draw() -> float:
            return self._timed(lambda: calibration_set(cut, one, seed=0, resampled=False))

        # The first call sets things up.
        seconds = draw()
        if seconds < SHORT:
            seconds = draw()
        self.images = max(1, min(most, int(LONG / max(seconds, 1e-6))))
        return seconds

    def passes(self) -> float:
        """How many of them the whole takes, roughly, for each block."""
        settings, images = self.calibration, self.calibration.num_samples
        passes = PASSES * images + QUANTIZED**2 * 4 * settings.tune_steps
        if reconstruct in self.method.steps:
            passes += (SOLVING_PASSES - PASSES) * images + QUANTIZED * min(images, EVALUATED_ROWS)
            if settings.learns:
                passes += QUANTIZED**2 * settings.steps * settings.batch_size / 2
        return passes

    def _cut(self, blocks: int) -> Pipeline:
        return replace(self.pipe, var=self.pipe.var.first_blocks(blocks))

    def _run(self, blocks: int) -> Run:
        """The cut model's own `Run`."""
        few = self.calibration.replace(
            num_samples=self.images,
            theta_samples=min(self.images, self.calibration.theta_samples),
        )
        cut = self._cut(blocks)
        return Run(cut, matching(cut.var, self.config), few)

    def _once(self, blocks: int) -> Costs:
        steps, count = self.method.steps, self.images
        before = now(self.pipe)
        run = self._run(blocks)
        found = {CONVERT: Cost(fixed=now(self.pipe) - before)}
        centred = any(m.centred for m in quant_linears(run.quantized).values())
        if not self.draws:
            return found
        if resample in steps:
            run.resample()
        found[DRAW] = Cost(each=self._timed(lambda: run.samples) / count)
        if smooth in steps:
            # The step converts once more, which need not be timed twice.
            before = now(self.pipe)
            run.pipe, layers = smoothed(run.pipe, run.config, lambda: run.samples)
            if layers:
                found[SMOOTH] = Cost(found[CONVERT].fixed, (now(self.pipe) - before) / count)
        if centred and center in steps:
            found[CENTER] = Cost(each=self._timed(lambda: center(run)) / count)
        if choose_theta in steps:
            seconds = self._timed(lambda: choose_theta(run))
            found[THETA] = Cost(each=seconds / run.calibration.theta_samples)
        if reconstruct in steps:
            found |= self._units(run, blocks)
        if self.calibration.tune_steps:
            found |= self._tuning(run)
        return found

    def _units(self, run: Run, blocks: int) -> Costs:
        """Of recording, and on one block of its units."""
        recorder = Recorder(run.pipe, run.unit, run.samples, run.calibration)
        follow = run.quantized if corrects(run.quantized, run.calibration) else None
        names, inside = list(recorder.costs()), 0.0
        total = {name: Cost() for name in OF_UNITS}
        own = dict(total)
        before = now(self.pipe)
        for unit in recorder.units(names, follow=follow):
            if blocks == 1:
                began = now(self.pipe)
                kept = own if unit.name.startswith("blocks.") else total
                for name, cost in self._unit(unit).items():
                    kept[name] += cost
                inside += now(self.pipe) - began
        seconds = max(0.0, now(self.pipe) - before - inside)
        record = {RECORD: Cost(each=seconds / self.images)}
        if blocks != 1:
            return record
        known = self.in_block or own
        self.in_block = {
            name: Cost(min(known[name].fixed, c.fixed), min(known[name].each, c.each))
            for name, c in own.items()
        }
        return record | total

    def _unit(self, unit: Unit) -> Costs:
        """Of choosing the rounding of one unit. What reads conditions has all its rows here."""
        layers, settings = unit_layers(unit), self.calibration
        if not layers or not (settings.learns or settings.solves):
            return {}
        rows = torch.arange(len(unit.inputs), dtype=torch.int64, device="cpu")
        vectors = unit.sees_vectors
        few = rows[: EVALUATED_ROWS if vectors else 2 * self.images]
        compared = min(EVALUATED_ROWS, len(rows) if vectors else 2 * settings.num_samples)
        times = 1 + settings.solves + 2 * settings.learns
        seconds = self._timed(lambda: evaluate(unit, few))
        found = {EVALUATE: Cost(fixed=times * seconds * compared / len(few))}
        if settings.solves:
            found[SOLVE] = self._solving(unit, vectors)
        if settings.learns:
            found[LEARN] = Cost(each=self._step(unit))
        return found

    def _solving(self, unit: Unit, vectors: bool) -> Cost:
        def moments() -> None:
            for layer in unit_layers(unit):
                input_moments(unit, layer)
                if unit.behind is not None and self.calibration.corrects(layer.spec):
                    cross_moments(unit, layer)

        read = self._timed(moments)
        whole = self._timed(lambda: solve(unit, unit_layers(unit), self.calibration))
        fixed = max(0.0, whole - read)
        return Cost(whole) if vectors else Cost(fixed, read / self.images)

    def _step(self, unit: Unit) -> float:
        stamps: list[float] = []
        layers, settings = unit_layers(unit), self.calibration.replace(steps=STEPS, patience=None)
        roundings = [start(layer, settings) for layer in layers]
        with self._saving():
            train(
                unit,
                roundings,
                settings,
                unit_generator(0, unit.name),
                lambda *_: stamps.append(now(self.pipe)),
            )
        for layer in layers:
            layer.finish_rounding()
        batch = min(settings.batch_size, len(unit.inputs))
        more = 1.0 if unit.sees_vectors else settings.batch_size / batch
        return more * min(b - a for a, b in pairwise(stamps))

    def _tuning(self, run: Run) -> Costs:
        """Of a step on as many images as a real one has, and of the gate's images."""
        student = replace(run.pipe, var=run.quantized)
        images = run.samples.first(4)
        count = len(images.prompts)
        once = run.calibration.replace(tune_steps=1)
        gate = self._timed(lambda: mean_kl(run.pipe, student, images, once))
        generator = unit_generator(0, "probe")
        with learnable(run.quantized) as parameters:
            step = self._timed(
                lambda: descend(run.pipe, student, images, parameters, once, generator, None)
            )
        return {TUNE: Cost(each=step * 4 / count), GATE: Cost(each=2 * gate / count)}

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Listens to what autograd saves."""
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self.saved = max(self.saved, sum(seen.values()) // STEPS)

    def _timed(self, call: Callable[[], object]) -> float:
        before = now(self.pipe)
        call()
        return now(self.pipe) - before


def matching(var: Transformer, config: QuantConfig) -> QuantConfig:
    """`config` without the rules for layers that are not in this cut model."""
    names = [name for name, _ in var.named_modules()]
    rules = (
        rule
        for rule in config.rules
        if rule.targets in TARGETS
        or "autoencoder" in rule.model_fields_set
        or any(fnmatchcase(name, rule.targets) for name in names)
    )
    return config.replace(rules=tuple(rules))


def now(pipe: Pipeline) -> float:
    """Seconds of the processor, or of the clock where a GPU computes."""
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
        return time.perf_counter()
    return time.process_time()
