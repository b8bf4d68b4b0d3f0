"""Conversion of the simulated modules to integer ones: what is refused, and the walk that replaces.

    QuantLinear -> IntLinear      Attention -> IntAttention      ModulatedNorm, GELU -> into the
                                                                 quantizer of the Linear behind them

What a config leaves in float stays in float, arranged so that an image does not depend on its
batch. A layer can be converted as soon as its codes are loaded, so that loading an artifact
keeps only one unpacked layer in memory at a time.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from varptq.errors import InputError
from varptq.models.blocks import Attention
from varptq.models.seams import ModulatedNorm, Phi
from varptq.models.transformer import Transformer
from varptq.quant.config import TensorSpec
from varptq.quant.find import quant_linears
from varptq.quant.layers import QuantLinear
from varptq.quant.pipeline import QuantizedPipeline
from varptq.quant.quantizers import ATTENTION_OPERANDS, QUANTIZERS, types_of
from varptq.runtime.attention import IntAttention, attention_rule
from varptq.runtime.kernels import Kernels
from varptq.runtime.layers import (
    ByRows,
    DeferredNorm,
    IntLinear,
    PerImage,
    PerRowAttention,
    input_rule,
)


def refusal(var: Transformer, kernels: Kernels) -> str | None:
    """The first layer of a simulated model (which may be on the meta device) that `kernels` cannot
    execute, and why; None if it can execute all layers."""
    for name, linear in quant_linears(var).items():
        rule = input_rule(linear)
        if rule is None:
            side = "weight" if linear.spec.weight is None else "input"
            return f"layer {name}: {side} in float, the other side in integers"
        operands = {"weight": linear.spec.weight, "input": linear.spec.input}
        if reason := kernels.refuse_linear(rule) or without_kernel(operands, kernels.name):
            return f"layer {name}: {reason}"
    for attention in _attentions(var).values():
        rule = attention_rule(attention)
        if rule is None:
            continue
        operands = {name: getattr(rule.spec, name) for name in ATTENTION_OPERANDS}
        if reason := kernels.refuse_attention(rule) or without_kernel(operands, kernels.name):
            return f"layer {rule.layer}: {reason}"
    return None


def without_kernel(operands: Mapping[str, TensorSpec | None], runtime: str) -> str | None:
    """The first of these operands whose type has no kernel in `runtime`, for an error message."""
    for operand, spec in operands.items():
        if spec is not None and runtime not in QUANTIZERS[spec.type].kernels:
            executed = [t for t in types_of(operand) if runtime in QUANTIZERS[t].kernels]
            return f"{operand} type {spec.type!r}, expected {' or '.join(map(repr, executed))}"
    return None


def on_integers(pipe: QuantizedPipeline, kernels: Kernels) -> QuantizedPipeline:
    """A pipeline that computes `pipe` with `kernels`. `pipe` itself does not change; modules that
    are not replaced are shared. Raises `InputError`, naming the layer, for what the kernels cannot
    execute."""
    if (reason := refusal(pipe.var, kernels)) is not None:
        raise InputError(f"runtime {kernels.name!r}: {reason}; use runtime simulated")
    tensors = (*pipe.var.parameters(), *pipe.var.buffers(), *pipe.vae.parameters())
    shared: dict[int, Tensor] = {id(t): t for t in (*tensors, *pipe.vae.buffers())}
    var, vae = copy.deepcopy(pipe.var, shared), copy.deepcopy(pipe.vae, shared)
    converted = dataclasses.replace(pipe, var=var, vae=vae)
    for layer in list(quant_linears(var)):
        convert_linear(var, layer, kernels)
    return finish(converted, kernels)


def convert_linear(var: Transformer, layer: str, kernels: Kernels) -> None:
    """Replace the `QuantLinear` named `layer`, whose codes are loaded, by an `IntLinear`.

    A GELU before it becomes part of it."""
    parent_name, _, name = layer.rpartition(".")
    parent = var.get_submodule(parent_name)
    linear = cast(QuantLinear, getattr(parent, name))
    source = var.feeds().get(layer)
    takes_gelu = source is not None and isinstance(var.get_submodule(source), nn.GELU)
    rule = input_rule(linear, gelu=takes_gelu)
    assert rule is not None, "refused before"
    setattr(parent, name, IntLinear(linear, kernels, rule))
    if source is not None and takes_gelu:
        _replace(var, source, nn.Identity())


def finish(pipe: QuantizedPipeline, kernels: Kernels) -> QuantizedPipeline:
    """Everything but the Linear layers, in place: attention, norms, float layers, token map and
    sampler."""
    var = pipe.var
    for linear, source in var.feeds().items():
        if not isinstance(var.get_submodule(source), ModulatedNorm):
            continue
        if isinstance(var.get_submodule(linear), IntLinear) and not _split_by_rows(var, linear):
            _replace(var, source, DeferredNorm())
    _one_image_at_a_time(var)
    for name, attention in _attentions(var).items():
        rule = attention_rule(attention)
        if rule is None:
            _replace(var, name, PerRowAttention(attention))
        else:
            _replace(var, name, IntAttention(attention, kernels, rule))
    for name, module in list(pipe.vae.named_modules()):
        if isinstance(module, Phi):
            _replace(pipe.vae, name, kernels.phi(module))
    pipe.sampler, pipe.runtime = kernels.sampler(), kernels.name
    return pipe


def _one_image_at_a_time(var: Transformer) -> None:
    for name, module in list(var.named_modules()):
        if isinstance(module, nn.Linear):
            _replace(var, name, PerImage(module))
        elif isinstance(module, nn.SiLU | nn.GELU):
            _replace(var, name, ByRows(module))


def _split_by_rows(var: Transformer, linear: str) -> bool:
    """Attention in float is split by rows before its Linears; a deferred norm cannot be split."""
    parent = var.get_submodule(linear.rpartition(".")[0])
    return isinstance(parent, Attention) and attention_rule(parent) is None


def _attentions(var: Transformer) -> dict[str, Attention]:
    return {name: m for name, m in var.named_modules() if isinstance(m, Attention)}


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
