"""Calibration of a model that reads texts: units, moments, folds, copies and bits, with prompts of
different lengths in one batch held against one prompt after another."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import varptq
from helpers.infinity_states import ARCH, PRESET, SCALES, prompts
from varptq.analyze.bench import FLOAT
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.means import token_means
from varptq.calibrate.record import Recorder, Unit
from varptq.calibrate.resample import resample_tokens
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.calibrate.smoothing import smoothed
from varptq.calibrate.solve import cross_moments, input_moments
from varptq.calibrate.theta import copy_stats, measure_attention, overhead_curve, theta_grid
from varptq.errors import ArtifactError
from varptq.evaluate.tokens import token_fidelity
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS
from varptq.models.reading import listening
from varptq.models.seams import consumers_of, linears_of
from varptq.models.texts import TextPrompts
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import quant_linears
from varptq.quant.folds import scale

FAST = CalibrationConfig(num_samples=5, steps=3, theta_samples=3)
W4A4, PAPER = QuantConfig.preset("w4a4"), QuantConfig.preset("w4a4+paper")
ASKED = prompts(3, 5, 1, 3, 2)
ROWS = 2 * len(ASKED)
# float32 sums of a few hundred terms of order 1.
FLOAT32 = 2e-5


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", PRESET)
        found = varptq.build_model("tiny", seed=1)
    return found.drawing_for(ASKED)


@pytest.fixture(scope="module")
def samples(pipe: Pipeline) -> CalibrationSet:
    return CalibrationSet(ASKED, varptq.generate(pipe, ASKED, seed=3, decode=False).tokens)


@pytest.fixture(scope="module")
def held_out(pipe: Pipeline) -> Tensor:
    return varptq.generate(pipe, ASKED, seed=9, decode=False).tokens


def recorder(pipe: Pipeline, samples: CalibrationSet, config: QuantConfig = PAPER) -> Recorder:
    return Recorder(pipe, convert(pipe.var, config).get_submodule, samples, FAST)


def rows_of(pipe: Pipeline, samples: CalibrationSet) -> list[tuple[TextPrompts, Tensor]]:
    """Prompt and inputs of every row that guidance needs, by itself."""
    inputs = pipe.vae.teacher_inputs(samples.tokens)
    guided = samples.prompts.guided()
    return [(guided[i : i + 1], inputs[i % len(ASKED)][None]) for i in range(len(guided))]


@torch.no_grad()
def heard(pipe: Pipeline, samples: CalibrationSet, name: str) -> list[tuple[Tensor, Tensor]]:
    """What a module reads and gives, row by row in passes of one row."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_: str, output: Tensor, x: Tensor, *__: Any) -> None:
        found.append((x[0], output[0]))

    with listening({name: pipe.var.get_submodule(name)}, keep, output=True):
        for row, inputs in rows_of(pipe, samples):
            pipe.var(row, inputs)
    return found


def test_units_in_model_order_hold_every_layer_once(
    pipe: Pipeline, samples: CalibrationSet
) -> None:
    run = recorder(pipe, samples)
    units = [(unit.name, unit.module) for unit in run.units()]
    parts = [f"blocks.{i}.{part}" for i in range(ARCH.depth) for part in ("attn", "cross", "ffn")]
    before = ["word_embed", "text_pool", "text_proj", "shared_ada_lin.1"]
    assert [name for name, _ in units] == [*before, *parts, "head_nm.ada_lin.1", "head"]
    assert list(run.costs()) == [name for name, _ in units]
    layers = Counter(
        layer.layer for _, unit in units for layer in unit.modules() if hasattr(layer, "codes")
    )
    assert layers == dict.fromkeys(linears_of(pipe.var), 1)


