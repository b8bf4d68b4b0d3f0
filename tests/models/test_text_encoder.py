"""T5 as a text encoder: what it gives, its cache, what is refused. A tiny random T5 stands in."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import varptq
from helpers.checkpoint_states import one_line
from helpers.infinity_states import ARCH, PRESET
from varptq.errors import CheckpointError, InputError, NonFiniteError
from varptq.models.presets import PRESETS, encoder_of
from varptq.models.text_encoder import LONGEST, T5Encoder

CHANNELS = ARCH.text_channels
# Float32 sums in another order, of a network of two layers.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Words:
    """A tokenizer and a network of no library: a word is the row of its length."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, text: str, *, truncation: bool, max_length: int) -> dict[str, list[int]]:
        assert truncation
        self.asked.append(text)
        return {"input_ids": [*[len(word) for word in text.split()][: max_length - 1], 1]}

    def to(self, device: torch.device) -> Words:
        return self

    def eval(self) -> Words:
        return self


class Network(Words):
    value = 1.0

    def __call__(self, *, input_ids: torch.Tensor) -> Any:  # pyright: ignore
        rows = input_ids.unsqueeze(-1).expand(-1, -1, CHANNELS).half() * self.value
        return SimpleNamespace(last_hidden_state=rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "t5"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"model_type": "t5"}))
    save_file({"x": torch.arange(9.0)}, place / "model.safetensors")
    return place


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> tuple[Words, Network]:
    """transformers, as far as it is asked."""
    words, network = Words(), Network()
    bars = SimpleNamespace(
        is_progress_bar_enabled=lambda: False,
        disable_progress_bar=lambda: None,
        enable_progress_bar=lambda: None,
    )
    module = SimpleNamespace(
        utils=SimpleNamespace(logging=bars),
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda *_, **__: words),
        T5EncoderModel=SimpleNamespace(from_pretrained=lambda *_, **__: network),
    )
    monkeypatch.setitem(sys.modules, "transformers", module)
    return words, network


def test_features_are_cached_by_content(
    folder: Path, library: tuple[Words, Network], tmp_path: Path
) -> None:
    words, _ = library
    encoder = T5Encoder(folder, cache=tmp_path / "cache")
    first = encoder.features(["a red cat", "a dog", "a red cat"])
    assert words.asked == ["a red cat", "a dog"], "a text is encoded once"
    assert [tuple(x.shape) for x in first] == [(4, CHANNELS), (3, CHANNELS), (4, CHANNELS)]
    assert all(x.dtype == torch.float32 for x in first)
    again = T5Encoder(folder, cache=tmp_path / "cache").features(["a dog", ""])
    assert words.asked[2:] == [""] and torch.equal(again[0], first[1]) and len(again[1]) == 1
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    assert torch.equal(encoder.features(["a dog"])[0], first[1]), "a damaged file is made again"
    # Other weights, or another dtype, are another encoder.
    keys = {encoder.key, T5Encoder(folder, dtype="float32").key}
    save_file({"x": torch.arange(9.0) + 1}, folder / "model.safetensors")
    assert len(keys | {T5Encoder(folder).key}) == 3


def test_it_works_without_a_cache(
    folder: Path, library: tuple[Words, Network], tmp_path: Path
) -> None:
    encoder = T5Encoder(folder, cache=False)
    encoder.features(["a"])
    encoder.features(["a"])
    assert library[0].asked == ["a", "a"]
    (tmp_path / "file").write_text("in the way")
    blocked = T5Encoder(folder, cache=tmp_path / "file")
    with pytest.warns(UserWarning, match="features are not kept"):
        blocked.features(["a", "b"])
    assert len(library[0].asked) == 4


def test_long_texts_are_cut(folder: Path, library: tuple[Words, Network]) -> None:
    (found,) = T5Encoder(folder, cache=False).features(["word " * 900])
    assert len(found) == LONGEST and float(found[-1, 0]) == 1, "the end token stays"


def test_features_that_overflow(folder: Path, library: tuple[Words, Network]) -> None:
    library[1].value = 1e6
    with pytest.raises(NonFiniteError, match="use dtype float32"):
        T5Encoder(folder, cache=False).features(["cat"])


