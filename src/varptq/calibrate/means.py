"""Moments of Linear inputs per scale, and the means of layers whose input is centred
(quant/transforms.py).

One teacher-forced pass of the float model over the calibration set, conditional and unconditional
rows alike: m_k is the mean over images and tokens of scale k. AdaLN layers see one vector per
condition; theirs is the mean over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varptq.calibrate.record import ROWS_PER_BATCH
from varptq.calibrate.run import Run
from varptq.calibrate.samples import CalibrationSet
from varptq.models.pipeline import Pipeline
from varptq.models.reading import listening, read
from varptq.models.seams import Span, linears_of
from varptq.models.transformer import Transformer
from varptq.quant.find import quant_linears


def center(run: Run) -> None:
    """Step: set the means of centred inputs, if the config asks for any."""
    names = [name for name, layer in quant_linears(run.quantized).items() if layer.centred]
    if names:
        samples = run.samples
        run.progress("means", 0, 1)
        run.center_on(input_means(run.pipe, names, samples))
        run.progress("means", 1, 1)


def center_inputs(pipe: Pipeline, quantized: Transformer, samples: CalibrationSet) -> int:
    """Measure the means and set them in the layers of `quantized` that need them; returns how
    many."""
    layers = {name: m for name, m in quant_linears(quantized).items() if m.centred}
    for name, means_Ki in input_means(pipe, list(layers), samples).items():
        layers[name].set_means(means_Ki)
    return len(layers)


@torch.no_grad()
def input_means(pipe: Pipeline, names: list[str], samples: CalibrationSet) -> dict[str, Tensor]:
    """(K, in) mean input of each named layer, one row for those that see no tokens."""
    seams = linears_of(pipe.var)
    tokens = [name for name in names if seams[name].reads != "condition"]
    means = token_means(pipe, tokens, samples) if tokens else {}
    vectors_1C = pipe.var.condition_vectors(pipe.pool()).mean(0, keepdim=True)
    return {name: means.get(name, vectors_1C) for name in names}


def token_means(pipe: Pipeline, names: list[str], samples: CalibrationSet) -> dict[str, Tensor]:
    """(K, in) float64 mean input of each named layer; zero at a scale that the layer never sees.
    One row for a layer that reads texts, which have no scales."""
    return {name: found.means() for name, found in input_moments(pipe, names, samples).items()}


@dataclass
class Moments:
    """Moments of one layer's input per scale, in float64: number of rows, sum, sum of squares."""

    count_K1: Tensor
    sum_Ki: Tensor
    square_Ki: Tensor

    @classmethod
    def zeros(cls, num_scales: int, width: int) -> Moments:
        shapes = ((num_scales, 1), (num_scales, width), (num_scales, width))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in shapes))

    def add(self, scale: int, x_BlC: Tensor) -> None:
        rows = x_BlC.double().flatten(0, 1)
        self.count_K1[scale] += len(rows)
        self.sum_Ki[scale] += rows.sum(0).cpu()
        self.square_Ki[scale] += rows.square().sum(0).cpu()

    def means(self) -> Tensor:
        """(K, in), zero at a scale without rows."""
        return self.sum_Ki / self.count_K1.clamp(min=1)

    def spread(self) -> Tensor:
        """(in,) root mean square after each scale's mean is subtracted."""
        left_Ki = self.square_Ki - self.sum_Ki * self.means()
        return (left_Ki.sum(0) / self.count_K1.sum().clamp(min=1)).clamp(min=0).sqrt()


def input_moments(pipe: Pipeline, names: list[str], samples: CalibrationSet) -> dict[str, Moments]:
    """Moments of the inputs of the named layers, from one pass of the float model."""
    layers = {name: layer for name, layer in linears_of(pipe.var).items() if name in set(names)}
    count = pipe.scales.num_scales
    found = {
        name: Moments.zeros(count if layer.reads == "tokens" else 1, layer.in_features)
        for name, layer in layers.items()
    }

    def add(name: str, x_BLi: Tensor, spans: Sequence[Span] | None = None) -> None:
        if spans is None:
            found[name].add(0, x_BLi)
            return
        for span in spans:
            found[name].add(span.scale, x_BLi[:, span.queries])

    with listening(layers, add):
        for prompts, tokens in samples.batches(ROWS_PER_BATCH):
            read(pipe, prompts, tokens)
    return found
