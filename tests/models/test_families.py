"""A family that `src` has never heard of goes through everything."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import varptq
from helpers.cli_calls import succeed
from helpers.dots_family import FAMILY, PRESET, DotsArch, PixelArch
from varptq.calibrate.config import CalibrationConfig
from varptq.errors import ArtifactError, ConfigError, InputError
from varptq.evaluate.tokens import token_fidelity
from varptq.models.families import FAMILIES, family
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS
from varptq.models.scales import Scales

FAST = CalibrationConfig(num_samples=5, steps=2, theta_samples=2)
POINTS = [(0.0, 1.0), (0.25, 0.5), (1.0, 1.0)]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "dots", FAMILY)
    monkeypatch.setitem(PRESETS, "dots", PRESET)


@pytest.fixture
def dots() -> Pipeline:
    return varptq.build_model("dots", seed=3)


def test_it_draws_by_draw_and_point(dots: Pipeline) -> None:
    out = varptq.generate(dots, POINTS, seed=1, cfg=2.0)
    assert out.tokens.shape == (3, 30, 3) and out.images is not None
    assert out.images.shape == (3, 3, 15, 15)
    assert set(out.tokens.unique().tolist()) == {0, 1}
    alone = varptq.generate(dots, POINTS[1:], seed=1, cfg=2.0, first_index=1, batch_size=1)
    assert torch.equal(alone.tokens, out.tokens[1:])
    forced = torch.full_like(out.tokens, -1)
    forced[:, 5:] = 1
    again = varptq.generate(dots, POINTS, seed=1, cfg=2.0, forced=forced).tokens
    assert torch.equal(again[:, :5], out.tokens[:, :5]) and bool((again[:, 5:] == 1).all())
    with pytest.raises(InputError, match="pairs of numbers"):
        varptq.generate(dots, ["ship"])
    with pytest.raises(InputError, match="more_smooth"):
        varptq.generate(dots, POINTS, more_smooth=True)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["w8a8", "w4a4", "w4a4+paper"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "sas"])
def test_it_is_quantized_saved_loaded_and_runs_on_integers(
    dots: Pipeline, method: str, config: str, tmp_path: Path
) -> None:
    q = varptq.quantize(
        dots, varptq.QuantConfig.preset(config), method=method, calibration=FAST, seed=0
    )
    if method != "rtn":
        found = [unit["name"] for unit in q.report["units"]]
        assert found[:4] == ["word_embed", "blocks.0.ada", "blocks.0.attn", "blocks.0.ffn"]
        assert found[4] == "blocks.0.gate" and found[-1] == "head"
    varptq.save(q, tmp_path / "artifact")
    drawn = varptq.generate(q, POINTS, seed=1).tokens
    runtimes = ["simulated", "reference", "cpu"][: 2 if config.endswith("paper") else 3]
    for runtime in runtimes:
        loaded = varptq.load(tmp_path / "artifact", runtime=runtime)
        assert (loaded.family, loaded.runtime) == ("dots", runtime)
        tokens = varptq.generate(loaded, POINTS, seed=1).tokens
        agreement = float((tokens == drawn).double().mean())
        assert agreement == 1 if runtime == "simulated" else agreement > 0.9
        if runtime != "simulated":
            one = varptq.generate(loaded, POINTS[2:], seed=1, first_index=2, batch_size=1).tokens
            assert torch.equal(one[0], tokens[2])
    fidelity = token_fidelity(dots, q, POINTS, varptq.generate(dots, POINTS, seed=2).tokens)
    assert 0 < fidelity.kl < (0.2 if config == "w8a8" else 20) and fidelity.top1 > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("size", [(3, 5), Scales([1, 2, (4, 3), (6, 4)])])
def test_a_request_brings_its_own_maps(dots: Pipeline, size: Any, tmp_path: Path) -> None:
    """Rectangles and another number of scales, from one artifact made for squares."""
    height, width = size.last if isinstance(size, Scales) else size
    config = varptq.QuantConfig.preset("w8a8")
    varptq.save(varptq.quantize(dots, config, calibration=FAST), tmp_path / "artifact")
    drawn = varptq.generate(dots, POINTS, seed=1, size=size)
    assert drawn.images is not None and drawn.images.shape == (3, 3, 3 * height, 3 * width)
    view = dots.sized(size)
    assert view.var.blocks is dots.var.blocks and dots.scales.plain() == [1, 2, 5]
    assert torch.equal(view.vae.encode(drawn.images * 2 - 1), view.vae.encode(drawn.images * 2 - 1))
    picture = Image.fromarray((drawn.images[0].permute(1, 2, 0) * 255).byte().numpy())
    for runtime in ("simulated", "reference", "cpu"):
        loaded = varptq.load(tmp_path / "artifact", runtime=runtime)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "scale 4 was not calibrated")
            tokens = varptq.generate(loaded, POINTS, seed=1, size=size).tokens
            edited = varptq.edit(
                loaded.sized(size), picture, task="outpaint", box=(0.1, 0.1, 0.8, 0.9), raw=True
            )
            if runtime != "simulated":
                one = varptq.generate(loaded, POINTS[1:2], seed=1, size=size, first_index=1)
                assert torch.equal(one.tokens[0], tokens[1])
        assert float((tokens == drawn.tokens).double().mean()) > 0.85
        assert edited.images[0].size == (3 * width, 3 * height)


def test_a_model_of_learned_positions_draws_at_its_own_size_only() -> None:
    pipe = varptq.build_model("demo")
    with pytest.raises(InputError, match="model 'demo': size '1M': this model draws at one size"):
        varptq.generate(pipe, ["ship"], size="1M")
    with pytest.raises(InputError, match=r"sides 1, 2: this model knows its own only, 1, 2, 3, 4"):
        varptq.generate(pipe, ["ship"], size=Scales((1, 2)))


def test_the_command_line_knows_what_to_do_with_it(dots: Pipeline, tmp_path: Path) -> None:
    words = ("--config", "w8a8", "--samples", 4, "--out", tmp_path / "artifact")
    succeed("quantize", "--random", "dots", *words)
    document = succeed("info", tmp_path / "artifact", "--json").document
    assert document["family"] == "dots" and document["architecture"]["sides"] == [1, 2, 5]
    assert set(document["bops"]["by_kind"]) >= {"ada", "gate", "mat_qkv", "head"}
    assert "3 of 2 symbols" in succeed("info", tmp_path / "artifact").out
    out = tmp_path / "evaluation"
    succeed("evaluate", tmp_path / "artifact", "--count", 6, "--random", "dots", "--out", out)
    assert (out / "report.html").exists()


def test_an_artifact_of_a_family_that_is_gone_is_refused(
    dots: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = varptq.QuantConfig.preset("w8a8+paper")
    varptq.save(varptq.quantize(dots, config, method="rtn"), tmp_path / "artifact")
    monkeypatch.delitem(FAMILIES, "dots")
    with pytest.raises(ArtifactError, match="family 'dots': unknown, expected one of var"):
        varptq.load(tmp_path / "artifact")
    with pytest.raises(ConfigError, match="unknown"):
        family("dots")


@pytest.mark.parametrize("sides", [(2, 3), (1, 4, 7, 8)])
def test_other_shapes_go_through_too(
    sides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arch = DotsArch(depth=1, width=32, num_heads=2, sides=sides, draws=5)
    preset = PRESET.__class__("dots", arch, PixelArch(2), None, "", "", family="dots")
    monkeypatch.setitem(PRESETS, "dots", preset)
    pipe = varptq.build_model("dots", seed=1)
    q = varptq.quantize(pipe, varptq.QuantConfig.preset("w4a4"), method="gptq", calibration=FAST)
    varptq.save(q, tmp_path / "artifact")
    loaded = varptq.load(tmp_path / "artifact")
    assert loaded.runtime == "cpu"
    assert varptq.generate(loaded, POINTS).tokens.shape == (3, pipe.scales.num_tokens, 5)
