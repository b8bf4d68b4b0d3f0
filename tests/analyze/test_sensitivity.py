"""Sensitivities against whole conversions, and what is measured of which tensor."""

from __future__ import annotations

import dataclasses

import pytest

from varptq.analyze.bench import FLOAT, Bench, Site, sites, spec_of, with_specs
from varptq.analyze.sensitivity import GROUPS, put_back_groups, sensitivities, spec_at
from varptq.evaluate.tokens import token_fidelity
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.quant.quantizers import QUANTIZERS

W4A4 = QuantConfig.preset("w4a4+paper")


def kl_of(pipe: Pipeline, config: QuantConfig, bench: Bench) -> float:
    quantized = dataclasses.replace(pipe, var=convert(pipe.var, config))
    seen = bench.samples
    return token_fidelity(pipe, quantized, seen.prompts, seen.tokens, batch_size=2).kl


@pytest.mark.slow
def test_every_tensor_alone_and_put_back(tiny: Pipeline, bench: Bench) -> None:
    calls: list[tuple[int, int]] = []

    def listen(stage: str, done: int, total: int, info: str = "") -> None:
        calls.append((done, total))

    found = sensitivities(bench, W4A4, (8, 3), listen)
    every = sites(tiny.var)
    assert [row.site for row in found if row.type != "uniform"] == every
    assert [row.site for row in found if row.type == "uniform"] == [
        site for site in every if site.operand == "probability"
    ]
    assert calls[0][0] == 0 and calls[-1] == (3 * len(found), 3 * len(found))
    for row in found[::5]:
        spec = spec_at(W4A4, row.site, 3, row.type)
        alone = with_specs(FLOAT, {row.site: spec})
        assert row.alone[3].kl == kl_of(tiny, alone, bench) > 0
        if row.put_back:
            assert row.put_back.kl == kl_of(tiny, with_specs(W4A4, {row.site: None}), bench)
        assert (row.put_back is None) == (row.type == "uniform")
    coarse, fine = (sum(row.alone[bits].kl for row in found) for bits in (3, 8))
    assert coarse > 5 * fine


@pytest.mark.slow
def test_what_a_config_keeps_in_float_is_measured_alone_only(bench: Bench) -> None:
    found = sensitivities(bench, QuantConfig.preset("w4a4+paper+litevar"), (4,))
    fc2 = [row for row in found if row.site.layer.endswith("fc2")]
    assert len(fc2) == 4 and all(row.put_back is None and row.alone[4].kl > 0 for row in fc2)
    assert {row.type for row in fc2 if row.site.operand == "input"} == {"sign_split"}


@pytest.mark.parametrize(
    "preset",
    ["w4a4+paper", "w6a6+paper+released", "w4a8+paper+p8", "w4a4+paper+token", "w4a4+paper+rotate"],
)
def test_a_spec_at_another_width_keeps_type_and_ranges(preset: str, tiny: Pipeline) -> None:
    config = QuantConfig.preset(preset)
    for site in sites(tiny.var):
        own = spec_of(config, site)
        assert own is not None
        assert spec_at(config, site, own.num_bits) == own
        other = spec_at(config, site, 5)
        assert (other.num_bits, other.type, other.range_rule) == (5, own.type, own.range_rule)
        assert site.operand in ("weight", "input") or other.strategy == own.strategy


def test_a_type_gives_way_at_a_width_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for 2 to 6 bits is measured at 8 as the usual one, which a suggestion may pick."""
    few = dataclasses.replace(QUANTIZERS["affine"], widths=range(2, 7))
    monkeypatch.setitem(QUANTIZERS, "few", few)
    site = Site("head", "weight")
    own = spec_of(W4A4, site)
    assert own is not None
    config = with_specs(W4A4, {site: own.replace(type="few")})
    assert [spec_at(config, site, bits).type for bits in (4, 6, 8)] == ["few", "few", "affine"]
    assert spec_at(config, site, 8, "few").num_bits == 8


@pytest.mark.parametrize("policy", ["release", "segment", "token"])
def test_an_operand_left_in_float_gets_a_quantizer_its_policy_knows(
    policy: str, bench: Bench
) -> None:
    preset = "w4a4+paper" if policy == "release" else f"w4a4+paper+{policy}"
    attention = [Site("blocks.0.attn", operand) for operand in ("key", "value")]
    config = with_specs(QuantConfig.preset(preset), dict.fromkeys(attention))
    for site in attention:
        given = with_specs(config, {site: spec_at(config, site, 8)})
        assert bench.kl(given).kl > 0


def test_groups_put_back_together_are_the_float_model(tiny: Pipeline, bench: Bench) -> None:
    every = sites(tiny.var)
    assert all(sum(belongs(site) for belongs in GROUPS.values()) == 1 for site in every)
    found = put_back_groups(bench, W4A4)
    assert list(found) == list(GROUPS)
    weights = dict.fromkeys(site for site in every if site.operand == "weight")
    assert found["weights"].kl == kl_of(tiny, with_specs(W4A4, weights), bench)
    assert "weights" not in put_back_groups(bench, with_specs(W4A4, weights))
