"""What a config makes of a model, in numbers, nothing computed: size and widths of every Linear and
attention product, and the bit operations they add up to (bops.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from varptq.models.blocks import Attention
from varptq.models.seams import Mix, SeamLinear
from varptq.models.transformer import Transformer, float_layout
from varptq.quant.bops import BopsAccount, LayerShape, ProductShape, account
from varptq.quant.config import QuantConfig


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
