"""What is quantized, how, and to how many bits: the one place where bit-width policy lives.

A `QuantConfig` gives a spec per tensor kind (Linear weight, Linear input, and the four operands
of attention) and a list of rules that change it for layers whose name matches a pattern.
LiteVAR's "fc2 stays in float" and "skip the head" are such rules. Presets compose: "w4a4",
"w4a4+litevar", "w6a6+released", "w4a8+p8".
"""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_serializer, model_validator

from varptq.errors import ConfigError
from varptq.settings import Settings

MIN_BITS, MAX_BITS = 2, 8
# The released code switches to groups below this width (docs/method.md section 2).
GROUPED_BELOW_BITS = 6
WEIGHT_GROUP, INPUT_GROUP = 128, 64

RangeRule = Literal["with_zero", "min_max", "min_max_clamped"]


class TensorSpec(Settings):
    """How one kind of tensor becomes codes; field names follow compressed-tensors where it has one.

    type: "affine" (scale and zero point), "sign_split" (a scale per sign), "log2" and "uniform"
        (attention probabilities, scaled by their row maximum).
    strategy: the extent of one scale. "channel" = one output row of a weight, or one head channel
        of the keys; "token" = the last axis; "group" = `group_size` neighbours on the last axis;
        "head" = all tokens and channels of one head.
    fallback: rows that the group size does not fit are quantized whole ("channel"/"token");
        without it they are an error.
    row_multiple: use groups only on rows whose length this divides (the released code asks for 128
        even for groups of 64).
    range_rule: "with_zero" extends every range to contain 0, so zero points are codes; "min_max"
        takes the range as it is, and the zero point may lie outside the codes; "min_max_clamped"
        clamps that zero point (released weights: a row of one sign collapses).
    """

    num_bits: int = Field(ge=MIN_BITS, le=MAX_BITS)
    type: Literal["affine", "sign_split", "log2", "uniform"] = "affine"
    strategy: Literal["channel", "token", "group", "head"] = "token"
    group_size: int | None = Field(default=None, ge=8)
    fallback: bool = True
    row_multiple: int | None = Field(default=None, ge=1)
    range_rule: RangeRule = "with_zero"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError(
                f"strategy {self.strategy!r} with group_size {self.group_size}: "
                "group_size goes with 'group' only"
            )
        return self

    def group_for(self, row: int, layer: str) -> int | None:
        """Group size for rows of `row` elements, or None for one scale per row.

        Raises `ConfigError` naming the layer where the size does not divide the row and no
        fallback is allowed.
        """
        if self.group_size is None:
            return None
        if row % self.group_size == 0 and row % (self.row_multiple or 1) == 0:
            return self.group_size
        # A row shorter than one group is quantized whole: that is what a group of that size means
        # there.
        if self.fallback or row < self.group_size:
            return None
        fits = math.lcm(self.group_size, self.row_multiple or 1)
        raise ConfigError(
            f"layer {layer}: group_size {self.group_size} needs a multiple of {fits} input "
            f"channels, found {row}; choose another size or allow the fallback to whole rows"
        )


# Types and strategies that exist for each operand.
ATTENTION_OPERANDS = {
    "query": (("affine",), ("token",)),
    "key": (("affine",), ("channel", "token")),
    "probability": (("log2", "uniform"), ("token",)),
    "value": (("affine",), ("head",)),
}
LINEAR_OPERANDS = {
    "weight": (("affine",), ("channel", "group")),
    "input": (("affine", "sign_split"), ("group", "token")),
}


def _allowed(
    spec: TensorSpec | None, types: tuple[str, ...], strategies: tuple[str, ...]
) -> TensorSpec | None:
    """`spec` as it is, or ValueError where no quantizer of that kind exists for the operand."""
    if spec is None or (spec.type in types and spec.strategy in strategies):
        return spec
    raise ValueError(
        f"type {spec.type!r} with strategy {spec.strategy!r}, expected type {' or '.join(types)} "
        f"and strategy {' or '.join(strategies)}"
    )


class AttentionSpec(Settings):
    """The two attention products. `policy` "release": ranges over all cached tokens (the paper's
    code).
    """

    policy: Literal["release"] = "release"
    query: TensorSpec | None
    key: TensorSpec | None
    probability: TensorSpec | None
    value: TensorSpec | None
    max_order: int = Field(default=3, ge=0, le=3)

    @field_validator("query", "key", "probability", "value")
    @classmethod
    def _operand(cls, spec: TensorSpec | None, info: ValidationInfo) -> TensorSpec | None:
        return _allowed(spec, *ATTENTION_OPERANDS[info.field_name or ""])


class LinearSpec(Settings):
    """A Linear layer: weight and input; None keeps that side in float.

    `input_transform` is the place for an online transform of the input whose inverse is folded
    into the weight; none exists yet.
    """

    weight: TensorSpec | None
    input: TensorSpec | None
    input_transform: None = None

    @field_validator("weight", "input")
    @classmethod
    def _operand(cls, spec: TensorSpec | None, info: ValidationInfo) -> TensorSpec | None:
        return _allowed(spec, *LINEAR_OPERANDS[info.field_name or ""])


