"""Requests and answers in the shape of the OpenAI images API.

Fields beyond theirs: seed, negative_prompt, cfg, tau, top_k and top_p. Of theirs, quality, style,
moderation, user and input_fidelity are taken and change nothing. A field that is null counts as
left out.
"""

from __future__ import annotations

import base64
import io
import json
import time
from typing import Any, Literal

from PIL import Image
from pydantic import Field, model_validator

from varptq.models.prompts import Prompts
from varptq.models.sampling import SamplingSettings
from varptq.reading import flattened
from varptq.settings import Settings

MAX_IMAGES, MAX_PREVIEWS, MAX_SEED = 10, 3, 2**63 - 1
PNG_LEVEL = 3
GENERATION, EDIT = "image_generation", "image_edit"


class ImageRequest(Settings):
    """The fields of both endpoints, but for an edit's files."""

    prompt: str
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_IMAGES)
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(default=100, ge=0, le=100)
    background: Literal["auto", "opaque"] = "auto"
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=MAX_PREVIEWS)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    negative_prompt: str | None = None
    cfg: float | tuple[float, ...] | None = None
    tau: float | tuple[float, ...] | None = None
    top_k: int | None = None
    top_p: float | None = None
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    user: str | None = None
    input_fidelity: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value is not None}

    @property
    def guidance(self) -> dict[str, Any]:
        """How to draw, as `edit` takes it."""
        return {"cfg": self.cfg, "tau": self.tau, "top_k": self.top_k, "top_p": self.top_p}

    @property
    def sampling(self) -> SamplingSettings:
        """The same as settings. Raises `ConfigError`."""
        return SamplingSettings(**self.guidance)

    def encoded(self, picture: Image.Image) -> str:
        """The file that was asked for, in base 64."""
        buffer = io.BytesIO()
        if self.output_format == "png":
            picture.save(buffer, "PNG", compress_level=PNG_LEVEL)
        else:
            # JPEG has no transparency; WebP keeps it.
            kept = flattened(picture) if self.output_format == "jpeg" else picture
            kept.save(buffer, self.output_format.upper(), quality=self.output_compression)
        return base64.b64encode(buffer.getvalue()).decode()


def previewed(count: int, scales: int) -> frozenset[int]:
    """After which of the scales `count` previews are shown: evenly spread, never the last."""
    places = {round((i + 1) * scales / (count + 1)) - 1 for i in range(count)}
    return frozenset(place for place in places if 0 <= place < scales - 1)


def usage_of(prompts: Prompts, tokens: int) -> dict[str, Any]:
    """Tokens of the texts, a class counting as one, and `tokens` of every image."""
    facts = prompts.facts()
    texts = sum(fact["tokens"] if isinstance(fact, dict) else 1 for fact in facts)
    drawn = tokens * len(prompts)
    return {
        "input_tokens": texts,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": texts},
        "output_tokens": drawn,
        "total_tokens": texts + drawn,
    }


def common(asked: ImageRequest, size: tuple[int, int], seed: int) -> dict[str, Any]:
    """What every answer and event says. size: (width, height) of the images."""
    return {
        "background": "opaque",
        "output_format": asked.output_format,
        "size": f"{size[0]}x{size[1]}",
        "seed": seed,
    }


def event(kind: str, fields: dict[str, Any]) -> bytes:
    """A server-sent event."""
    content = json.dumps({"type": kind, "created_at": int(time.time()), **fields})
    return f"event: {kind}\ndata: {content}\n\n".encode()
