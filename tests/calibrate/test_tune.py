"""End-to-end tuning: gradients of scales, what stays, the gate, the float model, files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import varptq
from varptq.artifact import save
from varptq.calibrate import tune as tuning
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.quantize import quantize
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.calibrate.tune import (
    TUNED,
    all_logits,
    mean_kl,
    put,
    tune_model,
    tuned_tensors,
)
from varptq.errors import ConfigError
from varptq.evaluate.tokens import token_fidelity
from varptq.models.pipeline import Pipeline
from varptq.models.reading import kl_divergence
from varptq.models.sampling import SamplingSettings
from varptq.models.var.transformer import VAR
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import quant_linears
from varptq.quant.pipeline import QuantizedPipeline
from varptq.work import Work

W4A4 = QuantConfig.preset("w4a4+paper+p8+token+center+rotate")
CONFIG = CalibrationConfig(num_samples=4, steps=0, tune_steps=12, theta_samples=2, theta_grid=50)


def tuned(pipe: Pipeline, method: str = "rtn", **options: object) -> QuantizedPipeline:
    return quantize(pipe, W4A4, method=method, **{"calibration": CONFIG, **options})  # pyright: ignore


@pytest.fixture(scope="module")
def result(tiny: Pipeline) -> QuantizedPipeline:
    # Fewer steps do not reach the next code.
    return tuned(tiny, calibration=CONFIG.replace(tune_steps=60))


@pytest.fixture(scope="module")
def untuned(tiny: Pipeline) -> QuantizedPipeline:
    return tuned(tiny, calibration=CONFIG.replace(tune_steps=0))


def differing(a: VAR, b: VAR) -> set[str]:
    """Last parts of the names of the tensors that differ."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return {n.rpartition(".")[2] for (n, x), (_, y) in pairs if not torch.equal(x, y)}


@pytest.mark.slow
def test_tuning_lowers_the_kl_on_new_images(
    tiny: Pipeline, result: QuantizedPipeline, untuned: QuantizedPipeline
) -> None:
    report = result.report["tuning"]
    assert report["steps"] == 60 and report["kept"]
    assert report["kl_after"] < 0.98 * report["kl_before"]
    images = calibration_set(tiny, CONFIG.replace(num_samples=48), seed=99, resampled=False)
    before, after = (mean_kl(tiny, q, images, CONFIG) for q in (untuned, result))
    assert after < before


def test_only_what_an_artifact_stores_changes(
    tiny: Pipeline, result: QuantizedPipeline, untuned: QuantizedPipeline
) -> None:
    assert differing(result.var, untuned.var) == set(TUNED)
    for layer in quant_linears(result.var).values():
        assert layer.tuning is None and bool((layer.scale > 0).all())
    assert not any(t.requires_grad for t in result.var.state_dict(keep_vars=True).values())


