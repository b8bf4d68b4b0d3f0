"""The frontier of a model from its measurement to calibrated models: `varptq analyze --frontier`.

The float model generates images; on the first half costs are measured, and the second half is what
the configs chosen for the budgets are judged on, calibrated by GPTQ.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field

from varptq.analyze.analyze import AnalysisConfig, images
from varptq.analyze.bench import Bench, sites
from varptq.analyze.frontier import (
    SCHEME,
    UNITS,
    Frontier,
    Point,
    assigned,
    fewest_bits,
    frontier,
    kinds_of,
    rounded_weights,
    unsmoothed,
)
from varptq.analyze.suggest import Prices
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.quantize import quantize
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.calibrate.smoothing import smoothed
from varptq.errors import InputError
from varptq.evaluate.tokens import token_fidelity
from varptq.models.bare import bare, check_layers
from varptq.models.pipeline import Pipeline
from varptq.progress import Progress, silent
from varptq.quant.config import QuantConfig
from varptq.settings import Settings
from varptq.torch_state import plain_torch

# What budgets are measured in: the paper's assignment of quantizers at 4 bits.
UNIT = "w4a4+paper"
RATIOS = (0.8, 1.0, 1.15, 1.5, 2.0)
# Points of the curve that a document keeps, evenly over its length.
KEPT_POINTS = 60


class Limit(Settings):
    """bops, size: the most bit operations and bytes of transformer, in units of w4a4+paper's;
    megabytes: the most bytes, in millions. None is no limit."""

    bops: float | None = Field(default=None, gt=0)
    size: float | None = Field(default=None, gt=0)
    megabytes: float | None = Field(default=None, gt=0)

    @property
    def name(self) -> str:
        """E.g. "bops1.15-size0.8"."""
        parts = [(name, getattr(self, name)) for name in type(self).model_fields]
        return "-".join(f"{name}{value:g}" for name, value in parts if value is not None)

    def on(self, unit: str, base: int) -> float | None:
        """The most of a unit that w4a4+paper has `base` of."""
        ratio = self.bops if unit == "bops" else self.size
        limits = [] if ratio is None else [ratio * base]
        if unit == "bytes" and self.megabytes is not None:
            limits.append(self.megabytes * 1e6)
        return min(limits, default=None)


@dataclass(frozen=True)
class Budgets:
    """`document`: plain JSON values. `configs`: the ones chosen, by the name of their limit."""

    document: dict[str, Any]
    configs: dict[str, QuantConfig]


@plain_torch()
def budgets(
    pipe: Pipeline,
    limits: Sequence[Limit] = tuple(Limit(bops=ratio) for ratio in RATIOS),
    *,
    calibration: CalibrationConfig | None = None,
    settings: AnalysisConfig | None = None,
    prompts: Any = None,
    progress: Progress = silent,
) -> Budgets:
    """The best bits for every kind of layer within each of `limits`.

    calibration: of the weights whose rounding is measured and of the models that are judged; "fast"
    by default. Raises `InputError` for a quantized pipeline and for a limit that nothing meets.
    """
    pipe = bare(pipe).drawing_for(prompts)
    check_layers(pipe, hooks=True)
    settings = settings or AnalysisConfig()
    calibration = calibration or CalibrationConfig.preset("fast")
    started, prices, unit = time.monotonic(), Prices(pipe), QuantConfig.preset(UNIT)
    base = {name: prices.of(unit, name) for name in UNITS}
    check_limits(pipe, prices, limits, base)
    asked, tokens = images(pipe, settings, progress)
    units = [u for u in UNITS if any(limit.on(u, base[u]) is not None for limit in limits)]
    mine = CalibrationSet(asked, tokens[: settings.images])
    found = searched(pipe, mine, calibration, settings, units, progress)
    chosen = {
        limit.name: found.best(**{u: limit.on(u, base[u]) for u in UNITS}) for limit in limits
    }
    configs = {name: found.config(point, f"frontier-{name}") for name, point in chosen.items()}
    judged: dict[str, float] = {}
    for name, config in configs.items():
        result = quantize(pipe, config, method="gptq", calibration=calibration, progress=progress)
        judged[name] = token_fidelity(pipe, result, asked, tokens[settings.images :]).kl
    document = {
        "model": pipe.name,
        "sources": pipe.sources,
        "scheme": SCHEME,
        "unit": UNIT,
        "units": units,
        "base": base,
        "settings": settings.to_dict(),
        "calibration": calibration.to_dict(),
        "torch": torch.__version__,
        "kinds": [kind._asdict() for kind in found.kinds],
        "costs": [[option._asdict() for option in found.costs[kind]] for kind in found.kinds],
        "points": [_said(point, base) for point in _spread(found.points)],
        "chosen": {
            name: _said(point, base) | {"measured": judged[name]} for name, point in chosen.items()
        },
        "seconds": time.monotonic() - started,
    }
    return Budgets(document, configs)


def check_limits(
    pipe: Pipeline, prices: Prices, limits: Sequence[Limit], base: Mapping[str, int]
) -> None:
    """Raise `InputError` for a limit that not even the fewest bits everywhere meet."""
    scheme = QuantConfig.preset(SCHEME)
    kinds = kinds_of(scheme, sites(pipe.var))
    fewest = assigned(scheme, {kind: fewest_bits(kind) for kind in kinds})
    least = {unit: prices.of(fewest, unit) for unit in UNITS}
    for limit in limits:
        for unit in UNITS:
            most = limit.on(unit, base[unit])
            if most is not None and most < least[unit]:
                raise InputError(
                    f"budget {limit.name}: {most / base[unit]:.3g} times the {unit} of {UNIT}, "
                    f"the fewest bits take {least[unit] / base[unit]:.3f} times; give more"
                )


def searched(
    pipe: Pipeline,
    samples: CalibrationSet,
    calibration: CalibrationConfig,
    settings: AnalysisConfig,
    units: Sequence[str],
    progress: Progress,
) -> Frontier:
    """The frontier of a float model, measured on `samples`, for the scheme's configs."""
    scheme = QuantConfig.preset(SCHEME)
    own = calibration_set(pipe, calibration, seed=0, resampled=False, progress=progress)
    smooth, _ = smoothed(pipe, scheme, lambda: own)
    rounded = rounded_weights(smooth, scheme, calibration, progress=progress)
    sampling = pipe.filled(settings.sampling)
    bench = Bench(smooth, samples.prompts, samples.tokens, sampling=sampling)
    found = frontier(bench, unsmoothed(scheme), rounded, units=units, progress=progress)
    return replace(found, scheme=scheme)


def _said(point: Point, base: Mapping[str, int]) -> dict[str, Any]:
    return {
        "bits": [list(bits) for bits in point.bits],
        "kl": point.kl,
        "bops": point.bops / base["bops"],
        "bytes": point.bytes,
    }


def _spread(points: Sequence[Point]) -> list[Point]:
    if len(points) <= KEPT_POINTS:
        return list(points)
    last = len(points) - 1
    numbers = {round(i * last / (KEPT_POINTS - 1)) for i in range(KEPT_POINTS)}
    return [points[i] for i in sorted(numbers)]