def test_costs_of_units_that_read_texts(pipe: Pipeline, samples: CalibrationSet) -> None:
    costs = recorder(pipe, samples).costs()
    width, channels, tokens = ARCH.width, ARCH.text_channels, SCALES.num_tokens
    assert costs["text_proj"] == 64 * (channels * width + width**2)
    assert costs["text_pool"] == 64 * 2 * channels * width + width**2
    cross = 2 * width**2 * tokens + 64 * 2 * width**2 + tokens * 64 * width
    assert costs["blocks.1.cross"] == cross


@pytest.mark.slow
@pytest.mark.parametrize("memory", [8.0, 1e-9])
def test_what_is_recorded_is_what_the_pass_computes(
    pipe: Pipeline, samples: CalibrationSet, memory: float
) -> None:
    """Also in mapped files, where activations are in bfloat16."""
    run = Recorder(
        pipe, convert(pipe.var, FLOAT).get_submodule, samples, FAST.replace(memory_gb=memory)
    )
    bound = FLOAT32 if memory > 1 else 2**-6
    for unit in run.units():
        if unit.sees_vectors or unit.name == "word_embed":
            continue
        exact, every = heard(pipe, samples, unit.name), torch.arange(ROWS)
        assert len(unit.inputs) == ROWS
        if unit.name in ("text_pool", "text_proj"):
            read, given = by_length(unit, exact)
            assert all(
                torch.allclose(group.text_RTC[at], x, atol=FLOAT32)
                for group in unit.inputs[every]
                for at, x in enumerate(read[group.text_RTC.shape[1]])
            )
            target = torch.cat([y for outputs in given.values() for y in outputs])
        else:
            x, target = (torch.stack(part) for part in zip(*exact, strict=True))
            found = unit.inputs[every]
            tokens = found[0] if isinstance(found, tuple) else found
            assert float((tokens.float() - x).abs().max()) <= bound * float(x.abs().max())
        most = bound * float(target.abs().max())
        # Not quantized, the unit is its reference; the records are what came out of the pass.
        for output in (unit.target(every), unit.reference(unit.inputs[every])):
            assert float((output - target).abs().max()) <= most, unit.name
        assert torch.equal(unit.run(unit.inputs[every]), unit.reference(unit.inputs[every]))


def by_length(
    unit: Unit, rows: list[tuple[Tensor, Tensor]]
) -> tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]]:
    """Inputs and outputs of texts in groups of one length, short ones first."""
    read: dict[int, list[Tensor]] = {}
    given: dict[int, list[Tensor]] = {}
    for x, y in sorted(rows, key=lambda row: len(row[0])):
        read.setdefault(len(x), []).append(x)
        given.setdefault(len(x), []).append(y if y.dim() == 2 else y[None])
    return read, given


def test_rows_in_any_order_have_their_own_texts(pipe: Pipeline, samples: CalibrationSet) -> None:
    for unit in recorder(pipe, samples).units():
        if unit.name != "blocks.2.cross":
            continue
        rows = torch.tensor([7, 0, 4, 4, 1])
        torch.testing.assert_close(
            unit.reference(unit.inputs[rows]), unit.target(rows), rtol=0, atol=FLOAT32
        )


@pytest.mark.parametrize("layer", ["blocks.1.cross.mat_kv", "text_pool.mat_kv", "text_proj.0"])
def test_moments_of_layers_that_read_texts(
    pipe: Pipeline, samples: CalibrationSet, layer: str
) -> None:
    """Every token of every text once, whatever the batch; weights alone are quantized, so inputs
    are those of the float model."""
    config = PAPER.replace(linear=PAPER.linear.replace(input=None))
    for unit in recorder(pipe, samples, config).units():
        layers = {m.layer: m for m in quant_linears(unit.module).values()}
        if layer not in layers:
            continue
        expected = sum(x.double().T @ x.double() for x, _ in heard(pipe, samples, layer))
        error = input_moments(unit, layers[layer]) - expected
        assert float(error.abs().max()) <= FLOAT32 * float(expected.abs().max())
        return
    raise AssertionError(layer)


