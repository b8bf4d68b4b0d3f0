"""What is quantized, how, and to how many bits: the one place where bit-width policy lives.

A `QuantConfig` gives a spec per tensor kind (Linear weight, Linear input, and the four operands
of attention) and a list of rules that change it for layers whose name matches a pattern.
LiteVAR's "fc2 stays in float" and "skip the head" are such rules. Presets compose: "w4a4",
"w4a4+litevar", "w6a6+paper+released".
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_serializer, model_validator

from varptq.errors import ConfigError
from varptq.quant.affine import RangeRule
from varptq.quant.quantizers import MAX_BITS, MIN_BITS, QUANTIZERS, types_of
from varptq.settings import Settings

# Shift-and-sum cuts a step into 2^3 at most (the paper); integer kernels keep values in a signed
# byte.
MAX_ORDER, MAX_STORED = 3, 127
# How the weights of an autoencoder's convolutions are stored: "int8" with their inputs in 8 bits.
Precision = Literal["float32", "bf16", "int8"]
# The type of a spec that names none.
USUAL_TYPE = "affine"


class TensorSpec(Settings):
    """How one kind of tensor becomes codes; field names follow compressed-tensors where it has one.

    type: a row of `QUANTIZERS`: "affine" (scale and zero point), "codebook" (entries for Gaussian
        values, 2 to 6 bits), "sign_split" (a scale per sign), "log2" and "uniform" (attention
        probabilities, scaled by their row maximum).
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
    type: str = USUAL_TYPE
    strategy: Literal["channel", "token", "group", "head"] = "token"
    group_size: int | None = Field(default=None, ge=8)
    fallback: bool = True
    row_multiple: int | None = Field(default=None, ge=1)
    range_rule: RangeRule = "with_zero"

    @field_validator("type")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in QUANTIZERS:
            raise ValueError(f"expected one of {', '.join(QUANTIZERS)}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        widths = QUANTIZERS[self.type].widths
        if self.num_bits not in widths:
            raise ValueError(
                f"num_bits {self.num_bits} with type {self.type!r}, "
                f"expected {widths[0]} to {widths[-1]}"
            )
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


def largest_stored(num_bits: int, order: int) -> int:
    """The largest integer a value of `num_bits` takes on a grid 2^order times finer."""
    return (2**num_bits - 1) << order


def finest_order(num_bits: int) -> int:
    """The finest order of shift-and-sum whose integers kernels can keep: 3 up to 4 bits, then 2, 1,
    and 0, no copies, from 7 bits on."""
    fits = (n for n in range(MAX_ORDER + 1) if largest_stored(num_bits, n) <= MAX_STORED)
    return max(fits, default=0)


def _usual_order(fields: dict[str, Any]) -> int:
    value = fields["value"]
    if value is not None and not QUANTIZERS[value.type].even_steps:
        return 0
    if value is None or fields["policy"] == "release":
        return MAX_ORDER
    return finest_order(value.num_bits)


def _allowed(spec: TensorSpec | None, operand: str) -> TensorSpec | None:
    """`spec` where a quantizer of that type serves the operand with that strategy."""
    served = types_of(operand)
    if spec is None or spec.strategy in served.get(spec.type, ()):
        return spec
    strategies = dict.fromkeys(served.get(spec.type) or (s for own in served.values() for s in own))
    raise ValueError(
        f"type {spec.type!r} with strategy {spec.strategy!r}, expected type {' or '.join(served)} "
        f"and strategy {' or '.join(strategies)}"
    )


# How keys and values may be cut under each attention policy: (key strategies, value strategies).
POLICIES = {
    "release": (("channel", "token"), ("head",)),
    "segment": (("token",), ("head",)),
    "token": (("token",), ("token",)),
}


class AttentionSpec(Settings):
    """The two attention products.

    policy: what range the values have, and whether codes of a token ever change.
        "release": values over all cached tokens of a head, as the released code; every code changes
        when the cache grows. "segment": values per head and scale, fixed when the scale enters the
        cache. "token": values per token, fixed; the scale of a token is folded into its
        probabilities before these are quantized, so it leaves the product's contraction axis.
    max_order: finest order of shift-and-sum. Left out it is the paper's 3 under "release"; under
        the others, whose values wait in the cache as integers, what these hold (`finest_order`);
        0, no copies, for values whose codes are no even steps.
    renormalize: divide each row by the sum of its quantized probabilities.
    """

    policy: Literal["release", "segment", "token"] = "release"
    query: TensorSpec | None
    key: TensorSpec | None
    probability: TensorSpec | None
    value: TensorSpec | None
    max_order: int = Field(default_factory=_usual_order, ge=0, le=MAX_ORDER)
    renormalize: bool = False

    @field_validator("query", "key", "probability", "value")
    @classmethod
    def _operand(cls, spec: TensorSpec | None, info: ValidationInfo) -> TensorSpec | None:
        return _allowed(spec, info.field_name or "")

    @model_validator(mode="after")
    def _policy_fits(self) -> Self:
        for what, spec, strategies in zip(
            ("key", "value"), (self.key, self.value), POLICIES[self.policy], strict=True
        ):
            if spec is not None and spec.strategy not in strategies:
                raise ValueError(
                    f"policy {self.policy!r} with {what} strategy {spec.strategy!r}, "
                    f"expected {' or '.join(strategies)}"
                )
        value = self.value
        if value is not None and self.max_order and not QUANTIZERS[value.type].even_steps:
            raise ValueError(
                f"max_order {self.max_order} with value type {value.type!r}, expected 0: shift-and-"
                "sum needs even steps"
            )
        return self


class InputTransform(Settings):
    """What is done to a Linear's input before it is quantized, folded into weight and bias
    (`varptq.quant.transforms`).

    smooth: multiply channels by a fitted diagonal, where what is before can take it in
    (`varptq.quant.folds`): mat_qkv, proj, fc1, the head, and most of what reads a text. center:
    subtract the calibrated mean of the token's scale. hadamard: rotate in blocks of this many
    channels. fallback: an input it does not divide takes the largest power of two below that does;
    without it that is an error.
    """

    smooth: bool = False
    center: bool = False
    hadamard: int | None = Field(default=None, ge=2, le=1024)

    fallback: bool = True

    @field_validator("hadamard")
    @classmethod
    def _power_of_two(cls, block: int | None) -> int | None:
        if block is not None and block & (block - 1):
            raise ValueError("expected a power of two")
        return block

    def block_for(self, row: int, layer: str) -> int | None:
        """Block size for inputs of `row` channels, or None for no rotation.

        Raises `ConfigError` naming the layer where the size does not divide the row and no
        fallback is allowed.
        """
        if self.hadamard is None:
            return None
        block = math.gcd(self.hadamard, row)
        if block < self.hadamard and not self.fallback:
            raise ConfigError(
                f"layer {layer}: hadamard {self.hadamard} does not divide its {row} input "
                "channels; choose another size or allow the fallback to a smaller one"
            )
        return block if block > 1 else None


class LinearSpec(Settings):
    """A Linear layer: weight and input, None keeps that side in float; and what is done to the
    input before.
    """

    weight: TensorSpec | None
    input: TensorSpec | None
    input_transform: InputTransform | None = None

    @field_validator("weight", "input")
    @classmethod
    def _operand(cls, spec: TensorSpec | None, info: ValidationInfo) -> TensorSpec | None:
        return _allowed(spec, info.field_name or "")


class LayerRule(Settings):
    """Changes for layers whose name matches `targets` (shell pattern, e.g. "blocks.*.ffn.fc2").

    A field given as None means float (no transform); a field not given stays as it was. Later
    rules win. `autoencoder` is for convolutions of the autoencoder (e.g. "decoder.up.0.*"), the
    other fields are for the transformer.
    """

    targets: str = Field(min_length=1)
    weight: TensorSpec | None = None
    input: TensorSpec | None = None
    input_transform: InputTransform | None = None
    attention: AttentionSpec | None = None
    autoencoder: Precision = "float32"

    @model_serializer(mode="wrap")
    def _only_what_was_said(self, handler: Any) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if k in self.model_fields_set}


