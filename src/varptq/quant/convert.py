"""Conversion: one registry and one walk over the float model, replacing the modules in its seams.

What it does not replace shares its memory with the float model; no forward pass is written again.
A new kind of layer is one entry in `REGISTRY`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from varptq.errors import ConfigError, NonFiniteError
from varptq.models.blocks import Attention
from varptq.models.scales import Scales
from varptq.models.seams import ConditionLinear, Mix, Scores, SeamLinear, TokenLinear
from varptq.models.transformer import Transformer, float_layout
from varptq.quant.attention import QuantMix, QuantScores
from varptq.quant.bops import (
    BopsAccount,
    LayerShape,
    ProductShape,
    account,
)
from varptq.quant.config import QuantConfig
from varptq.quant.layers import QuantLinear

Factory = Callable[[nn.Module, QuantConfig, str, Scales], nn.Module]


def _linear(module: nn.Module, config: QuantConfig, name: str, scales: Scales) -> nn.Module:
    assert isinstance(module, SeamLinear)
    spec = config.linear_for(name)
    if spec.weight is None and spec.input is None:
        return module
    num_scales = scales.num_scales if module.reads == "tokens" else 1
    return QuantLinear(module, spec, name, num_scales)


def _scores(module: nn.Module, config: QuantConfig, name: str, scales: Scales) -> nn.Module:
    spec = config.attention_for(name.rpartition(".")[0])
    return module if spec is None else QuantScores(spec, name)


def _mix(module: nn.Module, config: QuantConfig, name: str, scales: Scales) -> nn.Module:
    spec = config.attention_for(name.rpartition(".")[0])
    return module if spec is None else QuantMix(spec, name)


REGISTRY: dict[type[nn.Module], Factory] = {
    TokenLinear: _linear,
    ConditionLinear: _linear,
    Scores: _scores,
    Mix: _mix,
}


def convert(var: Transformer, config: QuantConfig) -> Transformer:
    """A copy of `var` with quantizers in its seams, weights rounded to nearest.

    A model on the meta device gives one with empty buffers of the right shapes, to be filled from
    an artifact. Raises `ConfigError` for a rule that matches no layer or a group size that does not
    fit, `NonFiniteError` naming the first tensor with NaN or infinity.
    """
    check_finite(var)
    check_rules(var, config)
    # Parameters of its own on the same memory: moving, casting or freezing one model must not reach
    # the other.
    shared: dict[int, Tensor] = {id(b): b for b in var.buffers()}
    for p in var.parameters():
        # What was loaded or moved inside torch.inference_mode() takes no part in gradients.
        own = p.detach().clone() if p.is_inference() else p.detach()
        shared[id(p)] = nn.Parameter(own, requires_grad=False)
    model = copy.deepcopy(var, shared)
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            factory = REGISTRY.get(type(child))
            if factory is not None:
                name = f"{parent_name}.{child_name}".lstrip(".")
                setattr(parent, child_name, factory(child, config, name, var.scales))
    return model


def check_finite(var: Transformer) -> None:
    for name, tensor in var.state_dict().items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"tensor {name}: holds NaN or infinity; repair the checkpoint")


def check_rules(var: Transformer, config: QuantConfig) -> None:
    """Every rule must change at least one layer: a pattern that matches nothing is a spelling
    mistake."""
    linears = [name for name, m in var.named_modules() if isinstance(m, SeamLinear)]
    attentions = [name.rpartition(".")[0] for name, m in var.named_modules() if isinstance(m, Mix)]
    for rule in config.rules:
        if not any(fnmatchcase(name, rule.targets) for name in (*linears, *attentions)):
            raise ConfigError(
                f"rule {rule.targets!r}: matches no layer; layers are named like {linears[0]!r}, "
                f"{linears[-1]!r} and {attentions[0]!r}"
            )


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Quantized Linear layers by full name."""
    return {m.layer: m for m in model.modules() if isinstance(m, QuantLinear)}


def quant_mixes(model: nn.Module) -> list[QuantMix]:
    """Attention-value products in block order."""
    return [m for m in model.modules() if isinstance(m, QuantMix)]


def set_theta(model: nn.Module, theta: float | None) -> None:
    """One threshold for the whole model; None switches shift-and-sum off, as no order above 0 does
    for a layer."""
    for mix in quant_mixes(model):
        mix.theta = theta if mix.spec.max_order else None


def release_float_weights(model: nn.Module) -> None:
    for linear in quant_linears(model).values():
        linear.drop_float_weight()


def describe_linears(var: Transformer, config: QuantConfig | None) -> Iterator[LayerShape]:
    """Every Linear with its size, tokens per image and widths; `config` None describes the float
    model."""
    for name, module in float_layout(var).named_modules():
        if isinstance(module, SeamLinear):
            spec = config.linear_for(name) if config else None
            weight, input_ = (spec.weight, spec.input) if spec else (None, None)
            transform = spec.input_transform if spec and (weight or input_) else None
            yield LayerShape(
                name,
                module.kind,
                module.out_features,
                module.in_features,
                module.tokens_per_image(var.scales),
                weight.num_bits if weight else None,
                input_.num_bits if input_ else None,
                transform.block_for(module.in_features, name) if transform else None,
            )


def describe_products(var: Transformer, config: QuantConfig | None) -> Iterator[ProductShape]:
    layout = float_layout(var)
    for name, module in layout.named_modules():
        if isinstance(module, Mix):
            attention = name.rpartition(".")[0]
            parent = layout.get_submodule(attention)
            assert isinstance(parent, Attention)
            spec = config.attention_for(attention) if config else None
            operands = (spec.query, spec.key, spec.probability, spec.value) if spec else (None,) * 4
            bits = [operand.num_bits if operand else None for operand in operands]
            yield ProductShape(attention, parent.num_heads, parent.head_width, *bits)


def bops_account(var: Transformer, config: QuantConfig | None) -> BopsAccount:
    """Bit operations for one image, no guidance, no shift-and-sum (paper: BOP budget)."""
    return account(
        list(describe_linears(var, config)), list(describe_products(var, config)), var.scales
    )