def test_without_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(PRESETS, "tiny", PRESET)
    pipe = varptq.build_model("tiny")
    pipe.encoder = T5Encoder(folder, cache=False)
    with pytest.raises(InputError) as caught:
        varptq.generate(pipe, ["a cat"])
    one_line(caught, "tiny", "pip install 'varptq[text]'", "give features")
    pipe.encoder = encoder_of("infinity-2b")
    with pytest.raises(InputError) as caught:
        varptq.generate(pipe, ["a cat"])
    one_line(caught, "google/flan-t5-xl", "pip install 'varptq[text]'")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "config.json: missing"),
        ({"config.json": "{"}, "config.json: missing or no config"),
        ({"config.json": '{"model_type": "clip"}'}, "of a 'clip'"),
        ({"config.json": '{"model_type": "t5"}', "pytorch_model.bin": "x"}, "no safetensors"),
    ],
)
def test_folders_that_are_no_t5(files: dict[str, str], words: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        T5Encoder(tmp_path).features(["a cat"])
    one_line(caught, words)


def test_a_repository_that_is_not_here(
    tmp_path: Path, library: tuple[Words, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    encoder = encoder_of("infinity-2b")
    assert isinstance(encoder, T5Encoder) and encoder_of("var-d16") is None
    monkeypatch.setattr("huggingface_hub.snapshot_download", _refuses)
    with pytest.raises(CheckpointError) as caught:
        encoder.features(["a cat"])
    one_line(caught, "google/flan-t5-xl", "give the folder of a T5")


def _refuses(*_: object, **__: object) -> str:
    raise OSError("not here")


def tiny_t5(place: Path) -> Any:
    """A random T5 with a tokenizer of words."""
    transformers = pytest.importorskip("transformers", reason="the extra text is not installed")
    tokenizers = importlib.import_module("tokenizers")
    names = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "dog"]
    levels = tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>")
    inner = tokenizers.Tokenizer(levels)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(place)
    sizes = {"d_model": CHANNELS, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=7, feed_forward_proj="gated-gelu", **sizes)
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(config)
    model.save_pretrained(place)
    return model.eval()


def padded(place: Path, model: Any, texts: Sequence[str]) -> list[torch.Tensor]:
    """As the published models were trained: padded to 512, cut, and the padding taken out."""
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    tokens = tokenizer(
        list(texts),
        padding="max_length",
        max_length=LONGEST,
        truncation=True,
        return_tensors="pt",
    )
    kept = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = model(**kept).last_hidden_state
    return [x[mask.bool()] for x, mask in zip(hidden, tokens["attention_mask"], strict=True)]


def test_it_is_the_padded_network_without_the_padding(tmp_path: Path) -> None:
    model = tiny_t5(tmp_path)
    texts = ["a red cat", "", "dog " * 600, "a blue dog"]
    found = T5Encoder(tmp_path, dtype="float32", cache=False).features(texts)
    assert [len(x) for x in found] == [4, 1, LONGEST, 4]
    for ours, theirs in zip(found, padded(tmp_path, model, texts), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    half = T5Encoder(tmp_path, cache=False).features(texts)
    assert all(x.dtype == torch.float32 and torch.equal(x, x.half().float()) for x in half)
    torch.testing.assert_close(half[0], found[0], rtol=1e-2, atol=1e-2)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_t5(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        T5Encoder(tmp_path, cache=False).features(["a cat"])
    one_line(caught, "no T5 with a tokenizer")


def test_an_image_from_a_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_t5(tmp_path)
    monkeypatch.setitem(PRESETS, "tiny", PRESET)
    pipe = varptq.build_model("tiny")
    pipe.encoder = T5Encoder(tmp_path, cache=False)
    drawn = varptq.generate(pipe, ["a red cat", "dog"], negative="a dog", seed=1, decode=False)
    rows = pipe.prompts(["a red cat"], ["a dog"])
    alone = varptq.generate(pipe, rows, seed=1, decode=False)
    assert torch.equal(alone.tokens, drawn.tokens[:1])
