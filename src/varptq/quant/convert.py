"""Conversion: one registry and one walk over a float network, replacing the modules in its seams.

What it does not replace shares its memory with the float model; no forward pass is written again.
A new kind of layer is one entry in `REGISTRY`. The modules it put there are found by find.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from varptq.errors import ConfigError, NonFiniteError
from varptq.models.autoencoder import Autoencoder
from varptq.models.convolutions import Convolution, convolutions_of
from varptq.models.scales import Scales
from varptq.models.seams import (
    ConditionLinear,
    Mix,
    Scores,
    SeamLinear,
    TextLinear,
    TokenLinear,
    linears_of,
)
from varptq.models.transformer import Transformer
from varptq.quant.attention import QuantMix, QuantScores
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.convolution import QuantConvolution
from varptq.quant.find import quant_convolutions
from varptq.quant.layers import QuantLinear
from varptq.quant.presets import TARGETS

Factory = Callable[[nn.Module, QuantConfig, str, Scales], nn.Module]
Network = TypeVar("Network", bound=nn.Module)


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


def _convolution(module: nn.Module, config: QuantConfig, name: str, scales: Scales) -> nn.Module:
    assert isinstance(module, Convolution)
    precision = config.autoencoder_for(name)
    if precision == "float32":
        return module
    return QuantConvolution(module, precision, name)


REGISTRY: dict[type[nn.Module], Factory] = {
    TokenLinear: _linear,
    ConditionLinear: _linear,
    TextLinear: _linear,
    Scores: _scores,
    Mix: _mix,
    Convolution: _convolution,
}


def convert(var: Transformer, config: QuantConfig, *, in_place: bool = False) -> Transformer:
    """A copy of `var` with quantizers in its seams, weights rounded to nearest; `in_place`, `var`
    itself, for a caller who has no other use for it.

    A model on the meta device gives one with empty buffers of the right shapes, to be filled from
    an artifact. Raises `ConfigError` for a rule that matches no layer or a group size that does not
    fit, `NonFiniteError` naming the first tensor with NaN or infinity.
    """
    check_finite(var)
    check_rules(var, config)
    own = var if in_place else shared_copy(var)
    return cast(Transformer, replaced(own, config, "", var.scales))


def convert_autoencoder(
    vae: Autoencoder, config: QuantConfig, *, in_place: bool = False
) -> Autoencoder:
    """`convert` for the autoencoder: its convolutions, as far as they are those of
    models/convolutions.py. Raises as `convert` does; the layer has the name of its own network."""
    check_autoencoder_rules(vae, config)
    own = vae if in_place else shared_copy(vae)
    found = cast(Autoencoder, replaced(own, config, "", vae.scales))
    # Nobody waits for an encoder, and codes of its inputs would cost more ids than its weights do.
    encoding = tuple(f"{name}." for name in vae.ENCODING)
    for layer in quant_convolutions(found).values():
        layer.on_codes &= not layer.layer.startswith(encoding)
    return found


def converted(network: nn.Module, config: QuantConfig, name: str, scales: Scales) -> nn.Module:
    """A copy of a part of a network, called `name` there, with quantizers in its seams."""
    return replaced(shared_copy(network), config, name, scales)


def shared_copy(network: Network) -> Network:
    """A copy on the same memory."""
    # Parameters of its own on the same memory: moving, casting or freezing one model must not reach
    # the other.
    shared: dict[int, Tensor] = {id(b): b for b in network.buffers()}
    for p in network.parameters():
        # What was loaded or moved inside torch.inference_mode() takes no part in gradients.
        own = p.detach().clone() if p.is_inference() else p.detach()
        shared[id(p)] = nn.Parameter(own, requires_grad=False)
    return copy.deepcopy(network, shared)


def replaced(model: nn.Module, config: QuantConfig, name: str, scales: Scales) -> nn.Module:
    """The same part of a network, called `name` there, with quantizers put into its seams."""
    if type(model) in REGISTRY:
        return REGISTRY[type(model)](model, config, name, scales)
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            factory = REGISTRY.get(type(child))
            if factory is not None:
                path = ".".join(filter(None, (name, parent_name, child_name)))
                setattr(parent, child_name, factory(child, config, path, scales))
    return model


def check_finite(var: Transformer) -> None:
    for name, tensor in var.state_dict().items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"tensor {name}: holds NaN or infinity; repair the checkpoint")


def check_rules(var: Transformer, config: QuantConfig) -> None:
    """Every rule must change at least one layer: a pattern that matches nothing is a spelling
    mistake, unless it is one of the presets', which know no family."""
    linears = list(linears_of(var))
    attentions = [name.rpartition(".")[0] for name, m in var.named_modules() if isinstance(m, Mix)]
    only = {"targets", "autoencoder"}
    rules = [rule for rule in config.rules if rule.model_fields_set != only]
    _check_targets(rules, (*linears, *attentions), (linears[0], linears[-1], attentions[0]))


def check_groups(var: Transformer, config: QuantConfig) -> None:
    """Raise `ConfigError` for groups that every layer of the model is narrower than, so that none
    would have any, unless whole rows may take their place."""
    linears = linears_of(var)
    widest = max(layer.in_features for layer in linears.values())
    for name in linears:
        spec = config.linear_for(name)
        for tensor in (spec.weight, spec.input):
            if tensor and not tensor.fallback and (tensor.group_size or 0) > widest:
                raise ConfigError(
                    f"group_size {tensor.group_size}: wider than every layer of the model, "
                    f"expected 8 to {widest} input channels; choose a smaller one"
                )


def check_autoencoder_rules(vae: Autoencoder, config: QuantConfig) -> None:
    """`check_rules` for what rules say of the autoencoder."""
    names = list(convolutions_of(vae)) or ["(none here)"]
    rules = [rule for rule in config.rules if "autoencoder" in rule.model_fields_set]
    _check_targets(rules, names, (names[0], names[len(names) // 2], names[-1]))


def _check_targets(
    rules: Sequence[LayerRule], names: Sequence[str], examples: tuple[str, str, str]
) -> None:
    for rule in rules:
        if rule.targets not in TARGETS and not any(fnmatchcase(n, rule.targets) for n in names):
            first, second, third = map(repr, examples)
            raise ConfigError(
                f"rule {rule.targets!r}: matches no layer; layers are named like {first}, "
                f"{second} and {third}"
            )
