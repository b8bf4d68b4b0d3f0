"""Texts by their features: batches of them, what is refused, and files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.checkpoint_states import one_line
from helpers.infinity_states import ARCH, features, prompts
from varptq.errors import InputError
from varptq.models.infinity.transformer import Infinity
from varptq.models.prompt_files import bundled_prompts, load_features
from varptq.models.prompts import UNCONDITIONAL
from varptq.models.texts import TextPrompts

CHANNELS = ARCH.text_channels


class Letters:
    """A text encoder: a token per letter."""

    def features(self, texts: Sequence[str]) -> list[Tensor]:
        return [torch.full((len(text), CHANNELS), float(len(text))) for text in texts]


@pytest.fixture
def model() -> Infinity:
    return Infinity(ARCH)


def test_rows_of_a_batch() -> None:
    asked = TextPrompts.of(features(3, 1, 2), ["a cat", None, "a dog"])
    assert asked.titles() == ["a cat", "1 tokens", "a dog"]
    assert asked.facts()[0] == {"text": "a cat", "tokens": 3}
    assert asked[torch.tensor([2, 0])].titles() == ["a dog", "a cat"]
    assert asked[1:].joined(asked[:1]).titles() == ["1 tokens", "a dog", "a cat"]
    assert [len(part) for part in asked.split(2)] == [2, 1]
    guided = asked.guided()
    assert guided.titles()[3:] == [UNCONDITIONAL] * 3
    assert [row.length for row in guided.rows] == [3, 1, 2, 3, 1, 2]


def test_negative_prompts_take_the_place_of_nothing() -> None:
    asked = prompts(3, 1).instead_of(TextPrompts.of(features(2, 4, seed=1)))
    rows = asked.guided().rows
    assert [row.length for row in rows] == [3, 1, 2, 4]
    assert rows[2].features_TD is not None
    with pytest.raises(InputError) as caught:
        prompts(3, 1, 2).instead_of(asked)
    one_line(caught, "negative", "one for all or 3")
    assert [row.length for row in prompts(3, 1).instead_of(prompts(5)).nothing().rows] == [5, 5]


def test_a_pool_is_the_models_own_texts_or_those_of_the_package(model: Infinity) -> None:
    roomy = Infinity(dataclasses.replace(ARCH, text_maxlen=100))
    assert roomy.pool((), Letters()).titles() == list(bundled_prompts())
    assert model.pool(("cat", "dog"), Letters()).titles() == ["cat", "dog"]
    with pytest.raises(InputError) as caught:
        model.pool(("cat",), None)
    one_line(caught, "wants prompts=", "text encoder")


def test_strings_want_an_encoder(model: Infinity) -> None:
    with pytest.raises(InputError) as caught:
        model.prompts(["a cat"], (), None)
    one_line(caught, "a cat", "varptq[text]", "give features")
    found = model.prompts(["cat", features(2)[0], "hi"], (), Letters())
    assert found.titles() == ["cat", "2 tokens", "hi"]
    assert [row.length for row in found.rows] == [3, 2, 2]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("a cat", "a list of features"),
        (7, "a list of features"),
        ([], "empty"),
        ([3], "prompt 0: a int"),
        ([torch.ones(3)], "(tokens, channels)"),
        ([torch.ones(2, CHANNELS, dtype=torch.int64)], "torch.int64"),
        ([torch.ones(0, CHANNELS)], "no tokens"),
        (
            [torch.ones(2, CHANNELS), torch.full((2, CHANNELS), torch.nan)],
            "prompt 1: features hold",
        ),
        ([torch.ones(2, CHANNELS + 1)], f"{CHANNELS + 1} channels, expected {CHANNELS}"),
        ([torch.ones(7, CHANNELS)], "7 tokens, expected at most 6"),
        (np.array(3), "a list of features"),
        ([np.ones((2, CHANNELS), np.longdouble)], "prompt 0: of "),
        ([np.full((2, CHANNELS), 1e300)], "prompt 0: features hold"),
    ],
)
def test_what_is_refused(model: Infinity, values: object, words: str) -> None:
    with pytest.raises(InputError) as caught:
        model.prompts(values, (), None)
    one_line(caught, words)


def test_arrays_of_any_byte_order_and_strides() -> None:
    (plain,) = features(3)
    array = plain.numpy()
    for other in (array.astype(">f4"), array[::-1].copy()[::-1], np.asfortranarray(array)):
        (row,) = TextPrompts.of([other]).rows
        assert row.features_TD is not None and torch.equal(row.features_TD, plain)


def test_prompts_of_another_model_are_refused_too(model: Infinity) -> None:
    for asked in (prompts(2).instead_of(prompts(7)), TextPrompts.of(features(2, channels=4))):
        with pytest.raises(InputError) as caught:
            model.condition(asked)
        one_line(caught, "prompt 0")


def test_files_of_features(tmp_path: Path) -> None:
    found = features(3, 1, 2)
    arrays = {"features": torch.cat(found), "lengths": torch.tensor([3, 1, 2])}
    save_file(arrays, tmp_path / "f.safetensors")
    np.savez(tmp_path / "f.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    save_file(arrays, tmp_path / "F.SAFETENSORS")
    swapped = {
        "features": torch.cat(found).numpy().astype(">f4"),
        "lengths": np.array([3, 1, 2], ">i8"),
    }
    np.savez(tmp_path / "swapped.npz", **swapped)
    for name in ("f.safetensors", "F.SAFETENSORS", "f.npz", "swapped.npz"):
        rows = load_features(tmp_path / name).rows
        assert [row.length for row in rows] == [3, 1, 2]
        assert all(torch.equal(r.features_TD, f) for r, f in zip(rows, found, strict=True))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"features": np.ones((3, 2))}, "expected features and lengths"),
        ({"features": np.ones((3, 2)), "lengths": np.array([1, 1])}, "add up to the tokens"),
        ({"features": np.ones((3, 2)), "lengths": np.array([3, 0])}, "at least 1"),
        ({"features": np.ones(3), "lengths": np.array([3])}, "(tokens, channels)"),
        ({"features": np.full((1, 2), np.inf), "lengths": np.array([1])}, "NaN or infinity"),
        ({"features": np.ones((3, 2)), "lengths": np.array([2.0, 1.0])}, "whole numbers"),
        ({"features": np.ones((3, 2)), "lengths": np.array(["2", "1"])}, "lengths: of <U1"),
        ({"features": np.array([["a"]]), "lengths": np.array([1])}, "features: of <U1"),
    ],
)
def test_files_that_hold_something_else(
    arrays: dict[str, np.ndarray], words: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(InputError) as caught:
        load_features(tmp_path / "f.npz")
    one_line(caught, str(tmp_path / "f.npz"), words)


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    (tmp_path / "f.npz").write_bytes(b"nothing of the kind")
    for name in ("f.npz", "gone.npz"):
        with pytest.raises(InputError) as caught:
            load_features(tmp_path / name)
        one_line(caught, name)
