"""Presets of `QuantConfig` by name: "w<bits>a<bits>" with any of the modifiers joined by "+".

The bare name is what measures best among what integers can execute (docs/quality.md): inputs
smoothed, centred and rotated, probabilities uniform at 8 bits, word_embed and the head's input at 8
bits, keys and values on a scale per token. "w<bits>a<bits>+paper" is the paper's assignment of
quantizers (docs/method.md section 2). Further modifiers change one thing each of either and apply
in the order written:

    litevar     fc2 stays in float (LiteVAR)          skip-head   the head stays in float
    released    ranges as the released code           p8          probabilities uniform, 8 bits
    renorm      rows of quantized probabilities       qk6, qk8    queries and keys at 6 or 8 bits
                sum to one                            v6, v8      values at 6 or 8 bits
    smooth      Linear inputs on a fitted diagonal    edges8      word_embed and head at 8 bits
    center      Linear inputs less their mean         io8         the same, head weight as it was
    rotate      Linear inputs in Hadamard blocks      g32         grouped inputs in groups of 32
    segment     values per head and scale             token       values per token

"paper", "balanced" and "best" are names of their own for w4a4+paper, w4a4 and w4a4+qk6+v6+g32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from varptq.errors import ConfigError
from varptq.quant.affine import RangeRule
from varptq.quant.config import (
    AttentionSpec,
    InputTransform,
    LayerRule,
    LinearSpec,
    QuantConfig,
    TensorSpec,
)
from varptq.quant.quantizers import MAX_BITS, MIN_BITS

# The released code switches to groups below this width (docs/method.md section 2: "b >= 6" against
# "b <= 5").
GROUPED_BELOW_BITS = 6
WEIGHT_GROUP, INPUT_GROUP = 128, 64
HADAMARD_BLOCK = 128
FC2 = "blocks.*.ffn.fc2"
# Modifiers of every bare name, and the word that leaves them out.
BEYOND_PAPER = ("smooth", "center", "rotate", "p8", "io8", "token")
PAPER = "paper"
BASE_NAME = r"w([0-9]+)a([0-9]+)"
NAMES = {"paper": "w4a4+paper", "balanced": "w4a4", "best": "w4a4+qk6+v6+g32"}

Modifier = Callable[[QuantConfig], QuantConfig]


def preset(name: str) -> QuantConfig:
    """The preset `name`. Raises `ConfigError` for an unknown one, listing the known parts."""
    base, *modifiers = name.split("+")
    base, *implied = NAMES.get(base, base).split("+")
    modifiers = [*implied, *modifiers]
    match = re.fullmatch(BASE_NAME, base)
    if not match:
        raise ConfigError(
            f"preset {name!r}: expected w<bits>a<bits>, e.g. w4a4, or {', '.join(NAMES)}, "
            f"optionally with {_known()}"
        )
    bits = [int(text) for text in match.groups()]
    for side, value in zip(("weight", "activation"), bits, strict=True):
        if not MIN_BITS <= value <= MAX_BITS:
            raise ConfigError(f"preset {name!r}: {side} bits {value} not in {MIN_BITS}..{MAX_BITS}")
    modifiers = modifiers[1:] if modifiers[:1] == [PAPER] else [*BEYOND_PAPER, *modifiers]
    config = from_bits(*bits)
    for modifier in modifiers:
        if modifier == PAPER:
            raise ConfigError(f"preset {name!r}: +{PAPER} stands first, as in {base}+{PAPER}")
        if modifier not in MODIFIERS:
            raise ConfigError(f"preset {name!r}: unknown modifier {modifier!r}, known: {_known()}")
        config = MODIFIERS[modifier](config)
    return config.replace(name=name)


def from_bits(weight_bits: int, activation_bits: int) -> QuantConfig:
    """The paper's assignment of quantizers for these widths."""
    plain = input_spec(activation_bits)
    per_channel_keys = activation_bits >= GROUPED_BELOW_BITS
    attention = AttentionSpec(
        query=TensorSpec(num_bits=activation_bits, range_rule="min_max"),
        key=TensorSpec(
            num_bits=activation_bits,
            strategy="channel" if per_channel_keys else "token",
            range_rule="min_max",
        ),
        probability=TensorSpec(num_bits=activation_bits, type="log2"),
        value=TensorSpec(num_bits=activation_bits, strategy="head", range_rule="min_max"),
    )
    return QuantConfig(
        name=f"w{weight_bits}a{activation_bits}",
        linear=LinearSpec(weight=weight_spec(weight_bits), input=plain),
        attention=attention,
        rules=(LayerRule(targets=FC2, input=plain.replace(type="sign_split")),),
    )


def weight_spec(bits: int) -> TensorSpec:
    if bits >= GROUPED_BELOW_BITS:
        return TensorSpec(num_bits=bits, strategy="channel")
    return TensorSpec(num_bits=bits, strategy="group", group_size=WEIGHT_GROUP)


