"""The calibration set: classes, seeds, the stored probabilities, resampling towards them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.samples import (
    CalibrationSet,
    FilteredProbabilities,
    calibration_set,
)
from varptq.models.generate import ScaleEvent, generate
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import dealt
from varptq.models.sampling import SamplingSettings, filter_logits

CONFIG = CalibrationConfig(num_samples=23)  # more samples than classes, and two batches


def make(pipe: Pipeline, config: CalibrationConfig = CONFIG, **options: object) -> CalibrationSet:
    return calibration_set(pipe, config, **{"seed": 0, "resampled": False, **options})


@given(st.integers(1, 40), st.integers(1, 130), st.integers(0, 99))
def test_classes_are_distinct_while_they_last_then_cycle(
    classes: int, count: int, seed: int
) -> None:
    labels = dealt(classes, count, seed)
    assert labels.shape == (count,) and labels.dtype == torch.int64
    for block in labels.split(classes):
        assert len(set(block.tolist())) == len(block)
        assert block.min() >= 0 and block.max() < classes
    assert torch.equal(labels, dealt(classes, count, seed))


def test_tokens_are_the_float_models_own(any_tiny: Pipeline) -> None:
    samples = make(any_tiny, seed=4)
    assert samples.resampling is None
    # The settings of the paper are the defaults of both.
    expected = generate(any_tiny, samples.prompts, seed=4, cfg=1.5, top_k=900, top_p=0.96)
    assert torch.equal(samples.tokens, expected.tokens)


def test_the_seed_decides_everything(tiny: Pipeline) -> None:
    for resampled in (False, True):
        first, again, other = (make(tiny, seed=s, resampled=resampled) for s in (1, 1, 2))
        assert torch.equal(first.prompts.labels_B, again.prompts.labels_B)
        assert torch.equal(first.tokens, again.tokens)
        assert not torch.equal(first.prompts.labels_B, other.prompts.labels_B)
        assert not torch.equal(first.tokens, other.tokens)


def test_the_sampling_settings_are_used(tiny: Pipeline) -> None:
    plain = make(tiny)
    for change in ({"top_k": 1}, {"cfg": 9.0}, {"temperature": 3.0}, {"more_smooth": True}):
        sampling = SamplingSettings(**change)
        samples = make(tiny, CONFIG.replace(sampling=sampling))
        expected = generate(tiny, samples.prompts, decode=False, **sampling.to_dict())
        assert torch.equal(samples.tokens, expected.tokens)
        assert not torch.equal(samples.tokens, plain.tokens), change


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0, 1e-30])
def test_stored_probabilities_are_what_tokens_are_drawn_from(
    tiny: Pipeline, temperature: float
) -> None:
    stored = FilteredProbabilities(32, temperature)
    logits: dict[int, list[Tensor]] = {}

    def listen(event: ScaleEvent) -> None:
        stored.add(event)
        logits.setdefault(event.scale, []).append(event.logits_BlV)

    generate(tiny, [0, 1, 2, 3, 4], batch_size=2, top_k=5, decode=False, on_scale=listen)
    for scale, length in enumerate(tiny.scales.lengths):
        dense = stored.dense(scale)
        assert dense.shape == (5, length, 32) and dense.dtype == torch.float32
        expected = (torch.cat(logits[scale]).double() / temperature).softmax(-1)
        torch.testing.assert_close(dense.double(), expected, rtol=1e-5, atol=1e-7)


def test_few_entries_are_stored(tiny: Pipeline) -> None:
    stored = FilteredProbabilities(32)
    generate(tiny, [0, 1], top_k=3, top_p=0, decode=False, on_scale=stored.add)
    assert all(values.shape[-1] == 3 for parts in stored.parts.values() for values, _ in parts)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_resampling_brings_frequencies_to_the_probabilities(
    tiny: Pipeline, temperature: float
) -> None:
    sampling = SamplingSettings(top_k=12, top_p=0.9, temperature=temperature)
    config = CONFIG.replace(sampling=sampling)
    plain, moved = make(tiny, config), make(tiny, config, resampled=True)
    assert torch.equal(plain.prompts.labels_B, moved.prompts.labels_B)
    assert moved.resampling is not None and plain.resampling is None
    logits: dict[int, list[Tensor]] = {}
    generate(
        tiny,
        plain.prompts.labels_B,
        decode=False,
        on_scale=lambda e: logits.setdefault(e.scale, []).append(e.logits_BlV),
        **sampling.to_dict(),
    )
    for scale, part in enumerate(tiny.scales.slices()):
        report = moved.resampling.scales[scale]
        mean_V = (torch.cat(logits[scale]).double() / temperature).softmax(-1).mean((0, 1))
        for samples, l1 in ((plain, report.l1_before), (moved, report.l1_after)):
            counts = torch.bincount(samples.tokens[:, part].flatten(), minlength=32).double()
            assert float((counts / counts.sum() - mean_V).abs().sum()) == pytest.approx(
                l1, abs=1e-5
            )
        assert report.l1_after <= report.l1_before
        assert torch.equal(report.count_after, report.target_count)
        changed = int((plain.tokens != moved.tokens)[:, part].sum())
        assert changed == len(report.moves)
    assert moved.resampling.num_moved > 0


def test_what_the_filter_drops_is_drawn_only_where_all_mass_is_elsewhere(tiny: Pipeline) -> None:
    """A moved token is drawn from its own filtered distribution unless that has no mass left."""
    config = CONFIG.replace(sampling=SamplingSettings(top_k=6, top_p=0))
    samples = make(tiny, config, resampled=True)
    events: list[ScaleEvent] = []
    generate(
        tiny,
        samples.prompts,
        decode=False,
        on_scale=events.append,
        batch_size=23,
        **config.sampling.to_dict(),
    )
    assert samples.resampling is not None
    for event, report in zip(events, samples.resampling.scales, strict=True):
        kept = filter_logits(event.logits_BlV, 6, 0) > -torch.inf
        for move in report.moves:
            assert move.uniform or kept[move.image, move.position, move.new_entry]


def test_one_sample(tiny: Pipeline) -> None:
    for resampled in (False, True):
        samples = make(tiny, CalibrationConfig(num_samples=1), resampled=resampled)
        assert samples.tokens.shape == (1, 14) and len(samples.prompts) == 1


def test_progress_has_its_own_stage(tiny: Pipeline) -> None:
    seen: list[tuple[str, int, int]] = []
    make(tiny, progress=lambda stage, done, total, info="": seen.append((stage, done, total)))
    assert seen == [("calibration samples", done, 23) for done in (0, 16, 23)]
