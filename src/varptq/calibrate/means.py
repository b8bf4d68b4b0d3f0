"""Means of Linear inputs per scale, for layers whose input is centred (quant/transforms.py).

One teacher-forced pass of the float model over the calibration set, conditional and unconditional
rows alike: m_k is the mean over images and tokens of scale k. AdaLN layers see one vector per
class; theirs is the mean over all classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

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
    num_scales = pipe.scales.num_scales
    widths = {n: m.in_features for n, m in pipe.var.named_modules() if isinstance(m, nn.Linear)}
    sums = {name: torch.zeros(num_scales, widths[name]).double() for name in names}
    counts = {name: torch.zeros(num_scales, 1).double() for name in names}

    def listener(name: str) -> Callable[[nn.Module, tuple[Tensor, Sequence[Span]]], None]:
        def add(_: nn.Module, arguments: tuple[Tensor, Sequence[Span]]) -> None:
            x_BLi, spans = arguments
            for span in spans:
                part = x_BLi[:, span.queries]
                sums[name][span.scale] += part.double().sum((0, 1)).cpu()
                counts[name][span.scale] += part.shape[0] * part.shape[1]

        return add

    with ExitStack() as stack:
        for name in names:
            handle = pipe.var.get_submodule(name).register_forward_pre_hook(listener(name))
            stack.callback(handle.remove)
        for ids, labels in zip(
            samples.ids_NL.split(ROWS_PER_BATCH),
            samples.labels_N.split(ROWS_PER_BATCH),
            strict=True,
        ):
            rows = pipe.guidance_rows(labels)
            pipe.var(rows, pipe.vae.teacher_inputs(ids).repeat(2, 1, 1))
    return {name: sums[name] / counts[name].clamp(min=1) for name in names}
