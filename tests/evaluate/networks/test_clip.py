"""CLIP score: its arithmetic with an encoder made up here, and a tiny CLIP where there is one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from varptq.errors import CheckpointError, InputError, NonFiniteError
from varptq.evaluate.networks import clip
from varptq.evaluate.networks.clip import MEAN, STD, TransformersClip, clip_score
from varptq.models.prompts import ClassPrompts


def captions(names: Sequence[str]) -> list[str]:
    return ClassPrompts.pool(len(names), names).captions()


def pixels(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


class Colours:
    """Embeds an image as its mean colour and a text as the colours it names."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, pixels_BHW3: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.texts += texts
        named = [[float(name in text) for name in ("red", "green", "blue")] for text in texts]
        return pixels_BHW3.float().mean((1, 2)), torch.tensor(named)


def test_the_score_is_100_times_the_cosine_and_never_negative() -> None:
    images = torch.zeros(4, 2, 2, 3, dtype=torch.uint8)
    images[0, ..., 0] = images[1, ..., 0] = images[2, ..., 1] = images[3, ..., 1] = 9
    encoder = Colours()
    found = clip_score(images, ["red", "red and blue", "red", "green"], encoder)
    torch.testing.assert_close(found, torch.tensor([100, 100 / 2**0.5, 0, 100]))
    assert encoder.texts == ["red", "red and blue", "green"], "equal texts are encoded once"

    def opposite(pixels_BHW3: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return torch.ones(len(pixels_BHW3), 2), -torch.ones(len(texts), 2)

    assert clip_score(images[:1], ["red"], opposite) == 0


def test_every_image_wants_a_text() -> None:
    with pytest.raises(InputError, match="2 images and 1 texts"):
        clip_score(pixels(2, 3, 3), ["one"], Colours())


def test_class_names_become_prompts() -> None:
    assert captions(["sea_lion", "cat"]) == ["a photo of a sea lion", "a photo of a cat"]
    assert ClassPrompts.pool(3, ()).captions() == []


def test_without_transformers_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install transformers"):
        TransformersClip.load("any")


class Model(torch.nn.Module):
    """Has the attributes of a CLIP that the encoder reads, and keeps the images it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vision_config=SimpleNamespace(image_size=8))
        self.visual_projection = self.text_projection = torch.nn.Identity()
        self.shown: list[Tensor] = []

    def vision_model(self, pixel_values: Tensor) -> SimpleNamespace:
        self.shown.append(pixel_values)
        return SimpleNamespace(pooler_output=pixel_values.mean((2, 3)))

    def text_model(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=input_ids * attention_mask)


def tokens(texts: list[str], **_: object) -> dict[str, Tensor]:
    lengths = torch.tensor([[len(text), 1, 1] for text in texts]).float()
    return {"input_ids": lengths, "attention_mask": torch.ones_like(lengths)}


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 13), (37, 20), (3, 5)])
def test_images_become_normalised_squares(height: int, width: int) -> None:
    model = Model()
    images = pixels(2, height, width)
    TransformersClip(model, tokens)(images, ["a", "b"])
    (shown,) = model.shown
    assert shown.shape == (2, 3, 8, 8)
    values = (shown * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    torch.testing.assert_close(values, values.round().clamp(0, 255), rtol=0, atol=1e-3)
    if height == 8:
        left = (width - 8) // 2
        expected = images[:, :, left : left + 8].permute(0, 3, 1, 2).float()
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-3)


def test_many_images_and_texts_pass_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "AT_ONCE", 3)
    model = Model()
    texts = ["a" * (i + 1) for i in range(7)]
    images_BD, texts_TD = TransformersClip(model, tokens)(pixels(5, 8, 8), texts)
    assert [len(batch) for batch in model.shown] == [3, 2]
    assert len(images_BD) == 5 and texts_TD[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture
def tiny_clip(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [*letters, *(f"{a}</w>" for a in letters), "<|startoftext|>", "<|endoftext|>"]
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": len(vocabulary), "eos_token_id": len(vocabulary) - 1},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=6,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return tmp_path


def test_a_clip_from_a_folder_scores_images(tiny_clip: Path) -> None:
    encoder = TransformersClip.load(str(tiny_clip))
    images = pixels(3, 20, 17)
    scores = clip_score(images, captions(["ant", "bee", "ant"]), encoder)
    assert scores.shape == (3,) and bool(((scores >= 0) & (scores <= 100)).all())
    one = clip_score(images[1:2], ["a photo of a bee"], encoder)
    torch.testing.assert_close(one, scores[1:2], rtol=1e-4, atol=1e-3)
    with pytest.raises(CheckpointError, match="no CLIP model with safetensors"):
        TransformersClip.load(str(tiny_clip / "missing"))


def test_scores_are_those_of_the_whole_model(tiny_clip: Path) -> None:
    """transformers' own forward pass of a tiny random CLIP, with the prepared images."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.CLIPModel.from_pretrained(tiny_clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_clip)
    images, texts = pixels(3, 16, 16), captions(["ant", "sea_lion", "bee"])
    x = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        STD
    ).view(3, 1, 1)
    words = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=x, **words).logits_per_image / model.logit_scale.exp()
    cosines_B = logits.diagonal()
    assert (cosines_B > 0).any() and len(set(cosines_B.tolist())) == 3
    found = clip_score(images, texts, TransformersClip.load(str(tiny_clip)))
    torch.testing.assert_close(found, 100 * cosines_B.clamp_min(0), rtol=1e-4, atol=1e-3)


def test_nan_embeddings_are_refused() -> None:
    def broken(pixels_BHW3: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return torch.full((len(pixels_BHW3), 2), torch.nan), torch.ones(len(texts), 2)

    with pytest.raises(NonFiniteError, match="CLIP embeddings: hold NaN"):
        clip_score(pixels(2, 3, 3), ["a", "b"], broken)
