"""Moments of Linear inputs per scale, and the means of layers whose input is centred
(quant/transforms.py).

One teacher-forced pass of the float model over the calibration set, conditional and unconditional
rows alike: m_k is the mean over images and tokens of scale k. AdaLN layers see one vector per
class; theirs is the mean over all classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.calibrate.record import ROWS_PER_BATCH
from varptq.calibrate.samples import CalibrationSet
from varptq.models.pipeline import Pipeline
from varptq.models.var import VAR, Span, TokenLinear
from varptq.quant.convert import quant_linears


@torch.no_grad()
def center_inputs(pipe: Pipeline, quantized: VAR, samples: CalibrationSet) -> int:
    """Measure the means and set them in the layers of `quantized` that want them; how many did."""
    layers = {name: m for name, m in quant_linears(quantized).items() if m.centred}
    tokens = {n: m for n, m in layers.items() if isinstance(pipe.var.get_submodule(n), TokenLinear)}
    means = token_means(pipe, list(tokens), samples) if tokens else {}
    classes = F.silu(pipe.var.class_emb.weight.float()).mean(0, keepdim=True)
    for name, layer in layers.items():
        layer.set_means(means.get(name, classes))
    return len(layers)


def token_means(pipe: Pipeline, names: list[str], samples: CalibrationSet) -> dict[str, Tensor]:
    """(K, in) float64 mean input of each named layer; zero at a scale a layer never sees."""
    return {name: found.means() for name, found in input_moments(pipe, names, samples).items()}


@dataclass
class Moments:
    """Of the input of one layer, per scale, float64: how many rows, their sum, sum of squares."""

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
        """(in,) root mean square of what is left when each scale's mean is subtracted."""
        left_Ki = self.square_Ki - self.sum_Ki * self.means()
        return (left_Ki.sum(0) / self.count_K1.sum().clamp(min=1)).clamp(min=0).sqrt()


def input_moments(pipe: Pipeline, names: list[str], samples: CalibrationSet) -> dict[str, Moments]:
    """Moments of the inputs of the named layers, from one pass of the float model."""
    widths = {n: m.in_features for n, m in pipe.var.named_modules() if isinstance(m, nn.Linear)}
    found = {name: Moments.zeros(pipe.scales.num_scales, widths[name]) for name in names}

    def listener(moments: Moments) -> Callable[[nn.Module, tuple[Tensor, Sequence[Span]]], None]:
        def add(_: nn.Module, arguments: tuple[Tensor, Sequence[Span]]) -> None:
            x_BLi, spans = arguments
            for span in spans:
                moments.add(span.scale, x_BLi[:, span.queries])

        return add

    with ExitStack() as stack:
        for name, moments in found.items():
            handle = pipe.var.get_submodule(name).register_forward_pre_hook(listener(moments))
            stack.callback(handle.remove)
        for ids, labels in zip(
            samples.ids_NL.split(ROWS_PER_BATCH),
            samples.labels_N.split(ROWS_PER_BATCH),
            strict=True,
        ):
            rows = pipe.guidance_rows(labels)
            pipe.var(rows, pipe.vae.teacher_inputs(ids).repeat(2, 1, 1))
    return found
