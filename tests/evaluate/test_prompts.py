"""Calibration, samples, measures and analysis for prompts that a caller gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import varptq
from helpers.checkpoint_states import one_line
from helpers.infinity_states import PRESET, features, prompts
from varptq.errors import InputError, OutputError
from varptq.evaluate.evaluate import Subject, evaluate
from varptq.evaluate.preflight import Instruments
from varptq.evaluate.sampling import sample_set
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS
from varptq.models.prompts import ClassPrompts
from varptq.models.texts import TextPrompts
from varptq.quant.config import QuantConfig
from varptq.quant.pipeline import QuantizedPipeline

TEXTS = ["a red cat", "a dog", "two hens"]
PROMPTS = TextPrompts.of(features(3, 1, 3), TEXTS)
TWO = varptq.CalibrationConfig(num_samples=2)


@pytest.fixture(scope="module")
def model() -> Pipeline:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", PRESET)
        return varptq.build_model("tiny", seed=1)


@pytest.fixture(scope="module")
def quantized(model: Pipeline) -> QuantizedPipeline:
    config = QuantConfig.preset("w4a4")
    return varptq.quantize(model, config, method="rtn", calibration=TWO, prompts=PROMPTS)


class Lengths:
    """A stand-in for CLIP that keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __call__(self, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked |= set(texts)
        return torch.ones(len(pixels), 2), torch.tensor([[len(text), 1.0] for text in texts])


@pytest.mark.slow
def test_calibration_says_what_it_drew_for(model: Pipeline, quantized: QuantizedPipeline) -> None:
    assert quantized.report["prompts"] == {"count": 3, "sha256": PROMPTS.sha256()}
    assert model.chosen is None and quantized.pool() is PROMPTS
    with pytest.raises(InputError) as caught:
        varptq.quantize(model, quantized.config, method="rtn", calibration=TWO)
    one_line(caught, "tiny", "wants prompts=")


@pytest.mark.slow
def test_measures_on_given_prompts(
    model: Pipeline, quantized: QuantizedPipeline, tmp_path: Path
) -> None:
    pipes = {"float": model, "quantized": quantized}
    subjects = {
        name: Subject(pipe, sample_set(pipe, tmp_path / name, count=6, prompts=PROMPTS))
        for name, pipe in pipes.items()
    }
    labels, tokens = subjects["float"].samples.head(6)
    assert labels.bincount().tolist() == [2, 2, 2] and tokens.shape == (6, 11, 16)
    clip = Lengths()
    found = evaluate(
        subjects["quantized"],
        subjects["float"],
        instruments=Instruments(clip=clip),
        prompts=PROMPTS,
    )
    assert clip.asked == set(TEXTS)
    assert found["metrics"]["kl"] > 0 and 0 < found["metrics"]["token_agreement"] < 1
    with pytest.raises(OutputError, match="prompts_sha256"):
        sample_set(model, tmp_path / "float", count=6, prompts=prompts(3, 1, 3)[1:])
    with pytest.raises(OutputError, match="scales"):
        wide = model.sized("0.06M")
        sample_set(wide, tmp_path / "float", count=6, prompts=PROMPTS)
    with pytest.raises(InputError) as caught:
        evaluate(subjects["quantized"], subjects["float"], prompts=PROMPTS[:2])
    one_line(caught, "prompts", "give those that they were drawn for")


def test_class_models_have_prompts_of_their_own() -> None:
    demo = varptq.load_model("demo")
    with pytest.raises(InputError) as caught:
        demo.drawing_for(PROMPTS)
    one_line(caught, "demo", "asked for classes")
    with pytest.raises(InputError) as caught:
        demo.drawing_for(["a red cat"])
    one_line(caught, "demo", "a red cat")
    with pytest.raises(InputError) as caught:
        varptq.generate(demo, [1], negative=[2])
    one_line(caught, "takes no negative prompts")
    some = demo.drawing_for(["cat", 1]).pool()
    assert len(some) == 2 and np.array_equal(some.arrays()["labels"], some.facts())
    with pytest.raises(InputError) as caught:
        demo.drawing_for(ClassPrompts.parse([1], 3, ()))
    one_line(caught, "of 3 classes, expected")
