"""CLIP score: how well an image fits its text.

    score = 100 max(0, cos(image embedding, text embedding))
Hessel et al. 2021 without their factor 2.5, as in torchmetrics. The model is transformers' CLIP,
read without pickle; transformers is not a dependency of varptq. The texts
are the captions of the prompts (models/prompts.py). Images are resized with torch, not Pillow.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from varptq.errors import CheckpointError, InputError, NonFiniteError
from varptq.evaluate.features import planes
from varptq.models.placement import checked_device

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Images or texts in one batch of the model.
AT_ONCE = 64


class ClipEncoder(Protocol):
    """Maps images and texts to embeddings in one space."""

    def __call__(self, pixels_BHW3: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, H, W, 3) uint8 and T texts -> embeddings (B, D) and (T, D) of any length."""
        ...


def clip_score(pixels_BHW3: Tensor, texts: Sequence[str], encoder: ClipEncoder) -> Tensor:
    """(B,) float32 scores from 0 to 100 of images (B, H, W, 3) uint8 and their B texts.

    Raises `InputError` if there are not as many texts as images, `NonFiniteError` for embeddings
    with NaN or infinity.
    """
    if len(texts) != len(pixels_BHW3):
        raise InputError(
            f"{len(pixels_BHW3)} images and {len(texts)} texts, expected one text per image"
        )
    # Images of one class share their text, which need not be encoded more than once.
    distinct = list(dict.fromkeys(texts))
    images_BD, texts_TD = encoder(pixels_BHW3, distinct)
    if not (images_BD.isfinite().all() and texts_TD.isfinite().all()):
        raise NonFiniteError("CLIP embeddings: hold NaN or infinity; check the model and its dtype")
    rows = [distinct.index(text) for text in texts]
    return 100 * F.cosine_similarity(images_BD, texts_TD[rows]).clamp_min(0).float()


class TransformersClip:
    """transformers' CLIP as an encoder."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device | str = "cpu") -> None:
        self.device = checked_device(device)
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self._side = int(model.config.vision_config.image_size)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(3, 1, 1)
            for values in (MEAN, STD)
        )

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu") -> Self:
        """From a folder or a name on the Hugging Face hub, e.g. "openai/clip-vit-large-patch14".

        Raises `InputError` without transformers, `CheckpointError` if the model cannot be read.
        """
        try:
            transformers: Any = importlib.import_module("transformers")
        except ImportError:
            raise InputError(
                "CLIP score: needs the package transformers; pip install transformers"
            ) from None
        try:
            model = transformers.CLIPModel.from_pretrained(name, use_safetensors=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{name}: no CLIP model with safetensors ({reason})") from None
        return cls(model, tokenizer, device)

    @torch.no_grad()
    def __call__(self, pixels_BHW3: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        images = [self._images(batch) for batch in pixels_BHW3.split(AT_ONCE)]
        words = [
            self._texts(texts[start : start + AT_ONCE]) for start in range(0, len(texts), AT_ONCE)
        ]
        return torch.cat(images), torch.cat(words)

    def _images(self, pixels_BHW3: Tensor) -> Tensor:
        seen = self.model.vision_model(pixel_values=self._prepared(pixels_BHW3))
        return self.model.visual_projection(seen.pooler_output)

    def _texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        read = self.model.text_model(
            input_ids=tokens["input_ids"].to(self.device),
            attention_mask=tokens["attention_mask"].to(self.device),
        )
        return self.model.text_projection(read.pooler_output)

    def _prepared(self, pixels_BHW3: Tensor) -> Tensor:
        """Shorter side to the model's, bicubic with antialias; centre square; normalised."""
        images = planes(pixels_BHW3, self.device)
        height, width = images.shape[2:]
        factor = self._side / min(height, width)
        size = (round(height * factor), round(width * factor))
        if size != (height, width):
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
            images = images.round().clamp(0, 255)
        top, left = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        square = images[:, :, top : top + self._side, left : left + self._side]
        return (square / 255 - self._mean) / self._std
