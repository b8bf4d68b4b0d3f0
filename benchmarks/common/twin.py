"""A twin of a model: the same function with outlier channels, which large models have and the demo
model has not."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from varptq.models.pipeline import Pipeline
from varptq.models.seams import NormFold, ValueFold
from varptq.quant.folds import scale_input, scale_values, shift_input

SIGMA, OFFSET, OFFSET_SHARE = 1.0, 8.0, 0.01


@torch.no_grad()
def with_outliers(pipe: Pipeline, seed: int = 0) -> Pipeline:
    """A model of the same function whose inputs of mat_qkv, fc1 and proj have channels of very
    different size (log-normal), and 1% of channels with an offset of 8 deviations."""
    var, generator = copy.deepcopy(pipe.var), torch.Generator().manual_seed(seed)
    width = var.arch.width

    def factors() -> Tensor:
        return (SIGMA * torch.randn(width, generator=generator)).exp()

    folds = var.folds()
    for place in (fold for fold in folds.values() if isinstance(fold, NormFold)):
        if place.consumer is var.head:
            continue
        d_C, offset_C = factors(), torch.zeros(width)
        chosen = torch.randperm(width, generator=generator)[: max(1, int(OFFSET_SHARE * width))]
        offset_C[chosen] = (
            OFFSET * d_C[chosen] * torch.randn(len(chosen), generator=generator).sign()
        )
        scale_input(place, d_C)
        shift_input(place, offset_C)
    for place in (fold for fold in folds.values() if isinstance(fold, ValueFold)):
        scale_values(place, factors())
    return replace(pipe, var=var)
