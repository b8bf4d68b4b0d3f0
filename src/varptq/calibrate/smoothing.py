"""Smoothing: a diagonal on Linear inputs that balances them against the weight.

    d_j = (w_j / a_j)^(1/2), scaled to geometric mean 1

a_j is the root mean square of input channel j less its mean per scale, w_j that of the weight's
column. Why this diagonal: after a rotation all channels of a block share one grid, and rounding
W / d and d u makes an error proportional to sum(w^2 / d^2) sum(d^2 a^2), which is smallest for this
d (Cauchy-Schwarz).
The diagonal is folded into the layer before (quant/folds.py), on a copy of the float model.
Nothing is learned: descent on d under the quantizers was no better (docs/log.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from varptq.calibrate.means import input_moments
from varptq.calibrate.run import Run
from varptq.calibrate.samples import CalibrationSet
from varptq.models.pipeline import Pipeline
from varptq.models.seams import NormFold
from varptq.quant.config import QuantConfig
from varptq.quant.folds import scale_input, scale_values

# A channel further below the average than this does not get a larger factor.
FLOOR = 1e-4
# A few images are enough for root mean squares.
SAMPLES = 64


def smooth(run: Run) -> None:
    """Step: go on with a float model whose inputs are smoothed, if the config asks for any."""
    pipe, count = smoothed(run.pipe, run.config, lambda: run.samples)
    if count:
        run.go_on_with(pipe)


def wants_smoothing(config: QuantConfig, layer: str) -> bool:
    spec = config.linear_for(layer)
    return bool(spec.input and spec.input_transform and spec.input_transform.smooth)


@torch.no_grad()
def smoothed(
    pipe: Pipeline, config: QuantConfig, samples: Callable[[], CalibrationSet]
) -> tuple[Pipeline, int]:
    """A float pipeline that computes the same with smoothed inputs, and how many layers have them.
    The pipeline itself if the config asks for no smoothing; else `samples` is called."""
    names = [name for name in pipe.var.folds() if wants_smoothing(config, name)]
    if not names:
        return pipe, 0
    moments = input_moments(pipe, names, samples().first(SAMPLES))
    var = copy.deepcopy(pipe.var)
    places = var.folds()
    for name in names:
        weight = pipe.var.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        d_C = diagonal(weight, moments[name].spread()).to(weight)
        if isinstance(place := places[name], NormFold):
            scale_input(place, d_C)
        else:
            scale_values(place, d_C)
    return replace(pipe, var=var), len(names)


def diagonal(weight: Tensor, spread_C: Tensor) -> Tensor:
    """(C,) float64 d for a weight (out, C) and the root mean square of its input channels."""
    columns_C = weight.double().square().mean(0).sqrt()
    w_C, a_C = (x.clamp(min=FLOOR * float(x.mean())) for x in (columns_C, spread_C.double()))
    if not (float(w_C.min()) > 0 and float(a_C.min()) > 0):
        return torch.ones_like(w_C)
    log_C = 0.5 * (w_C.log() - a_C.log())
    return (log_C - log_C.mean()).exp()
