"""CUDA graphs without CUDA: what is recorded on tensors that stay gives the same bytes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import varptq
from helpers.infinity_states import pipeline as text_pipeline
from helpers.infinity_states import prompts as texts
from helpers.tape import Tape
from varptq.errors import InputError, NonFiniteError
from varptq.models.finite import are_kept, kept_checks, require
from varptq.models.generate import ScaleEvent, generate
from varptq.models.graphs import CudaRecorder, Graphs, copied, fill
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig

LABELS = [0, 3, 1, 4, 2]


def on_tape(pipe: Pipeline) -> tuple[Pipeline, list[Tape]]:
    """A copy that records on tapes, and the tapes made."""
    made: list[Tape] = []

    def make(device: torch.device) -> Tape:
        made.append(Tape(device))
        return made[-1]

    found = copy.deepcopy(pipe)
    found.graphs = Graphs(make)
    return found, made


# Of codebooks a tape is long.
KINDS = ["float", *(pytest.param(x, marks=pytest.mark.slow) for x in ("w8a8+paper", "w4a4"))]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tiny: Pipeline) -> Pipeline:
    if request.param == "float":
        return tiny
    calibration = varptq.CalibrationConfig(num_samples=2)
    config = QuantConfig.preset(request.param)
    return varptq.quantize(tiny, config, method="rtn", calibration=calibration)


def same(pipe: Pipeline, taped: Pipeline, labels: list[int], **options: Any) -> None:
    """Images, tokens and logits of both."""
    logits: dict[bool, list[Tensor]] = {False: [], True: []}

    def drawn(own: Pipeline, graphs: bool) -> varptq.Output:
        def keep(event: ScaleEvent) -> None:
            logits[graphs].append(event.logits_BlV)

        return generate(own, labels, cuda_graphs=graphs, on_scale=keep, **options)

    expected, found = drawn(pipe, False), drawn(taped, True)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.images is not None and expected.images is not None
    assert torch.equal(found.images, expected.images)
    pairs = zip(logits[True], logits[False], strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.slow
def test_images_are_the_same_at_every_size_of_batch_and_guidance(model: Pipeline) -> None:
    taped, made = on_tape(model)
    scales = model.scales.num_scales
    same(model, taped, LABELS, seed=1, batch_size=2)
    (tape,) = made
    # Batches of two and of one, each what is made of the condition and every scale.
    assert tape.recorded == 2 * (1 + scales)
    # Other classes, noise, strength and filters run what is there.
    same(model, taped, LABELS[::-1], seed=2, batch_size=2, cfg=3.0, tau=0.7, top_k=0, top_p=0.0)
    same(model, taped, LABELS[:2], seed=3, more_smooth=True)
    assert tape.recorded == 2 * (1 + scales)
    # Logits that are handed on as they are stay what they were.
    same(model, taped, LABELS[:4], seed=4, batch_size=2, cfg=0.0, top_k=0, top_p=0.0)
    assert tape.recorded == 3 * (1 + scales)
    assert made == [tape]


def test_rows_that_ask_for_nothing_end_at_any_scale(model: Pipeline) -> None:
    """Also where a scale of the asked rows is recorded after later ones."""
    taped, made = on_tape(model)
    for start, guided in enumerate((2, 1, 3, 2)):
        labels = LABELS[start : start + 2]
        same(model, taped, labels, seed=guided, cfg=[1.0, 1.5, 2.0], guided_scales=guided)
    # All rows at three scales, the asked ones at the last two, and the condition of either.
    assert made[0].recorded == (1 + 3) + (1 + 2)


def test_what_is_not_finite_is_named_by_a_run_too(tiny: Pipeline) -> None:
    config = QuantConfig.preset("w8a8+paper")
    made = varptq.quantize(tiny, config, method="rtn")
    taped, _ = on_tape(made)
    expected = generate(made, LABELS[:2]).tokens
    assert torch.equal(generate(taped, LABELS[:2], cuda_graphs=True).tokens, expected)
    embedding = taped.var.get_parameter("class_emb.weight").data
    before = embedding.clone()
    embedding.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"layer blocks\.0\.ada_lin\.1: input holds NaN"):
        generate(taped, LABELS[:2], cuda_graphs=True)
    embedding.copy_(before)
    assert torch.equal(generate(taped, LABELS[:2], cuda_graphs=True).tokens, expected)


def test_a_model_that_has_moved_is_recorded_anew(
    tiny: Pipeline, make_tiny: Callable[..., Pipeline]
) -> None:
    taped, made = on_tape(tiny)
    generate(taped, LABELS[:1], cuda_graphs=True)
    taped.to(dtype=torch.bfloat16)
    narrow = copy.deepcopy(tiny).to(dtype=torch.bfloat16)
    same(narrow, taped, LABELS[:1])
    assert len(made) == 2
    taped.var = make_tiny(seed=7).var.to(dtype=torch.bfloat16)
    same(taped, taped, LABELS[:1])
    assert len(made) == 3


def test_a_copy_of_a_pipeline_records_its_own(tiny: Pipeline) -> None:
    taped, _ = on_tape(tiny)
    generate(taped, LABELS[:1], cuda_graphs=True)
    for other in (copy.deepcopy(taped), taped.named(tiny.class_names)):
        assert other.graphs is not taped.graphs and not other.graphs._batches
    assert isinstance(pickle.loads(pickle.dumps(Graphs())), Graphs)


def test_bad_use_is_one_line(tiny: Pipeline) -> None:
    with pytest.raises(InputError, match="the model is on cpu, expected a CUDA device") as said:
        generate(tiny, LABELS, cuda_graphs=True)
    assert "\n" not in str(said.value)
    with pytest.raises(InputError, match="cuda_graphs: this model reads texts") as said:
        generate(text_pipeline(), texts(3, 2), cuda_graphs=True)
    assert "\n" not in str(said.value)


def test_a_call_within_a_call_does_not_wait_for_itself(tiny: Pipeline) -> None:
    taped, _ = on_tape(tiny)

    def again(event: ScaleEvent) -> None:
        generate(taped, LABELS[:1], cuda_graphs=True)

    with pytest.raises(InputError, match="in this thread; leave cuda_graphs out of calls from"):
        generate(taped, LABELS[:1], cuda_graphs=True, on_scale=again)
    generate(taped, LABELS[:1], cuda_graphs=True)


def test_what_a_graph_cannot_hold_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = object.__new__(CudaRecorder)

    def fails(error: RuntimeError) -> Callable[..., Any]:
        def record(*_: Any) -> Any:
            raise error

        return record

    refused = RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
    monkeypatch.setattr(recorder, "_recorded", fails(refused))
    with pytest.raises(
        InputError, match=r"not permitted when stream is capturing\); leave"
    ) as said:
        recorder(lambda: None)
    assert "\n" not in str(said.value)
    full = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(recorder, "_recorded", fails(full))
    with pytest.raises(RuntimeError, match="out of memory"):
        recorder(lambda: None)


def test_checks_are_kept_until_they_are_verified() -> None:
    wrong, right = (torch.tensor(value) for value in (False, True))
    with pytest.raises(NonFiniteError, match="at once"):
        require(wrong, "at once")
    with kept_checks() as checks:
        assert are_kept()
        require(right, "first")
        require(wrong, "second")
    assert not are_kept()
    with pytest.raises(NonFiniteError, match="second"):
        checks.verify()
    with kept_checks() as none:
        pass
    none.verify()


def test_copies_of_a_condition_are_filled_in_place() -> None:
    value = (torch.ones(2), (torch.zeros(1), "name"), 3)
    own = copied(value)
    assert own[0].data_ptr() != value[0].data_ptr()
    fill(own, (torch.full((2,), 5.0), (torch.ones(1), "name"), 3))
    assert own[0].tolist() == [5.0, 5.0] and own[1][0].tolist() == [1.0]
    assert value[0].tolist() == [1.0, 1.0]
