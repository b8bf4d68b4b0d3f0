"""What a config makes of a model, in numbers, nothing computed: size and widths of every Linear and
attention product, and the bit operations they add up to (bops.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from varptq.models.blocks import Attention
from varptq.models.cross import CrossAttention
from varptq.models.meta import on_meta
from varptq.models.seams import USUAL_TEXT, Mix, SeamLinear
from varptq.models.transformer import Transformer
from varptq.quant.bops import BopsAccount, LayerShape, ProductShape, account
from varptq.quant.config import QuantConfig


def float_modules(var: Transformer) -> Mapping[str, nn.Module]:
    """Modules by name of the float model of this architecture, on the meta device. All who ask
    share them, so they are only read; `float_layout` makes a model of one's own."""
    return _float_modules(type(var), var.arch)


# A search over configs asks thousands of times for the same model.
@lru_cache(maxsize=4)
def _float_modules(kind: type[Transformer], arch: Any) -> Mapping[str, nn.Module]:
    with on_meta():
        return dict(kind(arch).named_modules())


def describe_linears(
    var: Transformer, config: QuantConfig | None, text: int = USUAL_TEXT
) -> Iterator[LayerShape]:
    """Every Linear with its size, tokens per image and widths; `config` None describes the float
    model. text: tokens of a prompt, where prompts are texts."""
    for name, module in float_modules(var).items():
        if isinstance(module, SeamLinear):
            spec = config.linear_for(name) if config else None
            weight, input_ = (spec.weight, spec.input) if spec else (None, None)
            transform = spec.input_transform if spec and (weight or input_) else None
            yield LayerShape(
                name,
                module.kind,
                module.out_features,
                module.in_features,
                module.tokens_per_image(var.scales, text),
                weight.num_bits if weight else None,
                input_.num_bits if input_ else None,
                transform.block_for(module.in_features, name) if transform else None,
            )


def describe_products(
    var: Transformer, config: QuantConfig | None, text: int = USUAL_TEXT
) -> Iterator[ProductShape]:
    modules = float_modules(var)
    for name, module in modules.items():
        if isinstance(module, Mix):
            attention = name.rpartition(".")[0]
            parent = modules[attention]
            assert isinstance(parent, Attention | CrossAttention)
            keys = text if isinstance(parent, CrossAttention) else None
            spec = config.attention_for(attention) if config else None
            operands = (spec.query, spec.key, spec.probability, spec.value) if spec else (None,) * 4
            bits = [operand.num_bits if operand else None for operand in operands]
            yield ProductShape(attention, parent.num_heads, parent.head_width, *bits, text=keys)


def bops_account(
    var: Transformer, config: QuantConfig | None, text: int = USUAL_TEXT
) -> BopsAccount:
    """Bit operations for one image, no guidance, no shift-and-sum (paper: BOP budget)."""
    linears, products = describe_linears(var, config, text), describe_products(var, config, text)
    return account(list(linears), list(products), var.scales)
