"""Seconds of every part of a method on a whole model, measured on its first block.

On a CPU they are seconds of the processor, which other programs on the machine change little.

A part takes `fixed` seconds, and `each` more for every image that it reads or every step. It is
timed at its real shapes, on a few images that the cut model draws and with a few steps. All blocks
cost the same, so what is spent inside of the one block counts once for each that the model has.
What costs the same for every row of a weight is timed on a few of them. Parts of units are in
probe_units.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from varptq.calibrate.clock import BlockClock, Spell, now
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.means import center, input_moments
from varptq.calibrate.methods import Method
from varptq.calibrate.probe_units import (
    EVALUATE,
    LEARN,
    SOLVE,
    Cost,
    Costs,
    UnitProbe,
    saving_apart,
)
from varptq.calibrate.reconstruct import EVALUATED_ROWS, corrects, reconstruct, unit_generator
from varptq.calibrate.record import Recorder
from varptq.calibrate.resample import resample
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.calibrate.smoothing import smooth, wants_smoothing
from varptq.calibrate.theta import choose_theta, measure_attention, search_theta, theta_of
from varptq.calibrate.tune import BATCH, descend, learnable, mean_kl
from varptq.models.convolutions import Convolution, convolutions_of
from varptq.models.generate import DEFAULT_BATCH
from varptq.models.pipeline import Pipeline
from varptq.models.seams import block_of, linears_of
from varptq.models.transformer import Transformer
from varptq.quant.config import QuantConfig
from varptq.quant.convert import converted, replaced, shared_copy
from varptq.quant.describe import bops_account
from varptq.quant.find import quant_linears, set_theta
from varptq.quant.layers import QuantLinear
from varptq.quant.presets import TARGETS

# Seconds that drawing on the one block may take, of which the number of images follows, and how
# often parts are timed that take less than `SHORT` together.
LONG, SHORT, REPEATS = 0.25, 0.15, 2
# Images, where units are solved on all of them, too.
SOLVED_IMAGES = 2
# Passes of the float model that an image goes through in a method, and in one that reconstructs;
# what a pass with quantizers comes to. Roughly, to tell what takes no time at all.
PASSES, SOLVING_PASSES, QUANTIZED = 4, 12, 3
# Rows of a weight that are converted: one of so many, and at least so many numbers.
SHARE, NUMBERS = 8, 2**18
CONVERT, DRAW, SMOOTH, CENTER, THETA = "converting", "drawing", "smoothing", "means", "theta"
RECORD, TUNE, GATE = "recording", "tuning", "measuring what tuning gains"
Weighted = TypeVar("Weighted", nn.Linear, Convolution)


@dataclass
class Probe:
    """Times the parts that `method` has with these settings.

    pipe: the first block of a model, whose modules nobody else uses; depth: how many blocks the
    model has. draws: whether the method reads images. images: how many are read here.
    tuning: bytes that a step of it keeps for its gradients beside weights, once it was timed.
    """

    pipe: Pipeline
    depth: int
    config: QuantConfig
    method: Method
    calibration: CalibrationConfig
    draws: bool
    images: int = field(default=1, init=False)
    tuning: int = field(default=0, init=False)
    _clock: BlockClock = field(init=False)
    _units: UnitProbe = field(init=False)
    _drawn: tuple[CalibrationSet, Spell] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._clock = BlockClock(self.pipe, self.depth)
        self._units = UnitProbe(self._clock, self.calibration)
        # A rule may be for a later block.
        self.config = matching(self.pipe.var, self.config)

    @property
    def saved(self) -> int:
        """Bytes that a step of learning keeps for its gradients, the most of any unit."""
        return self._units.saved

    def first_pass(self) -> float:
        """Seconds of an image through the model. From it follows how many images show what a batch
        takes, yet not for long."""
        most = SOLVED_IMAGES if reconstruct in self.method.steps else DEFAULT_BATCH
        most = min(most, self.calibration.num_samples)
        spell = self._draw()
        # The first call sets things up.
        if spell.spent < SHORT:
            spell = self._draw()
        self.images = max(1, min(most, int(LONG / max(spell.spent, 1e-6))))
        return spell.whole

    def passes(self) -> float:
        """How many of them the whole takes, roughly."""
        settings, images = self.calibration, self.calibration.num_samples
        passes = PASSES * images + QUANTIZED**2 * 4 * settings.tune_steps
        if reconstruct in self.method.steps:
            passes += (SOLVING_PASSES - PASSES) * images + QUANTIZED * min(images, EVALUATED_ROWS)
            if settings.learns:
                passes += QUANTIZED**2 * settings.steps * settings.batch_size / 2
        return passes

    def costs(self) -> Costs:
        """Of all parts of the whole model, the best of a few times where that is quick."""
        found: Costs = {}
        for _ in range(REPEATS):
            before = now(self.pipe)
            again = self._once()
            found = {
                name: Cost(min(c.fixed, again[name].fixed), min(c.each, again[name].each))
                for name, c in (found or again).items()
            }
            if now(self.pipe) - before > SHORT:
                break
        return found

    def _once(self) -> Costs:
        steps, tunes = self.method.steps, self.calibration.tune_steps > 0
        quantized, seconds = self.converted()
        found = {CONVERT: Cost(fixed=seconds)}
        if not self.draws:
            return found
        samples, found[DRAW] = self._samples()
        found |= self._means(samples, found[CONVERT])
        if not ({reconstruct, choose_theta} & set(steps) or tunes):
            return found
        if choose_theta in steps:
            found[THETA] = self._theta(quantized, samples)
        if reconstruct in steps:
            found |= self._reconstructing(quantized, samples)
        if tunes:
            found |= self._tuning(quantized, samples)
        return found

    def converted(self, numbers: int = NUMBERS) -> tuple[Transformer, float]:
        """What takes as long as the quantized block, and the seconds of converting the model: the
        first rows of every weight are converted, `numbers` of its numbers or more, and repeated."""
        var, config, scales = shared_copy(self.pipe.var), self.config, self.pipe.scales
        seconds = 0.0
        for name, linear in linears_of(var).items():
            few, share = first_rows(linear, numbers)
            with self._clock.spell() as spell:
                layer = converted(few, config, name, scales)
            seconds += spell.spent / share * self._times(name)
            if isinstance(layer, QuantLinear):
                parent, _, child = name.rpartition(".")
                setattr(var.get_submodule(parent), child, repeated(layer, linear))
        for name, convolution in convolutions_of(self.pipe.vae).items():
            few, share = first_rows(convolution, numbers)
            with self._clock.spell() as spell:
                converted(few, config, name, scales)
            seconds += spell.spent / share
        return cast(Transformer, replaced(var, config, "", scales)), seconds

    def _times(self, name: str) -> int:
        """How many the model has of this module of the one block."""
        return 1 if block_of(name) is None else self.depth

    def _draw(self) -> Spell:
        few = self.calibration.replace(num_samples=self.images)
        with self._clock.spell() as spell:
            resampled = resample in self.method.steps
            samples = calibration_set(self.pipe, few, seed=0, resampled=resampled)
        self._drawn = samples, spell
        return spell

    def _is_long(self) -> bool:
        """Whether the first pass alone says how long images take."""
        drawn = self._drawn
        return self.images == 1 and drawn is not None and drawn[1].spent >= SHORT

    def _samples(self) -> tuple[CalibrationSet, Cost]:
        """Those that are read."""
        if not self._is_long():
            self._draw()
        assert self._drawn is not None
        samples, spell = self._drawn
        return samples, Cost(each=spell.whole / self.images)

    def _means(self, samples: CalibrationSet, convert: Cost) -> Costs:
        """Of smoothing and of means: a pass each, with the same sums over it."""
        layers, steps = linears_of(self.pipe.var), self.method.steps
        smoothed = {name for name in layers if wants_smoothing(self.config, name)}
        centred = {name for name in layers if wants_means(self.config, name)}
        found: Costs = {}
        # What is smoothed is converted once more.
        if smooth in steps and smoothed:
            found[SMOOTH] = convert
        if center in steps and centred:
            found[CENTER] = Cost()
        if not found:
            return {}
        seen = [n for n in layers if n in smoothed | centred and layers[n].reads != "condition"]
        with self._clock.spell() as spell, torch.no_grad():
            input_moments(self.pipe, seen, samples)
        each = Cost(each=spell.whole / self.images)
        return {name: cost + each for name, cost in found.items()}

    def _theta(self, quantized: Transformer, samples: CalibrationSet) -> Cost:
        settings = self.calibration
        count = min(self.images, settings.theta_samples)
        with self._clock.spell() as measuring:
            masses = measure_attention(self.pipe, quantized, samples, count)
        with self._clock.spell() as looking:
            total = bops_account(self.pipe.var, self.config).total
            found = search_theta(masses, total, settings.budget, settings.theta_grid)
        # Units are learned with the copies in place.
        set_theta(quantized, theta_of(found.to_dict()))
        return Cost(each=(measuring.whole + looking.spent * self.depth) / count)

    def _reconstructing(self, quantized: Transformer, samples: CalibrationSet) -> Costs:
        """Of recording, and of units."""
        recorder = Recorder(self.pipe, quantized.get_submodule, samples, self.calibration)
        follow = quantized if corrects(quantized, self.calibration) else None
        units = recorder.units(list(recorder.costs()), follow=follow)
        found = {name: Cost() for name in (SOLVE, EVALUATE, LEARN)}
        recording = 0.0
        # Half an image, where one takes long.
        rows = 1 if self._is_long() else 2 * self.images
        while True:
            with self._clock.spell() as spell:
                unit = next(units, None)
            recording += spell.whole
            if unit is None:
                return found | {RECORD: Cost(each=recording / self.images)}
            for name, cost in self._units.costs(unit, rows).items():
                found[name] += cost.times(self._times(f"{unit.name}."))

    def _tuning(self, quantized: Transformer, samples: CalibrationSet) -> Costs:
        """Of a step on as many images as a real one has, and of the gate's images."""
        student, images = replace(self.pipe, var=quantized), samples.first(BATCH)
        count, once = len(images.prompts), self.calibration.replace(tune_steps=1)
        with self._clock.spell() as gate:
            mean_kl(self.pipe, student, images, once)
        generator = unit_generator(0, "probe")
        inside, outside = list[int](), list[int]()
        kept = saving_apart(quantized.get_submodule("blocks.0"), inside, outside)
        with learnable(quantized) as parameters, self._clock.spell() as step, kept:
            descend(self.pipe, student, images, parameters, once, generator, None)
        # What is as large as a weight does not grow with the images.
        sizes = {
            4 * layer.in_features * layer.out_features
            for layer in quant_linears(quantized).values()
        }
        block, rest = (sum(n for n in kept if n not in sizes) for kept in (inside, outside))
        self.tuning = (block * self.depth + rest) * BATCH // count
        seconds = step.scaled(gate.share)
        each = seconds * BATCH / count
        return {TUNE: Cost(each=each), GATE: Cost(each=2 * gate.whole / count)}