@pytest.mark.slow
def test_the_float_model_stays_as_it_is(tiny: Pipeline) -> None:
    before = copy.deepcopy(tiny.var.state_dict())
    tuned(tiny)
    after = tiny.var.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_the_gate_keeps_what_was_there(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps far too large make the model worse, so none of them may stay."""
    for rate in ("SCALE_RATE", "BIAS_RATE"):
        monkeypatch.setattr(tuning, rate, 1.0)
    model = convert(tiny.var, W4A4)
    before = copy.deepcopy(model.state_dict())
    report, tensors = tune_model(tiny, model, CONFIG, 0)
    assert not report.kept and report.kl_after > report.kl_before
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())


@pytest.mark.slow
def test_the_gate_sees_images_that_tuning_does_not(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = {"gate": [], "steps": []}
    mean, logits = tuning.mean_kl, tuning.all_logits

    def gate(pipe: Pipeline, student: Pipeline, images: CalibrationSet, *rest: object) -> float:
        seen["gate"] += list(images.tokens)
        return mean(pipe, student, images, *rest)  # pyright: ignore

    def step(pipe: Pipeline, images: CalibrationSet, cfg: float) -> Tensor:
        if torch.is_grad_enabled():
            seen["steps"] += list(images.tokens)
        return logits(pipe, images, cfg)

    monkeypatch.setattr(tuning, "mean_kl", gate)
    monkeypatch.setattr(tuning, "all_logits", step)
    tune_model(tiny, convert(tiny.var, W4A4), CONFIG.replace(tune_steps=2), 0)
    assert len(seen["gate"]) == 2 * tuning.HELD_OUT and len(seen["steps"]) == 2 * tuning.BATCH
    keys = {name: {tuple(ids.tolist()) for ids in rows} for name, rows in seen.items()}
    assert len(keys["steps"]) == 2 * tuning.BATCH and not keys["gate"] & keys["steps"]


@pytest.mark.parametrize("guided_scales", [None, 2, 0])
def test_the_loss_is_the_reported_fidelity(
    tiny: Pipeline, untuned: QuantizedPipeline, guided_scales: int | None
) -> None:
    sampling = SamplingSettings(cfg=1.5, guided_scales=guided_scales)
    config = CONFIG.replace(num_samples=5, sampling=tiny.filled(sampling))
    images = calibration_set(tiny, config, seed=3, resampled=False)
    how = {"cfg": 1.5, "guided_scales": guided_scales}
    known = token_fidelity(tiny, untuned, images.prompts, images.tokens, **how).kl
    assert mean_kl(tiny, untuned, images, config) == pytest.approx(known, rel=1e-4)


def test_the_gradient_of_a_scale_is_a_difference_quotient(tiny: Pipeline) -> None:
    """With activations in float nothing is rounded behind a scale, so the loss is smooth in it."""
    config = W4A4.replace(attention=None, linear=W4A4.linear.replace(input=None), rules=())
    student = copy.copy(tiny)
    object.__setattr__(student, "var", convert(tiny.var, config))
    layer = quant_linears(student.var)["blocks.1.ffn.fc1"]
    images = calibration_set(tiny, CONFIG.replace(num_samples=2), seed=5, resampled=False)

    def loss() -> Tensor:
        pair = (all_logits(p, images, SamplingSettings(cfg=1.5)) for p in (tiny, student))
        return kl_divergence(*pair, torch.float32).mean()

    change = layer.start_tuning().change
    loss().backward()
    assert change.grad is not None
    direction = change.grad / change.grad.norm()
    values = []
    for size in (-1e-2, 1e-2):
        with torch.no_grad():
            change.copy_(size * direction)
            values.append(float(loss().double()))
    slope = (values[1] - values[0]) / 2e-2
    assert slope == pytest.approx(float(change.grad.norm()), rel=0.02)


@pytest.mark.parametrize("preset", ["w4a4", "w2a8", "w4a4+paper", "w4a8+groups"])
def test_the_gradient_of_a_code_is_that_of_its_weight(tiny: Pipeline, preset: str) -> None:
    """d loss / d shift = s d loss / d w, and a step away is the neighbour, at the ends the code."""
    model = convert(tiny.var, QuantConfig.preset(preset))
    layer = quant_linears(model)["blocks.1.ffn.fc1"]
    state, before = layer.start_tuning(), layer.codes_grouped.int()
    assert torch.equal(state.codes().int(), before)
    weight = state.weight()
    assert torch.equal(weight, layer.dequantized())
    gradient = torch.randn_like(weight)
    weight.backward(gradient)
    assert state.shift.grad is not None
    torch.testing.assert_close(state.shift.grad, gradient.view_as(before) * state.scale())
    last = 2 ** (layer.weight_bits or 0) - 1
    for way in (-1, 1):
        neighbour = (before + way).clamp(0, last)
        there = state.quantizer.integers(neighbour.float(), layer.grid, state.num_bits)
        with torch.no_grad():
            state.shift.copy_(0.6 * (there - state.integers))
        assert torch.equal(state.codes().int(), neighbour)


def test_what_was_trained_is_deployed_and_stored(
    tiny: Pipeline, result: QuantizedPipeline, tmp_path: Path
) -> None:
    """`finish_tuning` gives the weight that tuning saw, bit for bit, and a file gives it back."""
    layer = next(iter(quant_linears(convert(tiny.var, W4A4)).values()))
    state, before = layer.start_tuning(), layer.codes
    torch.nn.init.constant_(state.change, 0.01)
    torch.nn.init.normal_(state.shift, std=state.step)
    trained = layer.current_weight(torch.float32).detach()
    assert not torch.equal(state.codes().flatten(1), before.float())
    layer.finish_tuning()
    assert torch.equal(layer.current_weight(torch.float32), trained)
    loaded = varptq.load(save(result, tmp_path / "model"), runtime="simulated")
    assert not differing(loaded.var, result.var)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "sas"])
def test_a_second_run_takes_the_tuned_tensors(tiny: Pipeline, tmp_path: Path, method: str) -> None:
    small = CONFIG.replace(tune_steps=3, steps=2)
    with Work(tmp_path / "work") as work:
        first = tuned(tiny, method, calibration=small, work=work)
    with Work(tmp_path / "work") as work, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "tune_model", None)
        second = tuned(tiny, method, calibration=small, work=work)
    assert not differing(first.var, second.var)
    assert first.report["tuning"] == second.report["tuning"]
    assert first.theta == second.theta


def test_put_shares_nothing(tiny: Pipeline) -> None:
    model = convert(tiny.var, W4A4)
    tensors = tuned_tensors(model)
    put(model, tensors)
    for name, tensor in model.state_dict().items():
        if name in tensors:
            assert tensor.data_ptr() != tensors[name].data_ptr()
    ours = {p.data_ptr() for n, p in model.named_parameters() if n.endswith("bias")}
    assert ours.isdisjoint({p.data_ptr() for p in tiny.var.parameters()})


def test_a_narrow_model_is_refused_before_anything_is_done(
    make_tiny: object, tmp_path: Path
) -> None:
    pipe = make_tiny()  # pyright: ignore
    pipe.var.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"tune_steps 12: model in torch.bfloat16, expected"):
        tuned(pipe)