@pytest.mark.parametrize("layer", ["blocks.1.cross.mat_kv", "blocks.1.cross.mat_q"])
def test_cross_moments_behind_weights_alone_are_nearly_the_others(
    pipe: Pipeline, samples: CalibrationSet, layer: str
) -> None:
    rule = QuantConfig.preset("w2a8").linear.replace(input=None)
    model = convert(pipe.var, W4A4.replace(linear=rule))
    for unit in Recorder(pipe, model.get_submodule, samples, FAST).units(follow=model):
        for one in (m for m in quant_linears(unit.module).values() if m.layer == layer):
            own, cross = cross_moments(unit, one)
            near = torch.allclose(cross, own, rtol=0, atol=FLOAT32 * float(own.max()))
            assert near == layer.endswith("mat_kv")  # a text is the same for both
            return
    raise AssertionError(layer)


def test_means_of_layers_that_read_texts(pipe: Pipeline, samples: CalibrationSet) -> None:
    names = ["blocks.0.cross.mat_kv", "text_pool.proj", "text_proj.0"]
    for name, means in token_means(pipe, names, samples).items():
        exact = torch.cat([x for x, _ in heard(pipe, samples, name)]).double()
        torch.testing.assert_close(means, exact.mean(0, keepdim=True), rtol=0, atol=FLOAT32)


def factors(fold: Any, generator: torch.Generator) -> Tensor:
    width = consumers_of(fold)[0].in_features
    return torch.randn(width, generator=generator, dtype=torch.float64).exp()


def test_every_fold_leaves_the_function(pipe: Pipeline, samples: CalibrationSet) -> None:
    var, generator = copy.deepcopy(pipe.var).double(), torch.Generator().manual_seed(0)
    row, inputs = samples.prompts, pipe.vae.teacher_inputs(samples.tokens).double()
    with torch.no_grad():
        before = var(row, inputs)
        for name in list(var.folds()):
            # One place after another, so that an error is of one.
            place = var.folds()[name]
            assert var.get_submodule(name) in consumers_of(place)
            scale(place, factors(place, generator))
            error = (var(row, inputs) - before).abs().max()
            # Text norm, rotary tables and logits are in float32 whatever the model.
            assert float(error) <= FLOAT32 * float(before.abs().max()), name


def test_smoothing_reaches_all_that_has_a_place(pipe: Pipeline, samples: CalibrationSet) -> None:
    found, count = smoothed(pipe, W4A4, lambda: samples)
    per_block = ("attn.mat_qkv", "attn.proj", "cross.mat_q", "cross.mat_kv", "cross.proj")
    outside = {"text_pool.mat_kv", "text_pool.proj", "text_proj.0", "head"}
    blocks = {f"blocks.{i}.{n}" for i in range(ARCH.depth) for n in (*per_block, "ffn.fc1")}
    assert set(pipe.var.folds()) == blocks | outside and count == len(blocks | outside)
    assert token_fidelity(pipe, found, samples.prompts, samples.tokens).kl < 1e-9
    # Keys and values of all blocks read the same tokens, so they take the same diagonal.
    one, other = (
        found.var.blocks[i].cross.mat_kv.weight[:1] / pipe.var.blocks[i].cross.mat_kv.weight[:1]
        for i in (1, 3)
    )
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_smoothing_takes_no_diagonal_that_some_readers_refuse(
    pipe: Pipeline, samples: CalibrationSet
) -> None:
    config = W4A4.with_rules(LayerRule(targets="blocks.2.cross.mat_kv", input_transform=None))
    found, count = smoothed(pipe, config, lambda: samples)
    assert count == len(pipe.var.folds()) - ARCH.depth
    assert torch.equal(found.var.text_proj[2].bias, pipe.var.text_proj[2].bias)


