"""The models that are served, and what a request is to one of them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageChops
from torch import Tensor

from varptq.editing import prepare
from varptq.errors import InputError
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import Prompts
from varptq.models.sampling import SamplingSettings
from varptq.pictures import to_pixels
from varptq.reading import is_opaque, read_image
from varptq.web.api.batches import Order
from varptq.web.api.refusals import RefusalError
from varptq.web.api.shapes import ImageRequest, previewed
from varptq.web.limits import MAX_PIXELS
from varptq.web.loaded import About

AUTO = "auto"
# A seed that nobody has chosen; it is told, so that the image can be drawn again.
FRESH_SEEDS = 2**32


@dataclass(frozen=True)
class Task:
    """An order, and what its images are to the client. size: (width, height) of them."""

    order: Order
    size: tuple[int, int]
    pictured: Callable[[Tensor], Image.Image]


@dataclass(frozen=True)
class Served:
    """A model under a name. `preparing`: requests are made ready one at a time, as a text encoder
    takes all processors."""

    name: str
    pipe: Pipeline
    about: About
    preparing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    def of(cls, name: str, pipe: Pipeline) -> Served:
        return cls(name, pipe, About.of(pipe.var, pipe.vae, pipe.class_names))

    def generation(self, asked: ImageRequest) -> Task:
        """Raises `InputError` and `ConfigError` for what the model cannot draw."""
        pipe = self.pipe.sized(self._size(asked.size))
        if not asked.prompt.strip():
            raise InputError("prompt: empty; say what to draw")
        # Refused before a text is encoded.
        pipe.plan(asked.sampling, negative=asked.negative_prompt is not None)
        prompts = pipe.prompts([asked.prompt] * asked.n, asked.negative_prompt)
        height, width = pipe.vae.image_size
        order = _order(asked, pipe, prompts, pipe.filled(asked.sampling))
        return Task(order, (width, height), lambda drawn: Image.fromarray(to_pixels(drawn)[0]))

    def edit(self, asked: ImageRequest, image: bytes, mask: bytes | None) -> Task:
        """In-painting where `mask`, or the image itself, is transparent. Raises `InputError` and
        `ConfigError` for what cannot be edited."""
        picture = read_image(image, max_pixels=MAX_PIXELS)
        towards = asked.prompt.strip() or None
        change = "prompt" if self.about.texts else "class"
        found = prepare(
            self.pipe,
            picture,
            # These may redraw all of the picture, which painting towards nothing may not.
            task="inpaint" if towards is None else change,
            mask=None if mask is None else mask_of(mask),
            to=towards,
            negative=asked.negative_prompt,
            size=self._size(asked.size),
            **asked.guidance,
        )
        order = _order(asked, found.pipe, found.prompts(asked.n), found.sampling, found.given)
        return Task(order, picture.size, lambda drawn: found.pictures(drawn)[0][0])

    def _size(self, size: str) -> Any:
        """As `Pipeline.sized` takes it. Raises `InputError` for one that the model does not draw
        at."""
        if size == AUTO:
            return None
        height, width = self.about.size
        others = {label.replace(" ", ""): name for label, name in self.about.sizes}
        sizes: dict[str, Any] = {**others, f"{width}x{height}": None}
        if size not in sizes:
            known = ", ".join([AUTO, *sizes])
            raise InputError(f"size {size!r}: model {self.name!r} draws {known}")
        return sizes[size]


def _order(
    asked: ImageRequest,
    pipe: Pipeline,
    prompts: Prompts,
    sampling: SamplingSettings,
    given: Callable[[], Tensor] | None = None,
) -> Order:
    seed = secrets.randbelow(FRESH_SEEDS) if asked.seed is None else asked.seed
    previews = previewed(asked.partial_images if asked.stream else 0, pipe.scales.num_scales)
    return Order(pipe, prompts, sampling, seed, given, previews)


def mask_of(content: bytes) -> Image.Image | bytes:
    """As `edit` takes a mask: OpenAI's, whose transparent pixels are regenerated, turned into black
    and white; one without such pixels as it is, since its white is. Raises `InputError`."""
    mask = read_image(content, what="mask", max_pixels=MAX_PIXELS)
    if mask.mode == "RGBA":
        transparent = ImageChops.invert(is_opaque(mask))
        if transparent.getbbox():
            return transparent
    return content


def found(models: Mapping[str, Served], name: str | None) -> Served:
    """The model of that name, or the first where none is named."""
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise RefusalError(
            404,
            f"model {name!r}: not served here; models: {', '.join(models)}",
            param="model",
            code="model_not_found",
        )
    return models[name]