class QuantConfig(Settings):
    """Specs per tensor kind plus rules per layer name. `QuantConfig.preset("w4a4")` is the usual
    way in.

    autoencoder: of its convolutions. "int8": weights in 8 bits per output channel; of the decoder,
    inputs in 8 bits per image, too. "bf16": weights rounded to bfloat16.
    """

    name: str
    linear: LinearSpec
    attention: AttentionSpec | None
    autoencoder: Precision = "float32"
    rules: tuple[LayerRule, ...] = ()

    def linear_for(self, layer: str) -> LinearSpec:
        """The spec of the Linear named `layer` after all rules."""
        changes: dict[str, Any] = {}
        for rule in self._matching(layer):
            said = rule.model_fields_set & set(LinearSpec.model_fields)
            changes |= {name: getattr(rule, name) for name in said}
        return self.linear.replace(**changes)

    def attention_for(self, layer: str) -> AttentionSpec | None:
        """The spec of the attention module named `layer` (e.g. "blocks.0.attn") after all rules."""
        spec = self.attention
        for rule in self._matching(layer):
            if "attention" in rule.model_fields_set:
                spec = rule.attention
        return spec

    def autoencoder_for(self, layer: str) -> Precision:
        """The precision of the autoencoder's convolution named `layer` after all rules."""
        found = self.autoencoder
        for rule in self._matching(layer):
            if "autoencoder" in rule.model_fields_set:
                found = rule.autoencoder
        return found

    def _matching(self, layer: str) -> list[LayerRule]:
        return [rule for rule in self.rules if fnmatchcase(layer, rule.targets)]

    def with_rules(self, *rules: LayerRule) -> QuantConfig:
        """The same config with more rules behind the present ones."""
        return self.replace(rules=(*self.rules, *rules))

    @classmethod
    def preset(cls, name: str) -> QuantConfig:
        """A preset by name, e.g. "w4a4" or "w4a4+litevar"; see `varptq.quant.presets`.

        Raises `ConfigError` for an unknown name, listing the known ones.
        """
        from varptq.quant.presets import preset

        return preset(name)
