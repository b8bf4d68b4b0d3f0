"""Smoothing: a diagonal on Linear inputs that balances them against the weight.

    d_j = (w_j / a_j)^(1/2), scaled to geometric mean 1

a_j is the root mean square of input channel j less its mean per scale, w_j that of the weight's
column. Why this diagonal: after a rotation all channels of a block share one grid, and rounding
W / d and d u makes an error proportional to sum(w^2 / d^2) sum(d^2 a^2), which is smallest for this
d (Cauchy-Schwarz).
The diagonal is folded into the layer before (quant/folds.py), on a copy of the float model; layers
that share what is before them share the diagonal, with the mean of their w_j^2.
Nothing is learned: descent on d under the quantizers was no better (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from varptq.calibrate.means import input_moments
from varptq.calibrate.run import Run, folded
from varptq.calibrate.samples import CalibrationSet
from varptq.models.pipeline import Pipeline
from varptq.models.seams import consumers_of
from varptq.quant.config import QuantConfig
from varptq.quant.folds import places

# A channel further below the average than this does not get a larger factor.
FLOOR = 1e-4
# A few images are enough for root mean squares.
SAMPLES = 64


def smooth(run: Run) -> None:
    """Step: go on with a float model whose inputs are smoothed, if the config asks for any."""
    found = diagonals(run.pipe, run.config, lambda: run.samples, run.float_weight)
    if found:
        run.fold(found)


def wants_smoothing(config: QuantConfig, layer: str) -> bool:
    spec = config.linear_for(layer)
    return bool(spec.input and spec.input_transform and spec.input_transform.smooth)


@torch.no_grad()
def smoothed(
    pipe: Pipeline, config: QuantConfig, samples: Callable[[], CalibrationSet]
) -> tuple[Pipeline, int]:
    """A float pipeline that computes the same with smoothed inputs, and how many layers have them.
    The pipeline itself if the config asks for no smoothing; else `samples` is called."""
    found = diagonals(pipe, config, samples)
    if not found:
        return pipe, 0
    return folded(pipe, found), sum(map(len, found))


@torch.no_grad()
def diagonals(
    pipe: Pipeline,
    config: QuantConfig,
    samples: Callable[[], CalibrationSet],
    weight_of: Callable[[nn.Linear], Tensor] = lambda linear: linear.weight,
) -> dict[tuple[str, ...], Tensor]:
    """(C,) d of every place that the config wants smoothed, by the names of the layers that read
    it. weight_of: who has the weight of a Linear, where it is not there all the time."""
    found = {
        names: fold
        for names, fold in places(pipe.var.folds()).items()
        if all(wants_smoothing(config, name) for name in names)
    }
    if not found:
        return {}
    # What several layers read is the same for all of them.
    moments = input_moments(pipe, [names[0] for names in found], samples().first(SAMPLES))
    return {
        names: diagonal(map(weight_of, consumers_of(fold)), moments[names[0]].spread()).to(
            pipe.device, pipe.dtype
        )
        for names, fold in found.items()
    }


def diagonal(weights: Iterable[Tensor], spread_C: Tensor) -> Tensor:
    """(C,) float64 d for weights (out, C) of the same inputs and the root mean square of their
    channels."""
    each_C = [weight.double().square().mean(0) for weight in weights]
    squares_C = sum(each_C) / len(each_C)
    assert isinstance(squares_C, Tensor)
    columns_C = squares_C.sqrt()
    w_C, a_C = (x.clamp(min=FLOOR * float(x.mean())) for x in (columns_C, spread_C.double()))
    if not (float(w_C.min()) > 0 and float(a_C.min()) > 0):
        return torch.ones_like(w_C)
    log_C = 0.5 * (w_C.log() - a_C.log())
    return (log_C - log_C.mean()).exp()
