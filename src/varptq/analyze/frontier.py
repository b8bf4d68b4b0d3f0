"""The frontier: for a budget of bit operations or bytes, the best bits for every kind of tensor.

A kind is one layer of all blocks (blocks.*.attn.proj), or one attention. What its tensors cost is
measured in the float model, one kind and one width at a time:

    inputs, q and k, v   KL with these alone at b bits
    weights              KL with these alone at b bits, rounded by GPTQ, and inputs at 8, less the
                         KL of those inputs

KLs of independent small errors add up, and so do bit operations (a Linear's are its products times
both widths) and bytes. So the cheapest assignment at every price is found exactly, by joining kinds
one after another and keeping what nothing else beats. Rounded to nearest, weights of 2 and 3 bits
would look several times as bad as they are. The sum is a prediction: calibrated models say what it
is worth (`checked`).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from torch import Tensor

from varptq.analyze.bench import NOTHING, Bench, Site, sites, spec_of, stripped
from varptq.analyze.suggest import Prices
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.quantize import quantize
from varptq.calibrate.run import rounded_of
from varptq.errors import InputError
from varptq.models.pipeline import Pipeline
from varptq.progress import Progress, silent
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.find import quant_linears
from varptq.quant.presets import group_free
from varptq.quant.quantizers import ATTENTION_OPERANDS, LINEAR_OPERANDS

STAGE = "frontier"
# What every other choice is made from: its transforms, probabilities, and what it keeps at 8 bits.
SCHEME = "w4a4+codebook"
WEIGHTS, INPUTS, ATTENTION = (2, 3, 4, 8), (4, 5, 6, 8), (4, 5, 6, 8)
KEPT = 8
UNITS = ("bops", "bytes")
Bits = tuple[int, int]


class Kind(NamedTuple):
    """Layers that get the same bits. `layers` is a pattern as rules have it."""

    layers: str
    attention: bool

    @property
    def operands(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the two widths of an `Option` are the widths of."""
        return (("query", "key"), ("value",)) if self.attention else (("weight",), ("input",))


class Option(NamedTuple):
    """Widths of one kind, the KL it adds, and what it adds to the prices of the scheme."""

    bits: Bits
    kl: float
    bops: int
    bytes: int


class Point(NamedTuple):
    """An assignment: widths by kind, the KL they add up to, and its prices."""

    bits: tuple[Bits, ...]
    kl: float
    bops: int
    bytes: int


@dataclass(frozen=True)
class Frontier:
    """Points that none beats in KL, bit operations and bytes, by rising KL. `scheme` with all kinds
    at the widths of a point is its config."""

    kinds: tuple[Kind, ...]
    scheme: QuantConfig
    points: tuple[Point, ...]
    costs: Mapping[Kind, Sequence[Option]] = field(repr=False)

    def best(self, **limits: float | None) -> Point:
        """The point of least KL within limits of bops and bytes. Raises `InputError` where there is
        none."""
        given = {unit: limit for unit, limit in limits.items() if limit is not None}
        for point in self.points:
            if all(getattr(point, unit) <= limit for unit, limit in given.items()):
                return point
        least = {unit: min(getattr(point, unit) for point in self.points) for unit in given}
        said = (f"{limit:.4g} {u} (least {least[u]:.4g})" for u, limit in given.items())
        raise InputError(f"budget: no choice of bits fits {' and '.join(said)}; give more")

    def config(self, point: Point, name: str) -> QuantConfig:
        return assigned(self.scheme, dict(zip(self.kinds, point.bits, strict=True))).replace(
            name=name
        )


def kinds_of(config: QuantConfig, every: Iterable[Site]) -> list[Kind]:
    """Kinds in model order, without those that `config` keeps at 8 bits on both sides."""
    found: dict[Kind, None] = {}
    for site in every:
        attention = site.operand in ATTENTION_OPERANDS
        rest = ATTENTION_OPERANDS if attention else LINEAR_OPERANDS
        specs = [spec_of(config, site._replace(operand=name)) for name in rest]
        if all(spec is None or spec.num_bits == KEPT for spec in specs):
            continue
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", site.layer)
        found[Kind(pattern, attention)] = None
    return list(found)


def fewest_bits(kind: Kind) -> Bits:
    return (ATTENTION[0], ATTENTION[0]) if kind.attention else (WEIGHTS[0], INPUTS[0])


def assigned(config: QuantConfig, bits: Mapping[Kind, Bits]) -> QuantConfig:
    """`config` with these widths."""
    for kind, widths in bits.items():
        config = with_widths(config, kind, dict(zip(kind.operands, widths, strict=True)))
    return config


def with_widths(
    config: QuantConfig, kind: Kind, widths: Mapping[tuple[str, ...], int]
) -> QuantConfig:
    """`config` with one more rule, for the operands of a kind."""
    specs = {n: group_free(bits, n) for names, bits in widths.items() for n in names}
    if not kind.attention:
        return config.with_rules(LayerRule(targets=kind.layers).replace(**specs))
    attention = (config.attention_for(kind.layers) or NOTHING).replace(**specs)
    return config.with_rules(LayerRule(targets=kind.layers, attention=attention))


