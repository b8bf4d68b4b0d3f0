"""Presets of `QuantConfig` by name: "w<bits>a<bits>" with any of the modifiers joined by "+".

The bare name is what measures best among what integers can execute (docs/quality.md): inputs
smoothed, centred and rotated, probabilities uniform at 8 bits, word_embed and the head's input at 8
bits, keys and values on a scale per token; below 6 bits, codebooks without groups; and the
autoencoder in 8 bits but for the ends of its networks. "w<bits>a<bits>+paper" is the paper's
assignment of quantizers (docs/method.md section 2), whose autoencoder stays in float. Further
modifiers change one thing each of either and apply in the order written:

    litevar     fc2 stays in float (LiteVAR)          skip-head   the head stays in float
    released    ranges as the released code           p8          probabilities uniform, 8 bits
    renorm      rows of quantized probabilities       qk6, qk8    queries and keys at 6 or 8 bits
                sum to one                            v6, v8      values at 6 or 8 bits
    smooth      Linear inputs on a fitted diagonal    edges8      word_embed and head at 8 bits
    center      Linear inputs less their mean         io8         the same, head weight as it was
    rotate      Linear inputs in Hadamard blocks      g32         grouped inputs in groups of 32
    segment     values per head and scale             token       values per token
    codebook    codebooks without groups up to        proj8       the input of proj at 8 bits
                6 bits, 8 bits as they are            groups      uniform steps in groups where a
                                                                  bare name has codebooks
    vae8        the autoencoder in 8 bits         vae16       its weights in bfloat16
    vae32       the autoencoder in float

"bops1" and "best" spread bits over kinds of layers, as the search of `varptq analyze --frontier`
found for 1.00 and 1.15 times the bit operations of w4a4+paper; they take modifiers too. "paper" and
"balanced" are names of their own for w4a4+paper and w4a4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from varptq.errors import ConfigError
from varptq.quant.affine import RangeRule
from varptq.quant.config import (
    USUAL_TYPE,
    AttentionSpec,
    InputTransform,
    LayerRule,
    LinearSpec,
    Precision,
    QuantConfig,
    TensorSpec,
)
from varptq.quant.quantizers import MAX_BITS, MIN_BITS, QUANTIZERS, types_of

# The released code switches to groups below this width (docs/method.md section 2: "b >= 6" against
# "b <= 5").
GROUPED_BELOW_BITS = 6
WEIGHT_GROUP, INPUT_GROUP = 128, 64
HADAMARD_BLOCK = 128
# Without groups a rotation may mix as much of the row as a power of two divides, up to this.
WIDEST_BLOCK = 1024
FC2, PROJ, WORD_EMBED, HEAD = "blocks.*.ffn.fc2", "blocks.*.attn.proj", "word_embed", "head"
# The first and the last convolution of an encoder and of a decoder.
ENDS = ("*.conv_in", "*.conv_out")
# The layers that presets have rules for. A family may have none of such a name.
QUERIES, OUTPUTS, ADALN = "blocks.*.mat_q*", "blocks.*.proj", "*ada_lin.1"
TARGETS = (FC2, PROJ, WORD_EMBED, HEAD, QUERIES, OUTPUTS, ADALN, *ENDS)
# Modifiers of every bare name, those of single ones, and the word that leaves them out.
BEYOND_PAPER = ("smooth", "center", "rotate", "p8", "io8", "token", "vae8")
PAPER, GROUPS = "paper", "groups"
CODEBOOK = "codebook"
BASE_NAME = r"w([0-9]+)a([0-9]+)"
NAMES = {"paper": "w4a4+paper", "balanced": "w4a4", "bops1": "w3a5+spread1", "best": "w3a5+spread"}

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
    bare = [*BEYOND_PAPER]
    if min(bits) < GROUPED_BELOW_BITS and GROUPS not in modifiers:
        bare.append(CODEBOOK)
    modifiers = modifiers[1:] if modifiers[:1] == [PAPER] else [*bare, *modifiers]
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


def _codebooks(config: QuantConfig) -> QuantConfig:
    """A scale per token, keys and values included, and per output row: codebooks where there are
    such widths. What is rotated is rotated in the widest blocks."""
    config = MODIFIERS["token"](config)
    linear, attention, how = config.linear, config.attention, config.linear.input_transform
    if how is not None and how.hadamard:
        linear = linear.replace(input_transform=how.replace(hadamard=WIDEST_BLOCK))
    assert attention is not None
    weight, x = _codebook(linear.weight, "weight"), _codebook(linear.input, "input")

    def without_groups(rule: LayerRule) -> LayerRule:
        both = {
            "weight": _codebook(rule.weight, "weight"),
            "input": _codebook(rule.input, "input"),
        }
        return rule.replace(**{k: spec for k, spec in both.items() if k in rule.model_fields_set})

    operands = {n: _codebook(getattr(attention, n), n) for n in ("query", "key", "value")}
    value = operands["value"]
    order = 0 if value is not None and value.type == CODEBOOK else attention.max_order
    return config.replace(
        linear=linear.replace(weight=weight, input=x),
        attention=attention.replace(**operands, max_order=order),
        rules=tuple(map(without_groups, config.rules)),
    )


def group_free(bits: int, operand: str) -> TensorSpec:
    """The quantizer of an operand without groups: a codebook where there is one of that width."""
    kind = CODEBOOK if bits in QUANTIZERS[CODEBOOK].widths else USUAL_TYPE
    strategy = "channel" if operand == "weight" else "token"
    return TensorSpec(num_bits=bits, type=kind, strategy=strategy)


def _codebook(spec: TensorSpec | None, operand: str) -> TensorSpec | None:
    if spec is None or spec.num_bits not in QUANTIZERS[CODEBOOK].widths:
        return spec
    return group_free(spec.num_bits, operand)


class Spread(NamedTuple):
    """Bits by kind of layer: of weight and input by pattern, and of attention."""

    linears: Mapping[str, tuple[int, int]]
    query_key: int
    value: int

    def apply(self, config: QuantConfig) -> QuantConfig:
        rules = (
            LayerRule(targets=targets, weight=group_free(w, "weight"), input=group_free(x, "input"))
            for targets, (w, x) in self.linears.items()
        )
        config = MODIFIERS["token"](config.with_rules(*rules))
        operands = {"query": self.query_key, "key": self.query_key, "value": self.value}
        specs = {name: group_free(bits, name) for name, bits in operands.items()}
        return _attention(config, max_order=0, **specs)


# AdaLN has 3 bits although the search takes 2: it was made on 10 classes, which rounding can fit.
SPREADS = {
    "spread1": Spread(
        {QUERIES: (3, 6), OUTPUTS: (3, 6), FC2: (2, 5), ADALN: (3, 6), HEAD: (4, 6)}, 5, 5
    ),
    "spread": Spread({QUERIES: (3, 6), OUTPUTS: (4, 6), ADALN: (3, 6), HEAD: (4, 6)}, 6, 6),
}


def _keep_float(*targets: str) -> Modifier:
    rules = [LayerRule(targets=target, weight=None, input=None) for target in targets]
    return lambda config: config.with_rules(*rules)


def _attention(config: QuantConfig, **changes: Any) -> QuantConfig:
    assert config.attention is not None
    return config.replace(attention=config.attention.replace(**changes))


def _operand_bits(bits: int, *operands: str) -> Modifier:
    def change(config: QuantConfig) -> QuantConfig:
        specs = {name: getattr(config.attention, name) for name in operands}
        return _attention(config, **{k: _sized(spec, bits) for k, spec in specs.items()})

    return change


def _sized(spec: TensorSpec, bits: int) -> TensorSpec:
    """`spec` at another width; affine where its own type has no such width."""
    known = bits in QUANTIZERS[spec.type].widths
    return spec.replace(num_bits=bits, type=spec.type if known else USUAL_TYPE)


def _policy(policy: str, value_strategy: str) -> Modifier:
    """Keys per token and values on fixed codes; ranges with zero, so that every zero point is a
    code and products of integers stay within 32 bits."""

    def change(config: QuantConfig) -> QuantConfig:
        spec = config.attention
        assert spec is not None and spec.query and spec.key and spec.value
        query = spec.query.replace(range_rule="with_zero")
        key = spec.key.replace(strategy="token", range_rule="with_zero")
        served = value_strategy in types_of("value")[spec.value.type]
        kind = spec.value.type if served else USUAL_TYPE
        value = spec.value.replace(type=kind, strategy=value_strategy, range_rule="with_zero")
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
            rule.replace(input=rule.input.replace(type=USUAL_TYPE))
            if rule.input and rule.input.type == "sign_split"
            else rule
            for rule in config.rules
        )
        return config.replace(linear=linear, rules=rules)

    return change


def _edges(bits: int, *, head_weight: bool) -> Modifier:
    """word_embed and the head; the head's weight at 8 bits costs as much as both its sides."""
    head: dict[str, Any] = {"weight": weight_spec(bits)} if head_weight else {}
    return lambda config: config.with_rules(
        LayerRule(targets=WORD_EMBED, weight=weight_spec(bits), input=input_spec(bits)),
        LayerRule(targets=HEAD, input=input_spec(bits), **head),
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


def _autoencoder(precision: Precision) -> Modifier:
    """Its convolutions at this precision. The ends cost as much as all between them, and hold
    hardly any weights, so they stay in float."""
    ends = ENDS if precision != "float32" else ()

    def change(config: QuantConfig) -> QuantConfig:
        others = (r for r in config.rules if "autoencoder" not in r.model_fields_set)
        rules = (*others, *(LayerRule(targets=end, autoencoder="float32") for end in ends))
        return config.replace(autoencoder=precision, rules=rules)

    return change


MODIFIERS: dict[str, Modifier] = {
    "litevar": _keep_float(FC2),
    "skip-head": _keep_float(HEAD),
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
    CODEBOOK: _codebooks,
    # What it leaves out is in `preset`.
    GROUPS: lambda config: config,
    **{name: spread.apply for name, spread in SPREADS.items()},
    "proj8": lambda config: config.with_rules(LayerRule(targets=PROJ, input=input_spec(8))),
    "vae8": _autoencoder("int8"),
    "vae16": _autoencoder("bf16"),
    "vae32": _autoencoder("float32"),
}


def _known() -> str:
    return ", ".join(f"+{name}" for name in (PAPER, *MODIFIERS))