def first_rows(seam: Weighted, numbers: int) -> tuple[Weighted, float]:
    """A copy of a Linear or a convolution with the first rows of its weight alone, of so many
    numbers at least, and their share."""
    weight, few = seam.weight, shared_copy(seam)
    least = max(1, numbers // weight[0].numel())
    count = min(len(weight), max(len(weight) // SHARE, least))
    few.weight = nn.Parameter(weight[:count], requires_grad=False)
    if isinstance(few, nn.Linear):
        few.out_features = count
    return few, count / len(weight)


def repeated(layer: QuantLinear, linear: nn.Linear) -> QuantLinear:
    """A layer of the first rows of `linear`, as large as that: its rows again and again."""
    outputs, weight = linear.out_features, linear.weight.detach()

    def rows(tensor: Tensor) -> Tensor:
        return tensor.repeat(-(-outputs // len(tensor)), 1)[:outputs]

    layer.out_features, layer.bias, layer.float_weight = outputs, linear.bias, weight
    if layer.weight_bits is None:
        layer.weight = nn.Parameter(weight, requires_grad=False)
    else:
        layer.load_codes(*map(rows, (layer.codes, layer.scale, layer.zero_point)))
    if layer.centred:
        layer.mean_bias = layer.mean_bias.new_zeros(len(layer.means), outputs)
    return layer


def wants_means(config: QuantConfig, layer: str) -> bool:
    """Whether the input of a layer is centred."""
    spec = config.linear_for(layer)
    quantized = spec.weight is not None or spec.input is not None
    return quantized and spec.input_transform is not None and spec.input_transform.center


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