# Those of gptq are steps of gptq+resample, those of brecq steps of sas.
METHODS = ("rtn", "sas", "rtn+shift", "gptq+resample")
CONFIGS = ("w8a8", "w4a4", "w4a4+paper", "w4a4+litevar", "w6a6+paper+released", "w4a8+segment")
# Every method with the published preset, and every preset with a method that takes little time.
CASES = sorted(
    {(method, "w4a4+paper") for method in METHODS}
    | {("rtn", config) for config in CONFIGS}
    | {("gptq", "w4a4"), ("brecq", "w4a4")}
)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "config"), CASES)
def test_it_is_quantized_saved_and_loaded(
    pipe: Pipeline, held_out: Tensor, method: str, config: str, tmp_path: Path
) -> None:
    chosen = QuantConfig.preset(config)
    before = copy.deepcopy(pipe.var.state_dict())
    q = varptq.quantize(pipe, chosen, method=method, calibration=FAST, seed=0)
    assert all(torch.equal(t, before[name]) for name, t in pipe.var.state_dict().items())
    report = q.report
    if method in ("gptq", "brecq", "sas", "gptq+resample"):
        assert len(report["units"]) == 4 + 3 * ARCH.depth + 2
    if method in ("sas", "gptq+resample"):
        scales = report["resampling"]["scales"]
        bits = [n * ARCH.token_bits * FAST.num_samples for n in SCALES.lengths]
        assert [found["tokens"] for found in scales] == bits
        assert all(found["l1_after"] <= found["l1_before"] for found in scales)
    if method in ("sas", "rtn+shift"):
        theta = report["theta"]
        assert theta["status"] in ("ok", "off", "over_budget")
        assert theta["fraction"] <= 0.01 or theta["status"] != "ok"
        if theta["status"] != "off":
            assert len(theta["text_copies"]) == len(theta["copies"])
            assert theta["text_tokens"] in (2, 3)
    fidelity = token_fidelity(pipe, q, ASKED, held_out)
    assert 0 < fidelity.kl < (0.01 if config == "w8a8" else 1)
    varptq.save(q, tmp_path / "artifact")
    loaded = varptq.load(tmp_path / "artifact", runtime="simulated")
    drawn = varptq.generate(q, ASKED, seed=1).tokens
    assert torch.equal(varptq.generate(loaded, ASKED, seed=1).tokens, drawn)
    assert loaded.report == json.loads(json.dumps(q.report)) and loaded.theta == q.theta
    gains = [name for name in loaded.var.state_dict() if "ada_gain" in name]
    assert len(gains) == ("+paper" not in config) * ARCH.depth


@pytest.mark.slow
def test_learning_lowers_every_units_loss(pipe: Pipeline) -> None:
    q = varptq.quantize(pipe, PAPER, method="brecq", calibration=FAST.replace(steps=30), seed=0)
    ratios = {unit["name"]: unit["loss_hard"] / unit["loss_nearest"] for unit in q.report["units"]}
    reading = [ratios["text_proj"], *(ratios[f"blocks.{i}.cross"] for i in range(ARCH.depth))]
    assert max(reading) < 1 and ratios["text_pool"] < 1


