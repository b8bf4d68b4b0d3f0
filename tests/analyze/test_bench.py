"""The bench against converting afresh, and what a change of single tensors leaves alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from varptq.analyze.bench import FLOAT, Bench, Site, sites, spec_of, stripped, with_specs
from varptq.calibrate.means import center_inputs
from varptq.errors import InputError
from varptq.evaluate.tokens import token_fidelity
from varptq.models.pipeline import Pipeline
from varptq.models.seams import Mix
from varptq.quant.config import QuantConfig, TensorSpec
from varptq.quant.convert import convert
from varptq.quant.find import set_theta
from varptq.quant.pipeline import QuantizedPipeline
from varptq.quant.presets import from_bits

PRESETS = (
    "w4a4+paper",
    "w6a4+paper+p8",
    "w4a8+paper+litevar",
    "w6a6+paper+released",
    "w4a4+paper+center+rotate+renorm",
)


def spec_for(site: Site, bits: int) -> TensorSpec:
    spec = spec_of(from_bits(bits, bits), site)
    assert spec is not None
    return spec


def fresh_kl(pipe: Pipeline, config: QuantConfig, bench: Bench, theta: float | None) -> list[float]:
    """What a user would measure: convert the whole model, compare with the float one."""
    model = convert(pipe.var, config)
    center_inputs(pipe, model, bench.samples)
    set_theta(model, theta)
    quantized = dataclasses.replace(pipe, var=model)
    seen = bench.samples
    found = token_fidelity(pipe, quantized, seen.prompts, seen.tokens, batch_size=2)
    return [found.kl, *found.kl_per_scale]


@st.composite
def configs(draw: st.DrawFn, pipe: Pipeline) -> QuantConfig:
    """A preset or the float model, with a few single tensors changed."""
    config = draw(st.sampled_from([FLOAT, *map(QuantConfig.preset, PRESETS)]))
    chosen = draw(st.lists(st.sampled_from(sites(pipe.var)), max_size=3, unique=True))
    bits = st.sampled_from([None, 2, 3, 5, 8])
    drawn = {site: draw(bits) for site in chosen}
    return with_specs(config, {s: None if b is None else spec_for(s, b) for s, b in drawn.items()})


@pytest.mark.slow
@settings(max_examples=6)
@given(data=st.data())
def test_the_way_to_a_config_does_not_matter(
    data: st.DataObject, tiny: Pipeline, bench: Bench
) -> None:
    for _ in range(3):
        config = data.draw(configs(tiny))
        theta = data.draw(st.sampled_from([None, 0.05]))
        found = bench.kl(config, theta)
        assert [found.kl, *found.kl_per_scale] == fresh_kl(tiny, config, bench, theta)


@pytest.mark.parametrize("preset", [*PRESETS, "w4a4+paper+segment", "w4a8+paper+token+qk8"])
def test_a_stripped_config_is_float_until_given_its_specs_back(
    preset: str, tiny: Pipeline, bench: Bench
) -> None:
    config = QuantConfig.preset(preset)
    floats, every = stripped(config), sites(tiny.var)
    assert all(spec_of(floats, site) is None for site in every)
    assert bench.kl(floats).kl < 1e-9
    back = with_specs(floats, {site: spec_of(config, site) for site in every})
    assert bench.kl(back) == bench.kl(config)


def test_the_float_model_has_no_error_and_stays_as_it_is(tiny: Pipeline, bench: Bench) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.var.state_dict().items()}
    bench.kl(QuantConfig.preset("w4a4+paper"))
    assert bench.kl(FLOAT) == (0.0, (0.0, 0.0, 0.0))
    assert all(torch.equal(before[name], t) for name, t in tiny.var.state_dict().items())
    assert {type(module) for module in tiny.var.modules()} == {
        type(module) for module in bench.var.modules()
    }


def test_sites_are_two_per_linear_and_four_per_attention(any_tiny: Pipeline) -> None:
    linears = [name for name, m in any_tiny.var.named_modules() if isinstance(m, nn.Linear)]
    mixes = [m for m in any_tiny.var.modules() if isinstance(m, Mix)]
    found = sites(any_tiny.var)
    assert len(set(found)) == len(found) == 2 * len(linears) + 4 * len(mixes)
    assert {site.layer for site in found if site.operand == "weight"} == set(linears)


@given(data=st.data())
def test_one_tensor_changes_and_no_other(data: st.DataObject, tiny: Pipeline) -> None:
    config = QuantConfig.preset(data.draw(st.sampled_from(PRESETS)))
    every = sites(tiny.var)
    chosen = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=4, unique=True))
    specs = {site: spec_for(site, 7) for site in chosen} | {chosen[0]: None}
    changed = with_specs(config, specs)
    for site in every:
        assert spec_of(changed, site) == specs.get(site, spec_of(config, site))
    assert QuantConfig.from_dict(changed.to_dict()) == changed


@pytest.mark.parametrize(
    ("site", "kind", "block"),
    [
        (Site("blocks.12.ffn.fc1", "input"), "fc1 input", 12),
        (Site("blocks.0.ada_lin.1", "weight"), "ada_lin weight", 0),
        (Site("blocks.3.attn", "key"), "key", 3),
        (Site("head_nm.ada_lin.1", "weight"), "head_nm.ada_lin weight", None),
        (Site("shared_ada_lin.1", "input"), "shared_ada_lin input", None),
        (Site("head", "weight"), "head weight", None),
    ],
)
def test_a_site_knows_its_kind_and_block(site: Site, kind: str, block: int | None) -> None:
    assert (site.kind, site.block) == (kind, block)


def test_a_quantized_model_is_refused(tiny: Pipeline, ids: Tensor) -> None:
    config = QuantConfig.preset("w4a4+paper")
    quantized = QuantizedPipeline(tiny.var, tiny.vae, "q", config=config, method="rtn")
    with pytest.raises(InputError, match="already quantized"):
        Bench(quantized, torch.tensor([0, 1, 2]), ids)
