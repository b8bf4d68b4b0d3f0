"""Conversion: one registry and one walk over the float model, replacing the modules in its seams.

What it does not replace shares its memory with the float model; no forward pass is written again.
A new kind of layer is one entry in `REGISTRY`. The modules it put there are found by find.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from varptq.errors import ConfigError, NonFiniteError
from varptq.models.scales import Scales
from varptq.models.seams import ConditionLinear, Mix, Scores, SeamLinear, TokenLinear
from varptq.models.transformer import Transformer
from varptq.quant.attention import QuantMix, QuantScores
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