def test_a_damaged_gain_is_refused(pipe: Pipeline, tmp_path: Path) -> None:
    """An artifact whose gain was taken out is not the one that was saved."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    q = varptq.quantize(pipe, W4A4, method="rtn", calibration=FAST)
    varptq.save(q, tmp_path / "artifact")
    path = tmp_path / "artifact" / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["transformer.blocks.1.ada_gain.weight"]
    save_file(tensors, path, metadata)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        varptq.load(tmp_path / "artifact", runtime="simulated")


def test_copies_are_accounted_row_by_row(pipe: Pipeline, samples: CalibrationSet) -> None:
    """Texts of different lengths in one batch cost what they cost one by one."""
    quantized, thetas = convert(pipe.var, PAPER), theta_grid(50)
    together = measure_attention(pipe, quantized, samples, len(ASKED))
    assert {entry.abar_BHl.shape[-1] for entry in together if entry.text} == {1, 2, 3, 5}
    alone = [
        measure_attention(pipe, quantized, samples.part(slice(i, i + 1)), 1)
        for i in range(len(ASKED))
    ]
    curve = overhead_curve(together, thetas)
    mean = torch.stack([overhead_curve(entries, thetas) for entries in alone]).mean(0)
    # A mass on a threshold may fall on either side of it.
    torch.testing.assert_close(curve, mean, rtol=5e-3, atol=0)
    texts = [entry for entry in together if entry.text]
    assert sum(entry.share for entry in texts) == pytest.approx(ARCH.depth * SCALES.num_scales)
    stats = copy_stats(texts, 0.2)
    assert len(stats) == ARCH.depth * SCALES.num_scales and {stat.keys for stat in stats} == {3}
    exact = [
        stat.duplicated
        for entries in alone
        for stat in copy_stats([e for e in entries if e.text], 0.2)
        if (stat.block, stat.scale) == (1, 2)
    ]
    ours = next(stat for stat in stats if (stat.block, stat.scale) == (1, 2))
    assert ours.duplicated == pytest.approx(sum(exact) / len(exact), rel=1e-6)


def test_a_block_of_cross_attention_costs_what_is_said(
    pipe: Pipeline, samples: CalibrationSet
) -> None:
    """H l_q T 16 for means, H T 20 for orders, and the copies."""
    entry = next(e for e in measure_attention(pipe, convert(pipe.var, PAPER), samples, 2) if e.text)
    heads, length = ARCH.num_heads, entry.abar_BHl.shape[-1]
    assert (entry.block, entry.scale, entry.num_queries) == (0, 0, 1) and entry.share == 0.5
    assert entry.fixed_bops == heads * 1 * length * 16 + heads * length * 20


def test_every_bit_is_as_often_one_as_the_model_says() -> None:
    """Per scale and bit, against a count; the order of symbols is that of `Alphabet`."""
    generator, draws, lengths = torch.Generator().manual_seed(0), 3, (2, 5)
    symbols = [draws * length for length in lengths]
    ids = torch.randint(2, (7, sum(symbols)), generator=generator)
    probs = [torch.rand(7, n, 2, generator=generator) for n in symbols]
    probs = [p / p.sum(-1, keepdim=True) for p in probs]
    new, report = resample_tokens(ids, lambda k: probs[k], symbols, 0, draws)
    for k, (part, p) in enumerate(zip(new.split(symbols, 1), probs, strict=True)):
        ones = part.unflatten(1, (-1, draws)).sum((0, 1))
        expected = p[..., 1].double().unflatten(1, (-1, draws)).sum((0, 1))
        assert bool(((ones - expected).abs() < 1).all())
        flipped = (part != ids.split(symbols, 1)[k]).nonzero().tolist()
        moves = sorted([move.image, move.position] for move in report.scales[k].moves)
        assert moves == flipped


def test_prompts_do_not_repeat_while_they_last(pipe: Pipeline) -> None:
    found = calibration_set(pipe, CalibrationConfig(num_samples=5), seed=4, resampled=False)
    assert sorted(row.length for row in found.prompts.rows) == [1, 2, 3, 3, 5]
    more = calibration_set(pipe, CalibrationConfig(num_samples=8), seed=4, resampled=False)
    assert Counter(map(id, more.prompts.rows)).most_common()[0][1] == 2
    assert torch.equal(more.tokens[:5], found.tokens)


def test_a_text_is_coded_once_whatever_the_scale(pipe: Pipeline) -> None:
    """Keys and values are made of a text once per image, not once per scale."""
    q = varptq.quantize(pipe, W4A4, method="rtn", calibration=FAST)
    seen: list[Tensor] = []
    name = "blocks.0.cross.mat_kv"

    def keep(_: str, output: Tensor, *__: Any) -> None:
        seen.append(output)

    with listening({name: q.var.get_submodule(name)}, keep, output=True):
        varptq.generate(q, ASKED[:2], seed=1, decode=False)
    # Two lengths, at the first scale only.
    assert [tuple(part.shape[:2]) for part in seen] == [(2, 3), (2, 5)]