class LayerRule(Settings):
    """Changes for layers whose name matches `targets` (shell pattern, e.g. "blocks.*.ffn.fc2").

    A field given as None means float; a field not given stays as it was. Later rules win.
    """

    targets: str = Field(min_length=1)
    weight: TensorSpec | None = None
    input: TensorSpec | None = None
    attention: AttentionSpec | None = None

    @model_serializer(mode="wrap")
    def _only_what_was_said(self, handler: Any) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if k in self.model_fields_set}

    def replace(self, **changes: Any) -> Self:
        said = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**said, **changes})


class QuantConfig(Settings):
    """Specs per tensor kind plus rules per layer name. `QuantConfig.preset("w4a4")` is the usual
    way in.
    """

    name: str
    linear: LinearSpec
    attention: AttentionSpec | None
    rules: tuple[LayerRule, ...] = ()

    def linear_for(self, layer: str) -> LinearSpec:
        """The spec of the Linear named `layer` after all rules."""
        changes: dict[str, TensorSpec | None] = {}
        for rule in self._matching(layer):
            changes |= {
                k: getattr(rule, k) for k in ("weight", "input") if k in rule.model_fields_set
            }
        return self.linear.replace(**changes)

    def attention_for(self, layer: str) -> AttentionSpec | None:
        """The spec of the attention module named `layer` (e.g. "blocks.0.attn") after all rules."""
        spec = self.attention
        for rule in self._matching(layer):
            if "attention" in rule.model_fields_set:
                spec = rule.attention
        return spec

    def _matching(self, layer: str) -> list[LayerRule]:
        return [rule for rule in self.rules if fnmatchcase(layer, rule.targets)]

    def with_rules(self, *rules: LayerRule) -> QuantConfig:
        """The same config with more rules behind the present ones."""
        return self.replace(rules=(*self.rules, *rules))

    @classmethod
    def preset(cls, name: str) -> QuantConfig:
        """A preset by name: "w<bits>a<bits>" with any of the modifiers joined by "+".

        `litevar` keeps fc2 in float (LiteVAR); `skip-head` keeps the head in float; `p8` stores
        attention probabilities as uniform 8-bit codes instead of log2; `released` takes ranges as
        the released code does. Raises `ConfigError` for an unknown name, listing the known ones.
        """
        base, *modifiers = name.split("+")
        match = re.fullmatch(r"w([0-9]+)a([0-9]+)", base)
        if not match:
            raise ConfigError(
                f"preset {name!r}: expected w<bits>a<bits>, e.g. w4a4, optionally with {_known()}"
            )
        bits = [int(text) for text in match.groups()]
        for side, value in zip(("weight", "activation"), bits, strict=True):
            if not MIN_BITS <= value <= MAX_BITS:
                raise ConfigError(
                    f"preset {name!r}: {side} bits {value} not in {MIN_BITS}..{MAX_BITS}"
                )
        config = cls.from_bits(*bits)
        for modifier in modifiers:
            if modifier not in MODIFIERS:
                raise ConfigError(
                    f"preset {name!r}: unknown modifier {modifier!r}, known: {_known()}"
                )
            config = MODIFIERS[modifier](config)
        return config.replace(name=name)

    @classmethod
    def from_bits(cls, weight_bits: int, activation_bits: int) -> QuantConfig:
        """The paper's assignment of quantizers for these widths (docs/method.md section 2)."""
        weight = _weight_spec(weight_bits)
        plain = _input_spec(activation_bits)
        gelu = plain.replace(type="sign_split")
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
        return cls(
            name=f"w{weight_bits}a{activation_bits}",
            linear=LinearSpec(weight=weight, input=plain),
            attention=attention,
            rules=(LayerRule(targets="blocks.*.ffn.fc2", input=gelu),),
        )


def _weight_spec(bits: int) -> TensorSpec:
    if bits >= GROUPED_BELOW_BITS:
        return TensorSpec(num_bits=bits, strategy="channel")
    return TensorSpec(num_bits=bits, strategy="group", group_size=WEIGHT_GROUP)


def _input_spec(bits: int) -> TensorSpec:
    if bits >= GROUPED_BELOW_BITS:
        return TensorSpec(num_bits=bits, strategy="token")
    return TensorSpec(
        num_bits=bits, strategy="group", group_size=INPUT_GROUP, row_multiple=WEIGHT_GROUP
    )


def _keep_float(config: QuantConfig, targets: str) -> QuantConfig:
    return config.with_rules(LayerRule(targets=targets, weight=None, input=None))


def _uniform_probabilities(config: QuantConfig) -> QuantConfig:
    assert config.attention is not None
    spec = TensorSpec(num_bits=8, type="uniform")
    return config.replace(attention=config.attention.replace(probability=spec))


def _released_ranges(config: QuantConfig) -> QuantConfig:
    def ruled(spec: TensorSpec | None, rule: RangeRule) -> TensorSpec | None:
        return spec.replace(range_rule=rule) if spec else None

    linear = config.linear.replace(
        weight=ruled(config.linear.weight, "min_max_clamped"),
        input=ruled(config.linear.input, "min_max"),
    )
    return config.replace(linear=linear)


MODIFIERS = {
    "litevar": lambda config: _keep_float(config, "blocks.*.ffn.fc2"),
    "skip-head": lambda config: _keep_float(config, "head"),
    "p8": _uniform_probabilities,
    "released": _released_ranges,
}


def _known() -> str:
    return ", ".join(f"+{name}" for name in MODIFIERS)
