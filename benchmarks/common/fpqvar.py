"""FPQVAR's FP4 assignment, re-implemented from its description, as far as a comparison needs it.

    weights and inputs of Linear layers in blocks   FP4 E2M1, symmetric, groups of 128
    mat_qkv, fc1 inputs                             Hadamard 128 with signs, learned diagonal
    fc2 input                                       E1M2 below zero and E2M1 above, a scale each
    attention, AdaLN layers, word_embed, head       16 bits

The diagonal is learned layer by layer: Adam on log d against the output of the float layer, from
the closed form of smoothing, which it hardly leaves; the state of least loss is kept. Simulated in
float; nothing here is an integer scheme.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.calibrate.samples import CalibrationSet
from varptq.calibrate.smoothing import diagonal
from varptq.models.pipeline import Pipeline
from varptq.models.reading import listening, read
from varptq.models.seams import NormFold, Span, TokenLinear
from varptq.quant.config import InputTransform, LayerRule, LinearSpec, QuantConfig
from varptq.quant.folds import scale_input
from varptq.quant.presets import from_bits
from varptq.quant.transforms import hadamard, rotate_weight

GROUP = 128
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E1M2 = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
STEPS, RATE, TOKENS = 30, 0.02, 256
KEPT_FLOAT = ("word_embed", "head", "*ada_lin.1")
ROTATED = ("mat_qkv", "fc1")


def account_config() -> QuantConfig:
    """The same assignment as a config, which the BOP account and `convert` understand."""
    plain = from_bits(4, 4)
    rotation = InputTransform(hadamard=GROUP)
    rules = [LayerRule(targets=f"blocks.*.{name}", input_transform=rotation) for name in ROTATED]
    rules += [LayerRule(targets=t, weight=None, input=None) for t in KEPT_FLOAT]
    linear = LinearSpec(weight=plain.linear.weight, input=plain.linear.input)
    return QuantConfig(name="fpqvar", linear=linear, attention=None, rules=tuple(rules))


def fp4(x: Tensor, levels: Sequence[float]) -> Tensor:
    """x (..., n) on levels times the absolute maximum of each group, nearest; straight through."""
    groups = x.unflatten(-1, (-1, GROUP if x.shape[-1] % GROUP == 0 else x.shape[-1]))
    table = torch.tensor(levels, dtype=x.dtype)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / table[-1]
    code = torch.bucketize((groups / scale).abs().detach(), (table[1:] + table[:-1]) / 2)
    fake = table[code] * groups.sign() * scale
    return (groups + (fake - groups).detach()).flatten(-2)


def split_fp4(x: Tensor) -> Tensor:
    """The two sides of a GELU output, each with formats and scales of its own."""
    return fp4(x.clamp(max=0), E1M2) + fp4(x.clamp(min=0), E2M1)


class FP4Linear(nn.Module):
    """Simulated layer in a Linear seam."""

    def __init__(self, linear: nn.Linear, rotated: bool, split: bool) -> None:
        super().__init__()
        self.block = GROUP if rotated and linear.in_features % GROUP == 0 else None
        weight = linear.weight.detach()
        self.weight = fp4(rotate_weight(weight, self.block) if self.block else weight, E2M1)
        self.bias, self.split = linear.bias, split

    def forward(self, x: Tensor, spans: Sequence[Span] | None = None) -> Tensor:
        x = hadamard(x, self.block) if self.block else x
        return F.linear(split_fp4(x) if self.split else fp4(x, E2M1), self.weight, self.bias)


def learned_diagonal(weight: Tensor, x_RC: Tensor, block: int | None) -> tuple[Tensor, list[float]]:
    """d (C,) for inputs (rows, C) of a layer, and the losses on the way."""
    log_C = diagonal(weight, x_RC.square().mean(0).sqrt()).float().log().requires_grad_()
    optimizer = torch.optim.Adam([log_C], lr=RATE)
    target, losses, best = x_RC @ weight.T, [], torch.zeros_like(log_C)
    for _ in range(STEPS):
        d_C = log_C.exp()
        u, w = x_RC * d_C, weight / d_C
        if block:
            u, w = hadamard(u, block), hadamard(w, block)
        loss = (fp4(u, E2M1) @ fp4(w, E2M1).T - target).square().mean()
        if not losses or loss.item() < min(losses):
            best = log_C.detach().clone()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best.exp(), losses


def inputs_of(pipe: Pipeline, names: list[str], samples: CalibrationSet) -> dict[str, Tensor]:
    """Up to `TOKENS` rows of input of each layer, spread evenly over images and positions."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, x_BLi: Tensor, _: object) -> None:
        rows = x_BLi.flatten(0, 1)
        seen[name] = rows[:: max(1, len(rows) // TOKENS)].clone()

    layers = {name: pipe.var.get_submodule(name) for name in names}
    with torch.no_grad(), listening(layers, keep):
        read(pipe, samples.prompts[:16], samples.tokens[:16])
    return seen


def fpqvar(pipe: Pipeline, samples: CalibrationSet) -> Pipeline:
    """The simulated model; the pipeline given is left as it is."""
    var = copy.deepcopy(pipe.var)
    folds = {name: fold for name, fold in var.folds().items() if name != "head"}
    places = {name: fold for name, fold in folds.items() if isinstance(fold, NormFold)}
    inputs = inputs_of(pipe, list(places), samples)
    for name, place in places.items():
        block = GROUP if place.consumer.in_features % GROUP == 0 else None
        d_C, _ = learned_diagonal(place.consumer.weight.detach(), inputs[name], block)
        scale_input(place, d_C)
    for name, module in list(var.named_modules()):
        if isinstance(module, TokenLinear) and name.startswith("blocks."):
            parent, _, child = name.rpartition(".")
            layer = FP4Linear(module, rotated=child in ROTATED, split=child == "fc2")
            setattr(var.get_submodule(parent), child, layer)
    return replace(pipe, var=var)
