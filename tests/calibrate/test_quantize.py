"""`quantize`: reports of the methods, the untouched float model, interruption, quality."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from varptq.calibrate import run as run_module
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.quantize import quantize
from varptq.calibrate.samples import calibration_set
from varptq.errors import ConfigError, InputError, NonFiniteError, VarptqError
from varptq.evaluate.tokens import TokenFidelity, token_fidelity
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline, load_model
from varptq.models.scales import Scales
from varptq.models.seams import linears_of
from varptq.quant.config import LayerRule, QuantConfig, TensorSpec
from varptq.quant.convert import check_groups, convert
from varptq.quant.describe import bops_account
from varptq.quant.find import quant_linears, quant_mixes
from varptq.quant.pipeline import QuantizedPipeline

W4A4, W8A8 = QuantConfig.preset("w4a4+paper"), QuantConfig.preset("w8a8+paper+p8")
# Few samples and steps: most of what is tested holds after any number of them.
CONFIG = CalibrationConfig(num_samples=5, steps=8, theta_samples=2, theta_grid=200)


def run(
    pipe: Pipeline, method: str = "sas", config: QuantConfig = W4A4, **options: Any
) -> QuantizedPipeline:
    return quantize(pipe, config, method=method, **{"calibration": CONFIG, **options})


def fidelity(pipe: Pipeline, quantized: Pipeline, count: int = 20, seed: int = 99) -> TokenFidelity:
    """On tokens of a seed no calibration here uses."""
    samples = calibration_set(
        pipe, CalibrationConfig(num_samples=count), seed=seed, resampled=False
    )
    return token_fidelity(pipe, quantized, samples.prompts, samples.tokens)


def codes_of(pipe: Pipeline) -> dict[str, Tensor]:
    return {name: layer.codes for name, layer in quant_linears(pipe.var).items()}


def test_nearest_rounding_needs_no_samples(
    any_tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("rtn makes no samples")

    monkeypatch.setattr(run_module, "calibration_set", refuse)
    result = run(any_tiny, "rtn")
    assert result.theta is None and result.report == {}
    plain = {
        name: layer.codes for name, layer in quant_linears(convert(any_tiny.var, W4A4)).items()
    }
    assert all(torch.equal(codes, plain[name]) for name, codes in codes_of(result).items())


@pytest.mark.slow
def test_sas_reports_every_part(any_tiny: Pipeline) -> None:
    result = run(any_tiny)
    assert set(result.report) == {"resampling", "theta", "units"}
    assert (result.method, result.seed, result.config) == ("sas", 0, W4A4)
    expected = CONFIG.replace(sampling=any_tiny.filled(CONFIG.sampling))
    assert CalibrationConfig.from_dict(result.calibration) == expected
    assert result.name == "tiny" and result.sources == any_tiny.sources
    assert result.class_names == any_tiny.class_names
    # A float autoencoder is another object on the same memory, as float parts of the transformer.
    both = [[p.data_ptr() for p in pipe.vae.parameters()] for pipe in (result, any_tiny)]
    assert both[0] == both[1] and result.vae is not any_tiny.vae
    json.dumps(result.report, allow_nan=False)  # plain values, all finite
    units = [unit["name"] for unit in result.report["units"]]
    assert units[0] == "word_embed" and units[-2:] == ["head_nm.ada_lin.1", "head"]
    assert len(units) == (8 if any_tiny.var.arch.shared_adaln else 9)
    assert len(result.report["resampling"]["scales"]) == any_tiny.scales.num_scales
    images = generate(result, [0, 1], seed=3).images
    assert images is not None and images.isfinite().all()


def test_no_learned_state_or_float_copy_is_left(tiny: Pipeline) -> None:
    layers = quant_linears(run(tiny).var).values()
    assert all(layer.rounding is None and layer.float_weight is None for layer in layers)


@pytest.mark.parametrize("preset", ["w4a4+paper", "w6a6+paper", "w4a8+paper+litevar"])
def test_theta_keeps_to_the_budget(tiny: Pipeline, preset: str) -> None:
    config = QuantConfig.preset(preset)
    result = run(tiny, "rtn+shift", config)
    theta = result.report["theta"]
    assert theta["status"] == "ok" and 0 < theta["theta"] < 1
    assert theta["total"] == bops_account(tiny.var, config).total
    assert theta["budget"] == CONFIG.budget * theta["total"]
    assert theta["overhead"] <= theta["budget"]
    assert result.theta == theta["theta"]
    assert all(mix.theta == result.theta for mix in quant_mixes(result.var))
    # One block and scale each; some tokens do get copies.
    found = [(stat["block"], stat["scale"]) for stat in theta["copies"]]
    assert found == [(block, scale) for block in (0, 1) for scale in (0, 1, 2)]
    assert any(stat["mean_copies"] > 1 for stat in theta["copies"])


@pytest.mark.parametrize(
    ("budget", "status", "theta"),
    [(0.0, "over_budget", None), (1e-6, "over_budget", None), (9.0, "budget_not_reached", 1 / 200)],
)
def test_budgets_that_cannot_be_met_or_filled_are_reported(
    tiny: Pipeline, budget: float, status: str, theta: float | None
) -> None:
    for method in ("rtn+shift", "brecq+shift"):
        result = run(tiny, method, calibration=CONFIG.replace(budget=budget, steps=1))
        assert result.report["theta"]["status"] == status
        assert result.theta == (None if theta is None else pytest.approx(theta))
        assert all(mix.theta == result.theta for mix in quant_mixes(result.var))


def test_without_a_budget_the_model_is_the_one_without_shift(tiny: Pipeline) -> None:
    shifted = run(tiny, "rtn+shift", calibration=CONFIG.replace(budget=0))
    labels, inputs = torch.tensor([0, 1]), torch.zeros(2, 13, 8)
    assert torch.equal(shifted.var(labels, inputs), run(tiny, "rtn").var(labels, inputs))


def test_attention_in_float_switches_shift_off(tiny: Pipeline) -> None:
    config = W4A4.with_rules(LayerRule(targets="blocks.*.attn", attention=None))
    result = run(tiny, "rtn+shift", config)
    assert result.theta is None and result.report["theta"]["status"] == "off"


def test_a_block_with_float_attention_keeps_the_others_numbers(tiny: Pipeline) -> None:
    config = W4A4.with_rules(LayerRule(targets="blocks.0.attn", attention=None))
    copies = run(tiny, "rtn+shift", config).report["theta"]["copies"]
    assert {stat["block"] for stat in copies} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["brecq", "sas"])
def test_same_seed_same_model(tiny: Pipeline, method: str) -> None:
    first, again, other = (run(tiny, method, seed=seed) for seed in (3, 3, 4))
    assert first.report == again.report and first.theta == again.theta
    assert all(torch.equal(c, codes_of(again)[name]) for name, c in codes_of(first).items())
    assert any(not torch.equal(c, codes_of(other)[name]) for name, c in codes_of(first).items())


def test_one_sample_is_enough(tiny: Pipeline) -> None:
    config = CONFIG.replace(num_samples=1, theta_samples=8)
    result = run(tiny, calibration=config)
    assert result.theta is not None and len(result.report["units"]) == 9


@pytest.mark.parametrize("change", [{"scales": Scales((3,))}, {"depth": 1}, {"num_classes": 1}])
def test_other_shapes(make_tiny: Callable[..., Pipeline], change: dict[str, Any]) -> None:
    pipe = make_tiny(**change)
    result = run(pipe, calibration=CONFIG.replace(steps=2))
    assert generate(result, [0], decode=False).tokens.shape == (1, pipe.scales.num_tokens)


@pytest.mark.slow
def test_bfloat16(make_tiny: Callable[..., Pipeline]) -> None:
    pipe = make_tiny().to(dtype=torch.bfloat16)
    result = run(pipe)
    assert result.dtype == torch.bfloat16
    assert all(math.isfinite(unit["loss_hard"]) for unit in result.report["units"])
    assert result.report["theta"]["overhead"] <= result.report["theta"]["budget"]
    assert all(layer.scale.dtype == torch.float32 for layer in quant_linears(result.var).values())
    assert generate(result, [0, 1]).images is not None


def test_a_quantized_pipeline_is_refused(tiny: Pipeline) -> None:
    with pytest.raises(
        InputError, match="model 'tiny': already quantized; give the float pipeline"
    ):
        run(run(tiny, "rtn"), "rtn")


@pytest.mark.parametrize("trainable", [False, True])
def test_the_float_model_is_left_as_it_was(
    make_tiny: Callable[..., Pipeline], trainable: bool
) -> None:
    pipe = make_tiny()
    pipe.var.requires_grad_(trainable)
    pipe.vae.requires_grad_(trainable)
    before = {name: t.clone() for name, t in pipe.var.state_dict().items()}
    result = run(pipe)
    assert {p.requires_grad for p in (*pipe.var.parameters(), *pipe.vae.parameters())} == {
        trainable
    }
    assert not any(p.requires_grad for p in result.var.parameters())
    assert all(p.grad is None for p in pipe.var.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.var.modules())
    result.var.to(dtype=torch.bfloat16)  # casting one does not reach the other
    result.var.requires_grad_(not trainable)
    assert {p.requires_grad for p in pipe.var.parameters()} == {trainable}
    state = pipe.var.state_dict()
    assert state.keys() == before.keys()
    for name, tensor in state.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_global_random_states_are_left_alone(tiny: Pipeline) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    run(tiny)
    assert states() == before


@pytest.mark.parametrize("stage", ["calibration samples", "theta", "blocks.1.attn", "blocks.1.ffn"])
def test_an_interruption_leaves_a_usable_float_model(
    make_tiny: Callable[..., Pipeline], tmp_path: Path, stage: str
) -> None:
    pipe = make_tiny()
    expected = generate(pipe, [0, 1], decode=False).tokens
    before = {name: t.clone() for name, t in pipe.var.state_dict().items()}

    def interrupt(name: str, done: int, total: int, info: str = "") -> None:
        if done > 0 and (name == stage or info.startswith(f"{stage}, loss")):
            raise KeyboardInterrupt

    calibration = CONFIG.replace(memory_gb=1e-9, spool_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt) as caught:
        run(pipe, calibration=calibration, progress=interrupt)
    assert not list(tmp_path.iterdir()), caught  # gone even while the traceback lives
    assert torch.is_grad_enabled()
    assert torch.equal(generate(pipe, [0, 1], decode=False).tokens, expected)
    assert all(torch.equal(t, before[name]) for name, t in pipe.var.state_dict().items())
    assert not any(m._forward_hooks for m in pipe.var.modules())
    assert run(pipe, "rtn").method == "rtn"


@pytest.mark.parametrize(
    "preset", ["w4a4+paper", "w4a4+paper+skip-head"]
)  # the last unit may be in float
@pytest.mark.parametrize("steps", [0, 3])
def test_every_stage_of_progress_starts_at_zero_and_ends(
    tiny: Pipeline, preset: str, steps: int
) -> None:
    stages: dict[str, list[tuple[int, int]]] = {}

    def listen(stage: str, done: int, total: int, info: str = "") -> None:
        stages.setdefault(stage, []).append((done, total))

    calibration = CONFIG.replace(steps=steps)
    run(tiny, config=QuantConfig.preset(preset), calibration=calibration, progress=listen)
    assert list(stages) == [
        "calibration samples",
        "theta",
        "reconstruct",
        "theta after reconstruction",
    ]
    for stage, calls in stages.items():
        done = [call[0] for call in calls]
        assert done[0] == 0 and done[-1] == calls[0][1] and done == sorted(done), stage
        assert len({total for _, total in calls}) == 1


@pytest.mark.slow
def test_mapped_storage_learns_about_the_same(tiny: Pipeline, tmp_path: Path) -> None:
    """bfloat16 records change inputs by 0.4%, far less than 4-bit codes do."""
    mapped = CONFIG.replace(memory_gb=1e-9, spool_dir=str(tmp_path))
    memory, file = run(tiny, "brecq"), run(tiny, "brecq", calibration=mapped)
    assert not list(tmp_path.iterdir())
    for ours, theirs in zip(memory.report["units"], file.report["units"], strict=True):
        for key in ("loss_nearest", "loss_hard"):
            assert theirs[key] == pytest.approx(ours[key], rel=0.1), ours["name"]


def test_weights_with_nan_are_named(make_tiny: Callable[..., Pipeline]) -> None:
    pipe = make_tiny()
    pipe.var.blocks[1].ffn.fc1.weight[3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"tensor blocks\.1\.ffn\.fc1\.weight"):
        run(pipe, "rtn")


def test_a_config_that_does_not_fit_is_refused_before_any_work(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "calibration_set", None)
    with pytest.raises(VarptqError, match=r"rule 'layers\.\*': matches no layer"):
        run(tiny, config=W4A4.with_rules(LayerRule(targets="layers.*", input=None)))


def test_a_group_wider_than_every_layer_is_refused_before_any_work(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "calibration_set", None)
    widest = max(layer.in_features for layer in linears_of(tiny.var).values())
    wide = TensorSpec(num_bits=4, strategy="group", group_size=widest + 1, fallback=False)

    def weights(spec: TensorSpec) -> QuantConfig:
        return W4A4.with_rules(LayerRule(targets="*.ffn.fc1", weight=spec))

    with pytest.raises(ConfigError, match=rf"group_size {widest + 1}: .* 8 to {widest}"):
        run(tiny, "rtn", weights(wide))
    # Narrower than the widest layer, or told to fall back: whole rows are meant.
    for spec in (wide.replace(group_size=widest), wide.replace(fallback=True)):
        check_groups(tiny.var, weights(spec))


def test_eight_bits_are_nearly_float_and_more_bits_are_better(tiny: Pipeline) -> None:
    kl = [
        fidelity(tiny, run(tiny, "rtn", QuantConfig.preset(p))).kl
        for p in ("w8a8+paper+p8", "w6a6+paper", "w4a4+paper")
    ]
    assert kl[0] < 2e-3
    assert kl[0] < kl[1] < kl[2]


@pytest.mark.slow
def test_sas_beats_nearest_rounding(any_tiny: Pipeline) -> None:
    """Every unit at least as good on its own data, and the model on tokens it has not seen."""
    result = run(any_tiny, "sas", calibration=CONFIG.replace(num_samples=20, steps=60))
    ratios = [
        (unit["loss_hard"] if unit["kept"] == "learned" else unit["loss_nearest"])
        / unit["loss_nearest"]
        for unit in result.report["units"]
    ]
    assert max(ratios) <= 1
    assert sum(ratios) / len(ratios) < 0.8
    kl, kl_nearest = (fidelity(any_tiny, q).kl for q in (result, run(any_tiny, "rtn")))
    assert kl < 0.9 * kl_nearest


@pytest.mark.slow
def test_the_demo_model_at_eight_bits_is_nearly_float() -> None:
    pipe = load_model("demo")
    assert fidelity(pipe, run(pipe, "rtn", W8A8), count=8).kl < 0.01
