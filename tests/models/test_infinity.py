"""Infinity as a family: drawn, sized, quantized, stored, at the sizes that were published."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import varptq
from helpers.checkpoint_states import one_line
from helpers.infinity_states import ARCH, PRESET, SCALES, VAE_ARCH, features, prompts
from varptq.errors import ConfigError, InputError
from varptq.models.families import family
from varptq.models.infinity.document import InfinityDocument
from varptq.models.infinity.guidance import with_mixtures
from varptq.models.infinity.schedules import schedule_for
from varptq.models.infinity.transformer import Infinity
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS
from varptq.models.rotary import nearest, rotary
from varptq.models.scales import Scales
from varptq.quant.describe import bops_account

# As published, with the share that rounding leaves open.
COUNTS = {
    "infinity-2b": (2.2046e9, 5e-5),
    "infinity-8b": (8.3758e9, 5e-5),
    "infinity-125m": (0.125e9, 5e-3),
}
VAE_COUNTS = {"infinity-2b": 110.1e6, "infinity-8b": 81.6e6}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", PRESET)


@pytest.fixture
def tiny() -> Pipeline:
    return varptq.build_model("tiny", seed=1)


def test_it_draws_at_any_size_whatever_the_batch(tiny: Pipeline) -> None:
    asked = prompts(3, 5, 1, 3)
    out = varptq.generate(tiny, asked, seed=1, cfg=2.0)
    assert out.images is not None and out.images.shape == (4, 3, 12, 8)
    assert out.tokens.shape == (4, 11, 16) and set(out.tokens.unique().tolist()) == {0, 1}
    alone = varptq.generate(tiny, asked[1:], seed=1, cfg=2.0, first_index=1, batch_size=1)
    assert torch.equal(alone.tokens, out.tokens[1:])
    wide = varptq.generate(tiny, features(2), seed=1, size=Scales((1, (2, 5)), (4, 10)))
    assert wide.images is not None and wide.images.shape == (1, 3, 8, 20)
    named = tiny.sized("0.06M:1.5")
    assert named.scales == schedule_for((336, 224)) and tiny.scales == SCALES
    assert named.var.pos_start is tiny.var.pos_start and named.vae.image_size == (84, 56)
    with pytest.raises(InputError) as caught:
        tiny.over(Scales(range(1, 18)))
    one_line(caught, "at most 15")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("2M", "0.06M, 0.25M, 0.60M, 1M"),
        ("1M:tall", ":RATIO"),
        ((1000, 1000), "nearest is 1024x1024"),
        ((0, 3), "not one"),
        (7, "in pixels"),
    ],
)
def test_sizes_that_there_are_not(tiny: Pipeline, size: object, words: str) -> None:
    with pytest.raises(InputError) as caught:
        varptq.generate(tiny, prompts(2), size=size)
    one_line(caught, "size", words)


def test_it_is_drawn_as_published(tiny: Pipeline) -> None:
    own = tiny.var.sampling
    assert (own.cfg, own.tau, own.top_p) == (3.0, 0.5, 0.97)
    assert tiny.var.strengths(3.0) == (2.0, 2.0, 2.0)
    assert tiny.var.strengths((1.0, 2.5, 3.0)) == (0.0, 1.5, 2.0)
    large = PRESETS["infinity-8b"].transformer_arch
    with torch.device("meta"):
        assert Infinity(large).sampling.tau == 1.0


def test_ties_of_positions_go_to_the_even_neighbour() -> None:
    assert [nearest(i, 4, 6) for i in range(4)] == [0, 2, 3, 4]
    assert [nearest(i, 4, 2) for i in range(4)] == [0, 0, 1, 2]
    assert nearest(27, 54, 111) == 56


def test_rotary_tables_serve_a_pass_with_gradients(tiny: Pipeline) -> None:
    with torch.inference_mode():
        tables = rotary(Scales((1, 3), (9, 9)), 8, torch.device("cpu"))
    assert not tables.cos_Lp.is_inference()


def test_guidance_beyond_the_blocks(tiny: Pipeline) -> None:
    stages = tiny.var.stages(tiny.var.condition(prompts(2).guided()))
    for place in (1, -4):
        with pytest.raises(ConfigError) as caught:
            with_mixtures(stages, [2.0] * 3, [place])
        one_line(caught, "-3..-1")
        with pytest.raises(ConfigError) as caught:
            varptq.generate(tiny, prompts(2), guide_at=[0, place])
        one_line(caught, f"guide_at {place}", "-3..-1")
    with pytest.raises(ConfigError) as caught:
        varptq.generate(tiny, prompts(2), guide_at=[])
    one_line(caught, "guide_at: empty")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unguided", "words"),
    [
        ({"cfg": 1.0}, "with cfg 1.0 no scale is guided"),
        ({"cfg": [1, 1, 1]}, "with cfg (1.0, 1.0, 1.0)"),
        ({"cfg": [1, 1, 4], "guided_scales": 2}, "with guided_scales 2"),
        ({"guided_scales": 0}, "with guided_scales 0"),
    ],
)
def test_a_negative_prompt_wants_guidance(
    tiny: Pipeline, unguided: dict[str, Any], words: str
) -> None:
    against = prompts(2)
    for asked, negative in ((prompts(3), against), (prompts(3).instead_of(against), None)):
        with pytest.raises(InputError) as caught:
            varptq.generate(tiny, asked, negative=negative, **unguided)
        one_line(caught, "negative: ", words, "leave the negative prompt out")
    varptq.generate(tiny, prompts(3), negative=against, cfg=[1, 4, 1], decode=False)


def test_it_is_quantized_saved_and_loaded(tiny: Pipeline, tmp_path: Path) -> None:
    """In one config; calibrate/test_texts.py has the others."""
    asked = prompts(3, 5, 1, 3)
    with pytest.raises(InputError, match="wants prompts="):
        tiny.pool()
    q = varptq.quantize(
        tiny.drawing_for(asked),
        varptq.QuantConfig.preset("w4a4"),
        method="rtn",
        calibration=varptq.CalibrationConfig(num_samples=4),
    )
    varptq.save(q, tmp_path / "artifact")
    drawn = varptq.generate(q, asked, seed=1).tokens
    loaded = varptq.load(tmp_path / "artifact", runtime="simulated")
    assert (loaded.family, loaded.var.arch, loaded.vae.arch) == ("infinity", ARCH, VAE_ARCH)
    assert torch.equal(varptq.generate(loaded, asked, seed=1).tokens, drawn)
    integers = varptq.load(tmp_path / "artifact", runtime="reference")
    assert varptq.generate(integers, asked, seed=1).tokens.shape == drawn.shape


def test_bit_operations_of_a_block(tiny: Pipeline) -> None:
    kinds = bops_account(tiny.var, None).by_kind()
    text, tokens, width = 64, SCALES.num_tokens, ARCH.width
    assert kinds["cross_kv"] == 16**2 * ARCH.depth * 2 * width**2 * text
    assert kinds["cross_query_key"] == 16**2 * ARCH.depth * width * tokens * text
    assert kinds["shared_ada_lin"] == 16**2 * 6 * width**2
    longer = bops_account(tiny.var, None, text=200).by_kind()
    assert longer["cross_kv"] * text == kinds["cross_kv"] * 200
    assert longer["pool_proj"] == kinds["pool_proj"] and longer["fc1"] == kinds["fc1"]


# Shares of Linears in blocks, self-attention, cross-attention and its keys and values, in percent
# of all multiply-adds, at 64 and 512 tokens of a prompt; then all of them at 64, in 10^12.
SHARES = {
    ("infinity-2b", "0.06M"): ((95.5, 2.3, 0.4, 1.7), (82.7, 2.0, 3.0, 11.6), None),
    ("infinity-2b", "0.25M"): ((89.4, 9.9, 0.4, 0.3), None, None),
    ("infinity-2b", "1M"): ((68.5, 31.1, 0.3, 0.1), (66.8, 30.3, 2.4, 0.5), 28.9),
    ("infinity-8b", "0.06M"): ((96.7, 1.3, 0.3, 1.7), (84.8, 1.2, 1.7, 11.9), None),
    ("infinity-8b", "0.25M"): ((93.5, 5.9, 0.2, 0.3), None, None),
    ("infinity-8b", "1M"): ((79.2, 20.5, 0.2, 0.1), (77.7, 20.2, 1.6, 0.5), 95.6),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), list(SHARES))
def test_shares_of_published_models(name: str, size: str) -> None:
    """Counted by hand from the published sizes."""
    preset, (usual, long, total) = PRESETS[name], SHARES[name, size]
    var, _ = family("infinity").build(preset.transformer_arch, preset.autoencoder_arch)
    var = var.over(schedule_for(size))
    for text, shares in ((64, usual), (512, long)):
        kinds = bops_account(var, None, text=text).by_kind()
        linears = ("mat_qkv", "proj", "cross_q", "cross_proj", "fc1", "fc2")
        parts = (
            sum(kinds[kind] for kind in linears),
            kinds["query_key"] + kinds["probability_value"],
            kinds["cross_query_key"] + kinds["cross_probability_value"],
            kinds["cross_kv"],
        )
        found = [100 * part / sum(kinds.values()) for part in parts]
        assert shares is None or found == pytest.approx(shares, abs=0.06)
        if text == 64 and total is not None:
            assert sum(kinds.values()) / 256e12 == pytest.approx(total, abs=0.05)


def test_a_large_model_is_never_there_twice() -> None:
    """Built empty, it is filled in its own dtype."""
    row = family("infinity")
    var, vae = row.build(ARCH, VAE_ARCH)
    assert all(tensor.is_meta for tensor in var.state_dict().values())
    var.to(dtype=torch.bfloat16)
    row.randomize(var, vae, torch.Generator().manual_seed(0))
    found = var.state_dict().values()
    assert {(t.dtype, t.device.type) for t in found} == {(torch.bfloat16, "cpu")}
    wide = varptq.build_model("tiny", seed=0)
    small = varptq.build_model("tiny", seed=0, dtype="bfloat16")
    for a, b in zip(wide.var.parameters(), small.var.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
    assert varptq.generate(small, prompts(2), seed=1).tokens.shape == (1, 11, 16)


@pytest.mark.parametrize("name", list(COUNTS))
def test_published_models_have_their_sizes(name: str) -> None:
    preset = PRESETS[name]
    var, vae = family("infinity").build(preset.transformer_arch, preset.autoencoder_arch)
    count = sum(parameter.numel() for parameter in var.parameters())
    published, share = COUNTS[name]
    assert abs(count / published - 1) < share
    if name in VAE_COUNTS:
        count = sum(parameter.numel() for parameter in vae.parameters())
        assert abs(count / VAE_COUNTS[name] - 1) < 1e-3
    assert isinstance(var, Infinity) and var.scales == var.schedule(preset.size)


def test_the_document_of_an_artifact() -> None:
    document = InfinityDocument.of(ARCH, VAE_ARCH)
    again = InfinityDocument.from_dict(document.to_dict())
    assert again.archs() == (ARCH, VAE_ARCH)
    whole = dataclasses.replace(ARCH, scales=schedule_for("1M:0.333"))
    assert InfinityDocument.of(whole, VAE_ARCH).archs()[0] == whole
    for changes in ({"num_heads": 3}, {"pool_heads": 3}, {"levels": 2}, {"token_bits": 8}):
        with pytest.raises(ConfigError):
            InfinityDocument.of(dataclasses.replace(ARCH, **changes), VAE_ARCH)
