"""Conversion of the simulated modules to integer ones: what is refused, and the walk that replaces.

    QuantLinear -> IntLinear      Attention -> IntAttention      CrossAttention -> IntCrossAttention
    norms, GELU -> into the quantizer of the Linear behind them
    QuantConvolution -> IntConvolution, where the runtime has kernels for it

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
from varptq.models.cross import CrossAttention
from varptq.models.seams import GatedSum, ModulatedNorm, Phi, TextSummary
from varptq.models.transformer import Transformer
from varptq.quant.config import TensorSpec
from varptq.quant.find import quant_linears
from varptq.quant.layers import QuantLinear
from varptq.quant.pipeline import QuantizedPipeline
from varptq.quant.quantizers import ATTENTION_OPERANDS, QUANTIZERS, types_of
from varptq.runtime.attention import IntAttention, IntCrossAttention, attention_rule
from varptq.runtime.convolutions import decode_on
from varptq.runtime.kernels import Kernels, TextKernels
from varptq.runtime.layers import (
    ByRows,
    DeferredLayerNorm,
    DeferredNorm,
    GatedSumInPlace,
    IntLinear,
    PerImage,
    PerRowAttention,
    PerRowCrossAttention,
    input_rule,
    replace_module,
)


def refusal(var: Transformer, kernels: Kernels) -> str | None:
    """The first layer of a simulated model (which may be on the meta device) that `kernels` cannot
    execute, and why; None if it can execute all layers."""
    for name, module in _attentions(var).items():
        turns = isinstance(module, CrossAttention) or module.rotary
        if turns and not isinstance(kernels, TextKernels):
            return f"layer {name}: rotary positions and cross-attention have no kernels"
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
        replace_module(var, source, nn.Identity())


def finish(pipe: QuantizedPipeline, kernels: Kernels) -> QuantizedPipeline:
    """Everything but the Linear layers, in place: attention, norms, float layers, token map, image
    decoder and sampler."""
    var = pipe.var
    for linear, source in var.feeds().items():
        if not isinstance(var.get_submodule(linear), IntLinear) or _split_by_rows(var, linear):
            continue
        norm = var.get_submodule(source)
        if isinstance(norm, ModulatedNorm):
            replace_module(var, source, DeferredNorm())
        elif isinstance(norm, nn.LayerNorm):
            replace_module(var, source, DeferredLayerNorm(norm))
    _one_image_at_a_time(var)
    for name, module in list(var.named_modules()):
        if isinstance(module, GatedSum):
            replace_module(var, name, GatedSumInPlace())
    for name, attention in _attentions(var).items():
        replace_module(var, name, _on_codes(attention, kernels))
    for name, module in list(pipe.vae.named_modules()):
        if isinstance(module, Phi):
            replace_module(pipe.vae, name, kernels.phi(module))
    decode_on(pipe.vae, kernels)
    pipe.sampler, pipe.runtime = kernels.sampler(), kernels.name
    return pipe


def _on_codes(attention: Attention | CrossAttention, kernels: Kernels) -> nn.Module:
    rule = attention_rule(attention)
    if isinstance(attention, Attention):
        if rule is None:
            return PerRowAttention(attention)
        return IntAttention(attention, kernels, rule)
    if rule is None:
        return PerRowCrossAttention(attention)
    assert isinstance(kernels, TextKernels), "refused before"
    return IntCrossAttention(attention, kernels, rule)


def _one_image_at_a_time(var: Transformer) -> None:
    # What is inside another module that is replaced goes first.
    for name, module in reversed(list(var.named_modules())):
        if isinstance(module, nn.Linear | TextSummary):
            replace_module(var, name, PerImage(module))
        elif isinstance(module, nn.SiLU | nn.GELU):
            replace_module(var, name, ByRows(module))


def _split_by_rows(var: Transformer, linear: str) -> bool:
    """Attention in float is split by rows before its Linears; a deferred norm cannot be split."""
    parent = var.get_submodule(linear.rpartition(".")[0])
    return isinstance(parent, Attention | CrossAttention) and attention_rule(parent) is None


def _attentions(var: Transformer) -> dict[str, Attention | CrossAttention]:
    return {n: m for n, m in var.named_modules() if isinstance(m, Attention | CrossAttention)}
