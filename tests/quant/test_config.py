"""Configuration: presets, rules, round trips through plain values, one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from varptq.errors import ConfigError
from varptq.quant.config import (
    AttentionSpec,
    InputTransform,
    LayerRule,
    LinearSpec,
    QuantConfig,
    TensorSpec,
)
from varptq.quant.presets import BEYOND_PAPER, MODIFIERS, NAMES

FC2 = "blocks.3.ffn.fc2"
PRESETS = st.builds(
    lambda w, a, modifiers: "+".join([f"w{w}a{a}", *modifiers]),
    st.integers(2, 8),
    st.integers(2, 8),
    st.lists(st.sampled_from(sorted(MODIFIERS)), unique=True),
)


def plain(config: QuantConfig) -> dict[str, Any]:
    """As it would come back from a JSON file."""
    return json.loads(json.dumps(config.to_dict()))


def test_grouped_below_six_bits() -> None:
    config = QuantConfig.preset("w4a4+paper")
    weight, x = config.linear.weight, config.linear.input
    assert weight is not None and x is not None and config.attention is not None
    assert (weight.num_bits, weight.strategy, weight.group_size) == (4, "group", 128)
    assert (x.num_bits, x.strategy, x.group_size) == (4, "group", 64)
    key = config.attention.key
    assert key is not None and key.strategy == "token"


def test_whole_rows_from_six_bits_on() -> None:
    config = QuantConfig.preset("w6a6+paper")
    weight, x = config.linear.weight, config.linear.input
    assert weight is not None and x is not None and config.attention is not None
    assert (weight.strategy, x.strategy) == ("channel", "token")
    key = config.attention.key
    assert key is not None and key.strategy == "channel"


def test_sides_are_chosen_apart() -> None:
    linear = QuantConfig.preset("w4a8+paper").linear
    assert linear.weight is not None and linear.weight.strategy == "group"
    assert linear.input is not None and linear.input.strategy == "token"


@pytest.mark.parametrize("name", ["w4a4+paper", "w6a6+paper", "w2a8+paper"])
def test_fc2_input_is_sign_split(name: str) -> None:
    config = QuantConfig.preset(name)
    fc2, fc1 = config.linear_for(FC2), config.linear_for("blocks.3.ffn.fc1")
    assert fc2.input is not None and fc2.input.type == "sign_split"
    assert fc1.input is not None and fc1.input.type == "affine"
    assert fc2.weight == fc1.weight == config.linear.weight


def test_modifiers() -> None:
    config = QuantConfig.preset("w4a4+paper+litevar+skip-head+p8+released")
    assert (
        config.linear_for(FC2) == config.linear_for("head") == LinearSpec(weight=None, input=None)
    )
    assert config.linear_for("head_nm.ada_lin.1").weight is not None
    assert config.attention is not None and config.attention.probability is not None
    assert (config.attention.probability.type, config.attention.probability.num_bits) == (
        "uniform",
        8,
    )
    proj = config.linear_for("blocks.0.attn.proj")
    assert proj.weight is not None and proj.weight.range_rule == "min_max_clamped"
    assert proj.input is not None and proj.input.range_rule == "min_max"


@pytest.mark.parametrize("width", ["w4a4", "w4a6", "w4a8", "w6a6", "w8a8"])
def test_a_bare_name_is_what_measures_best(width: str) -> None:
    """The same parts at every width, in codes that never change once they are in the cache;
    codebooks, and rotations as wide as they go, where there would be groups."""
    bare, spelled = QuantConfig.preset(width), QuantConfig.preset(f"{width}+paper")
    for name in BEYOND_PAPER:
        spelled = MODIFIERS[name](spelled)
    narrow = "4" in width
    assert QuantConfig.preset(f"{width}+groups") == spelled.replace(name=f"{width}+groups")
    spelled = MODIFIERS["codebook"](spelled) if narrow else spelled
    assert bare == spelled.replace(name=width)
    assert bare.attention is not None and bare.attention.policy == "token"
    assert bare.attention.probability == TensorSpec(num_bits=8, type="uniform")
    transform = InputTransform(smooth=True, center=True, hadamard=1024 if narrow else 128)
    assert {bare.linear_for(n).input_transform for n in (FC2, "head")} == {transform}
    word_embed, fc2 = bare.linear_for("word_embed"), bare.linear_for(FC2)
    assert word_embed.weight is not None and word_embed.weight.num_bits == 8
    head = bare.linear_for("head")
    assert head.weight == bare.linear.weight
    assert head.input is not None and head.input.num_bits == 8
    assert fc2.input is not None and fc2.input.strategy == "token"
    assert fc2.input.type == ("codebook" if fc2.input.num_bits < 6 or width == "w4a6" else "affine")


def test_the_paper_assignment_stands_first() -> None:
    paper = QuantConfig.preset("w4a4+paper")
    assert paper.linear.input_transform is None
    assert paper.attention is not None and paper.attention.policy == "release"
    assert QuantConfig.preset("w4a4+paper+litevar").linear == paper.linear
    with pytest.raises(ConfigError, match=r"\+paper stands first, as in w4a4\+paper"):
        QuantConfig.preset("w4a4+litevar+paper")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("paper", "w4a4+paper"),
        ("balanced", "w4a4"),
        ("best", "w3a5+spread"),
        ("paper+litevar", "w4a4+paper+litevar"),
    ],
)
def test_names_of_their_own(name: str, meant: str) -> None:
    assert QuantConfig.preset(name) == QuantConfig.preset(meant).replace(name=name)


def test_spread_bits_are_those_of_their_kinds() -> None:
    best, least = QuantConfig.preset("best"), QuantConfig.preset("bops1")
    attention = best.attention
    assert attention is not None
    bits = [getattr(attention, name).num_bits for name in ("query", "key", "value", "probability")]
    assert bits == [6, 6, 6, 8]

    def widths(config: QuantConfig, layer: str) -> tuple[int, int]:
        found = config.linear_for(layer)
        assert found.weight and found.input
        assert {found.weight.type, found.input.type} == {"codebook"}
        return found.weight.num_bits, found.input.num_bits

    assert widths(best, "blocks.3.attn.mat_qkv") == widths(least, "blocks.0.attn.mat_qkv") == (3, 6)
    assert widths(best, "blocks.0.attn.proj") == (4, 6)
    assert widths(best, FC2) == (3, 5) and widths(least, FC2) == (2, 5)
    assert widths(least, "blocks.0.ada_lin.1") == widths(least, "head_nm.ada_lin.1") == (3, 6)
    # A family's own layers of the same kinds have the same bits.
    assert widths(best, "blocks.1.cross.mat_q") == (3, 6)
    assert widths(best, "shared_ada_lin.1") == (3, 6)


def test_groups_have_a_name_and_take_their_size() -> None:
    grouped = QuantConfig.preset("w4a4+groups+g32")
    fc2 = grouped.linear_for(FC2)
    assert fc2.input is not None and fc2.weight is not None
    assert (fc2.input.group_size, fc2.weight.group_size) == (32, 128)
    assert QuantConfig.preset("w8a8+g32") == QuantConfig.preset("w8a8").replace(name="w8a8+g32")


def test_smoothing_alone_leaves_the_quantizers() -> None:
    paper, smooth = QuantConfig.preset("w4a4+paper"), QuantConfig.preset("w4a4+paper+smooth")
    assert smooth.linear_for(FC2).input == paper.linear_for(FC2).input
    assert smooth.linear.input_transform == InputTransform(smooth=True)


@settings(deadline=None)
@given(PRESETS)
def test_every_preset_comes_back_from_plain_values(name: str) -> None:
    config = QuantConfig.preset(name)
    assert config.name == name
    again = QuantConfig.from_dict(plain(config))
    assert again == config and again.to_dict() == config.to_dict()
    for layer in (FC2, "head", "word_embed"):
        assert again.linear_for(layer) == config.linear_for(layer)


def test_a_rule_keeps_none_and_unset_apart() -> None:
    """None says float, nothing says as before: both must survive storing, copying and comparing."""
    rule = LayerRule(targets="head", weight=None)
    assert rule.to_dict() == {"targets": "head", "weight": None}
    config = QuantConfig.preset("w4a4+paper").with_rules(rule)
    for version in (config, QuantConfig.from_dict(plain(config)), config.replace(name="other")):
        head = version.linear_for("head")
        assert head.weight is None
        assert head.input == config.linear.input
    assert rule.replace(targets="x").to_dict() == {"targets": "x", "weight": None}
    assert rule.replace(input=None).to_dict() == {"targets": "head", "weight": None, "input": None}


def test_later_rules_win() -> None:
    two, three = (TensorSpec(num_bits=b, strategy="channel") for b in (2, 3))
    config = QuantConfig.preset("w8a8+paper").with_rules(
        LayerRule(targets="blocks.*", weight=two), LayerRule(targets="blocks.1.*", weight=three)
    )
    assert config.linear_for("blocks.0.attn.proj").weight == two
    assert config.linear_for("blocks.1.attn.proj").weight == three
    assert config.linear_for("head").weight == config.linear.weight


def test_attention_rules() -> None:
    rule = LayerRule(targets="blocks.0.attn", attention=None)
    config = QuantConfig.preset("w4a4+paper").with_rules(rule)
    for version in (config, QuantConfig.from_dict(plain(config))):
        assert version.attention_for("blocks.0.attn") is None
        assert version.attention_for("blocks.1.attn") == config.attention


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("w1a4+paper", ["weight bits 1", "2..8"]),
        ("w4a1+paper", ["activation bits 1", "2..8"]),
        ("w17a4+paper", ["weight bits 17", "2..8"]),
        ("w4a17+paper", ["activation bits 17", "2..8"]),
        ("int4", ["'int4'", "w<bits>a<bits>", "w4a4"]),
        ("", ["w<bits>a<bits>"]),
        ("W4A4", ["w<bits>a<bits>"]),
        ("w٤a4+paper", ["w<bits>a<bits>"]),
        ("w4a4+paper+lite", ["unknown modifier 'lite'", *(f"+{name}" for name in MODIFIERS)]),
        ("int4", ["+paper", *NAMES]),
        ("w4a4+paper+", ["unknown modifier ''"]),
    ],
)
def test_unknown_presets_name_the_known_ones(name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        QuantConfig.preset(name)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_bits": 1}, "TensorSpec: num_bits is 1: Input should be greater than or equal to 2"),
        ({"num_bits": 17}, "TensorSpec: num_bits is 17: Input should be less than or equal to 8"),
        ({}, "TensorSpec: num_bits: Field required"),
        ({"num_bits": 4, "tpye": "log2"}, "TensorSpec: unknown field 'tpye'"),
        (
            {"num_bits": 4, "row_multiple": True},
            "TensorSpec: row_multiple is True: expected a number",
        ),
        (
            {"num_bits": 4, "type": "fp4"},
            "TensorSpec: type is 'fp4': expected one of affine, codebook, sign_split, log2, "
            "uniform",
        ),
        (
            {"num_bits": 4, "strategy": "group"},
            "TensorSpec: strategy 'group' with group_size None: group_size goes with 'group' only",
        ),
        (
            {"num_bits": 4, "group_size": 64},
            "TensorSpec: strategy 'token' with group_size 64: group_size goes with 'group' only",
        ),
    ],
)
def test_bad_fields(values: dict[str, Any], message: str) -> None:
    for make in (lambda: TensorSpec(**values), lambda: TensorSpec.from_dict(values)):
        with pytest.raises(ConfigError) as error:
            make()
        assert str(error.value) == message


def edited(path: list[str | int], value: Any) -> dict[str, Any]:
    """The plain values of w4a4+paper with one place changed."""
    values = plain(QuantConfig.preset("w4a4+paper"))
    place: Any = values
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (edited(["bits"], 4), "QuantConfig: unknown field 'bits'"),
        (
            edited(["linear", "weight", "bits"], 4),
            "QuantConfig: linear.weight: unknown field 'bits'",
        ),
        (
            edited(["rules", 0, "input", "num_bits"], 99),
            "QuantConfig: rules.0.input.num_bits is 99: Input should be less than or equal to 8",
        ),
        (edited(["rules", 0, "target"], "x"), "QuantConfig: rules.0: unknown field 'target'"),
        (
            edited(["attention", "value", "type"], "log2"),
            "QuantConfig: attention.value: type 'log2' with strategy 'head', "
            "expected type affine or codebook and strategy head or token",
        ),
        (
            edited(["linear", "weight", "group_size"], None),
            "QuantConfig: linear.weight: strategy 'group' with group_size None: "
            "group_size goes with 'group' only",
        ),
        (
            edited(["linear"], "w4"),
            "QuantConfig: linear is 'w4': Input should be a valid dictionary or instance of "
            "LinearSpec",
        ),
        ([], "QuantConfig: expected a mapping, got list"),
        ({1: 2}, "QuantConfig: unknown field '1'"),
    ],
)
def test_a_bad_place_is_named_from_the_top(values: Any, message: str) -> None:
    if values == {1: 2}:
        values = {**plain(QuantConfig.preset("w4a4+paper")), **values}
    with pytest.raises(ConfigError) as error:
        QuantConfig.from_dict(values)
    assert str(error.value) == message


def test_operands_take_only_quantizers_that_exist() -> None:
    token, log2 = TensorSpec(num_bits=4), TensorSpec(num_bits=4, type="log2")
    with pytest.raises(ConfigError, match="weight: type 'affine' with strategy 'token', expected"):
        LinearSpec(weight=token, input=token)
    with pytest.raises(ConfigError, match="query: type 'log2' with strategy 'token', expected"):
        AttentionSpec(query=log2, key=None, probability=log2, value=None)


def test_settings_are_frozen_and_hashable() -> None:
    config = QuantConfig.preset("w4a4+paper")
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(config) == hash(QuantConfig.preset("w4a4+paper"))
    assert config.replace(name="other").name == "other" and config.name == "w4a4+paper"
    with pytest.raises(ConfigError, match="unknown field 'nmae'"):
        config.replace(nmae="other")


def test_group_for() -> None:
    weight, x = (
        QuantConfig.preset("w4a4+paper").linear.weight,
        QuantConfig.preset("w4a4+paper").linear.input,
    )
    assert weight is not None and x is not None
    assert [weight.group_for(row, "head") for row in (128, 256, 192, 32)] == [128, 128, None, None]
    # 64 divides 192, but the released code asks that 128 does before it groups.
    assert [x.group_for(row, "head") for row in (128, 192, 32)] == [64, None, None]
    assert TensorSpec(num_bits=8).group_for(37, "head") is None


def test_group_for_without_fallback_names_the_layer() -> None:
    spec = TensorSpec(num_bits=4, strategy="group", group_size=128, fallback=False)
    assert [spec.group_for(row, "head") for row in (256, 32)] == [128, None]
    with pytest.raises(ConfigError) as error:
        spec.group_for(192, "blocks.0.attn.proj")
    assert str(error.value) == (
        "layer blocks.0.attn.proj: group_size 128 needs a multiple of 128 input channels, "
        "found 192; choose another size or allow the fallback to whole rows"
    )
    with pytest.raises(ConfigError, match="group_size 64 needs a multiple of 128 input"):
        spec.replace(group_size=64, row_multiple=128).group_for(192, "head")


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_from_file(tmp_path: Path, suffix: str) -> None:
    config = QuantConfig.preset("w4a4+paper+litevar")
    path = tmp_path / f"quant{suffix}"
    # JSON is YAML.
    path.write_text(json.dumps(config.to_dict()))
    assert QuantConfig.from_file(path) == config


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"{", "not valid JSON"),
        ("a.yaml", b"a: [", "not valid YAML"),
        ("a.json", b"\xff\xfe", "cannot be read"),
        ("a.json", b"[1]", "expected a mapping, got list"),
        ("a.yaml", b"", "expected a mapping, got NoneType"),
        ("a.json", b'{"name": "a", "name": "a"}', "field 'name' stands twice"),
        ("a.json", b'{"linear": {"weight": 1, "weight": 2}}', "field 'weight' stands twice"),
        ("a.yaml", b"name: a\nlinear: {weight: 1, weight: 2}\n", "field 'weight' stands twice"),
        ("a.yaml", b"{name: a, linear: {weight: {num_bits: yes}}}", "num_bits is True: expected"),
        ("a.yaml", b"? [a]\n: 1\n", "not valid YAML"),
        ("a.yaml", b"!!map name", "not valid YAML"),
        ("absent.json", None, "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        QuantConfig.from_file(tmp_path / name)
    assert "\n" not in str(error.value)