def frontier(
    bench: Bench,
    config: QuantConfig,
    rounded: Mapping[int, Mapping[str, Tensor]],
    *,
    units: Sequence[str] = UNITS,
    progress: Progress = silent,
) -> Frontier:
    """All points for the kinds of `config` that count in the prices `units`. rounded: codes and
    scales of all layers by the width of the weights (`rounded_weights`), of the bench's model."""
    kinds = kinds_of(config, sites(bench.source.var))
    costs = measured_costs(bench, config, kinds, rounded, progress)
    prices = Prices(bench.source)
    base = assigned(config, {kind: (KEPT, KEPT) for kind in kinds})
    zero = (prices.bops(base), prices.bytes(base))
    options = {
        kind: [
            Option(
                bits,
                costs[kind][0][bits[0]] + costs[kind][1][bits[1]],
                prices.bops(assigned(base, {kind: bits})) - zero[0],
                prices.bytes(assigned(base, {kind: bits})) - zero[1],
            )
            for bits in product(*costs[kind])
        ]
        for kind in kinds
    }
    points = joined([options[kind] for kind in kinds], Point((), 0.0, *zero), units)
    return Frontier(tuple(kinds), config, tuple(points), options)


def measured_costs(
    bench: Bench,
    config: QuantConfig,
    kinds: Sequence[Kind],
    rounded: Mapping[int, Mapping[str, Tensor]],
    progress: Progress = silent,
) -> dict[Kind, tuple[dict[int, float], dict[int, float]]]:
    """KL by width of what each of a kind's two widths is of."""
    floats, found = stripped(config), dict[Kind, tuple[dict[int, float], dict[int, float]]]()
    for done, kind in enumerate(kinds):
        progress(STAGE, done, len(kinds), kind.layers)
        first, second = kind.operands
        if kind.attention:
            sides = [
                {bits: bench.kl(with_widths(floats, kind, {names: bits})).kl for bits in ATTENTION}
                for names in (first, second)
            ]
            found[kind] = (sides[0], sides[1])
            continue
        inputs = {bits: bench.kl(with_widths(floats, kind, {second: bits})).kl for bits in INPUTS}
        weights: dict[int, float] = {}
        for bits in WEIGHTS:
            both = with_widths(floats, kind, {first: bits, second: KEPT})
            weights[bits] = max(0.0, bench.kl(both, rounded=rounded[bits]).kl - inputs[KEPT])
        found[kind] = (weights, inputs)
    progress(STAGE, len(kinds), len(kinds))
    return found


def rounded_weights(
    pipe: Pipeline,
    config: QuantConfig,
    calibration: CalibrationConfig,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[int, dict[str, Tensor]]:
    """Codes and scales of every layer by width of the weights, inputs at 8 bits and attention in
    float. `pipe` is smoothed already."""
    found: dict[int, dict[str, Tensor]] = {}
    kinds = [k for k in kinds_of(config, sites(pipe.var)) if not k.attention]
    for bits in WEIGHTS:
        narrow = assigned(config, {kind: (bits, KEPT) for kind in kinds})
        narrow = narrow.replace(attention=None, name=f"w{bits}a{KEPT}")
        result = quantize(
            pipe,
            unsmoothed(narrow),
            method="gptq",
            calibration=calibration,
            seed=seed,
            progress=progress,
        )
        found[bits] = rounded_of(quant_linears(result.var).values())
    return found


def unsmoothed(config: QuantConfig) -> QuantConfig:
    """For a model whose inputs are smoothed already."""
    how = config.linear.input_transform
    if how is None:
        return config
    linear = config.linear.replace(input_transform=how.replace(smooth=False))
    return config.replace(linear=linear)


def joined(
    kinds: Sequence[Sequence[Option]], start: Point, units: Sequence[str] = UNITS
) -> list[Point]:
    """The points that no assignment of one option to each kind beats, by rising KL."""
    points = [start]
    for options in kinds:
        together = (
            Point((*p.bits, o.bits), p.kl + o.kl, p.bops + o.bops, p.bytes + o.bytes)
            for p, o in product(points, options)
        )
        points = unbeaten(together, units)
    return points


def unbeaten(points: Iterable[Point], units: Sequence[str] = UNITS) -> list[Point]:
    """Those that no other is at least as good as in KL and in the prices `units`; the first of
    equals. By rising KL."""

    def prices(point: Point) -> tuple[int, int]:
        return (point.bops * ("bops" in units), point.bytes * ("bytes" in units))

    kept: list[Point] = []
    # Prices of what is kept that no other is below in both: the first rises, the second falls.
    firsts: list[int] = []
    seconds: list[int] = []
    for point in sorted(points, key=lambda p: (p.kl, *prices(p))):
        first, second = prices(point)
        at = bisect_right(firsts, first)
        if at and seconds[at - 1] <= second:
            continue
        kept.append(point)
        end = at
        while end < len(firsts) and seconds[end] >= second:
            end += 1
        start = at - 1 if at and firsts[at - 1] == first else at
        firsts[start:end], seconds[start:end] = [first], [second]
    return kept