def input_spec(bits: int) -> TensorSpec:
    if bits >= GROUPED_BELOW_BITS:
        return TensorSpec(num_bits=bits, strategy="token")
    return TensorSpec(
        num_bits=bits, strategy="group", group_size=INPUT_GROUP, row_multiple=WEIGHT_GROUP
    )


def _keep_float(*targets: str) -> Modifier:
    rules = [LayerRule(targets=target, weight=None, input=None) for target in targets]
    return lambda config: config.with_rules(*rules)


def _attention(config: QuantConfig, **changes: Any) -> QuantConfig:
    assert config.attention is not None
    return config.replace(attention=config.attention.replace(**changes))


def _operand_bits(bits: int, *operands: str) -> Modifier:
    def change(config: QuantConfig) -> QuantConfig:
        specs = {name: getattr(config.attention, name) for name in operands}
        return _attention(config, **{k: spec.replace(num_bits=bits) for k, spec in specs.items()})

    return change


def _policy(policy: str, value_strategy: str) -> Modifier:
    """Keys per token and values on fixed codes; ranges with zero, so that every zero point is a
    code and products of integers stay within 32 bits."""

    def change(config: QuantConfig) -> QuantConfig:
        spec = config.attention
        assert spec is not None and spec.query and spec.key and spec.value
        query = spec.query.replace(range_rule="with_zero")
        key = spec.key.replace(strategy="token", range_rule="with_zero")
        value = spec.value.replace(strategy=value_strategy, range_rule="with_zero")
        return _attention(config, policy=policy, query=query, key=key, value=value)

    return change


def _released_ranges(config: QuantConfig) -> QuantConfig:
    def ruled(spec: TensorSpec | None, rule: RangeRule) -> TensorSpec | None:
        return spec.replace(range_rule=rule) if spec else None

    linear = config.linear.replace(
        weight=ruled(config.linear.weight, "min_max_clamped"),
        input=ruled(config.linear.input, "min_max"),
    )
    return config.replace(linear=linear)


def _transformed(**changes: Any) -> Modifier:
    """A transform on every Linear input. A rotated or centred fc2 input has no tail of one sign any
    more, so a sign-split input becomes an affine one."""

    def change(config: QuantConfig) -> QuantConfig:
        transform = (config.linear.input_transform or InputTransform()).replace(**changes)
        linear = config.linear.replace(input_transform=transform)
        if not (transform.center or transform.hadamard):
            return config.replace(linear=linear)
        rules = tuple(
            rule.replace(input=rule.input.replace(type="affine")) if rule.input else rule
            for rule in config.rules
        )
        return config.replace(linear=linear, rules=rules)

    return change


def _edges(bits: int, *, head_weight: bool) -> Modifier:
    """word_embed and the head; the head's weight at 8 bits costs as much as both its sides."""
    head: dict[str, Any] = {"weight": weight_spec(bits)} if head_weight else {}
    return lambda config: config.with_rules(
        LayerRule(targets="word_embed", weight=weight_spec(bits), input=input_spec(bits)),
        LayerRule(targets="head", input=input_spec(bits), **head),
    )


def _input_groups(size: int) -> Modifier:
    """Groups of `size` wherever inputs have groups."""

    def grouped(spec: TensorSpec | None) -> TensorSpec | None:
        if spec is None or spec.group_size is None:
            return spec
        return spec.replace(group_size=size)

    def change(config: QuantConfig) -> QuantConfig:
        rules = tuple(
            rule.replace(input=grouped(rule.input)) if rule.input else rule for rule in config.rules
        )
        linear = config.linear.replace(input=grouped(config.linear.input))
        return config.replace(linear=linear, rules=rules)

    return change


MODIFIERS: dict[str, Modifier] = {
    "litevar": _keep_float(FC2),
    "skip-head": _keep_float("head"),
    "released": _released_ranges,
    "p8": lambda config: _attention(config, probability=TensorSpec(num_bits=8, type="uniform")),
    "renorm": lambda config: _attention(config, renormalize=True),
    "qk6": _operand_bits(6, "query", "key"),
    "qk8": _operand_bits(8, "query", "key"),
    "v6": _operand_bits(6, "value"),
    "v8": _operand_bits(8, "value"),
    "g32": _input_groups(32),
    "edges8": _edges(8, head_weight=True),
    "io8": _edges(8, head_weight=False),
    "smooth": _transformed(smooth=True),
    "center": _transformed(center=True),
    "rotate": _transformed(hadamard=HADAMARD_BLOCK),
    "segment": _policy("segment", "head"),
    "token": _policy("token", "token"),
}


def _known() -> str:
    return ", ".join(f"+{name}" for name in (PAPER, *MODIFIERS))
