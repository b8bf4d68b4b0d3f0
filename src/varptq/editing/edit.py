"""`edit`: regenerate a part of an image and keep the rest, with any pipeline on any runtime.

The image is encoded to tokens; at every scale the tokens of the kept part are given to the model
and the others are drawn, so that h = m * h_given + (1 - m) * h_drawn for every token embedding. A
token of many draws is given or drawn as a whole. What is asked for is a prompt of the model's kind,
a class or a text, or nothing: then guidance changes nothing and the batch is not doubled. There is
no training and there are no extra weights. Source: Tian et al. (VAR), zero-shot editing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varptq.editing.frame import Frame
from varptq.editing.masks import (
    Mask,
    alpha_mask,
    box_mask,
    feather_width,
    feathered,
    forced_ids,
    keep_mask,
    picture_mask,
)
from varptq.editing.reading import MaskLike
from varptq.errors import InputError
from varptq.models.bare import bare
from varptq.models.generate import DEFAULT_BATCH, generate
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import Prompts
from varptq.models.sampling import PerScale, SamplingSettings, listed
from varptq.models.scales import Size
from varptq.pictures import to_pixels
from varptq.progress import Progress, silent
from varptq.reading import ImageLike, flattened, read_image
from varptq.torch_state import plain_torch

Task = Literal["inpaint", "outpaint", "class", "prompt"]
PAINTING = ("inpaint", "outpaint")
# Candidates, what they are compared with, and where they differ.
Pictures = tuple[list[Image.Image], Image.Image, Image.Image]
TASKS: tuple[Task, ...] = ("inpaint", "outpaint", "class", "prompt")


@dataclass(frozen=True)
class EditResult:
    """images: the candidates, in the size and mode of `before` (raw: the model's, RGB). tokens:
    (n, L) int64. before: the upright input (raw: as the model sees it). mask_used: "L" of the same
    size, the weight of the new image at every pixel; 0 left the pixel unchanged. keep_L: (L,)
    bool, which tokens were given. asked: what was drawn towards, in words, None for
    nothing. sampling: all settings that were used. Candidate i drew from (seed, first_index +
    i)."""

    images: list[Image.Image]
    tokens: Tensor
    before: Image.Image
    mask_used: Image.Image
    keep_L: Tensor
    asked: str | None
    sampling: SamplingSettings
    seed: int
    first_index: int = 0

    @property
    def cfg(self) -> PerScale:
        """The guidance that was used."""
        assert self.sampling.cfg is not None
        return self.sampling.cfg


@plain_torch()
def edit(
    pipe: Pipeline,
    image: ImageLike,
    *,
    task: str = "inpaint",
    mask: MaskLike | None = None,
    box: Sequence[float] | None = None,
    to: Any = None,
    negative: Any = None,
    size: Any = None,
    fit: str = "crop",
    candidates: int = 1,
    seed: int = 0,
    first_index: int = 0,
    cfg: float | Sequence[float] | None = None,
    tau: float | Sequence[float] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    feather: int | None = None,
    raw: bool = False,
    batch_size: int = DEFAULT_BATCH,
    progress: Progress = silent,
) -> EditResult:
    """Regenerate a part of `image`; returns `candidates` alternatives.

    image: path, bytes of a file or Pillow image, of any size. task: "inpaint", "outpaint", or the
    one that needs `to` and may regenerate all of the image: "class" for a model of classes,
    "prompt" for one that reads texts. to, negative: a prompt as `Pipeline.prompts` takes it, class
    or text; None is nothing. mask: picture or array (H, W) of the image's size, white or True is
    regenerated. box: instead of a mask, (x0, y0, x1, y1) relative to the image; its inside is
    regenerated, with "outpaint" what lies around it. With neither, transparent pixels are. size: as
    `Pipeline.sized` takes it; None is the model's own in the image's proportions. fit: "crop" shows
    the model the centre, "pad" the whole image. feather: pixels around the mask over which old and
    new are mixed, None is half a token. raw: the model's own image, not pasted. Candidate i draws
    from (seed, first_index + i) alone. Raises `InputError` and `ConfigError`.
    """
    if candidates < 1:
        raise InputError(f"candidates {candidates}: must be at least 1")
    guided: dict[str, Any] = {"cfg": cfg, "tau": tau, "top_k": top_k, "top_p": top_p}
    chosen: dict[str, Any] = {"mask": mask, "box": box, "to": to, "negative": negative}
    found = prepare(pipe, image, task=task, size=size, fit=fit, feather=feather, **chosen, **guided)
    output = generate(
        found.pipe,
        found.prompts(candidates),
        seed=seed,
        **found.sampling.to_dict(),
        forced=found.given().repeat_interleave(candidates, 0),
        first_index=first_index,
        batch_size=batch_size,
        progress=progress,
    )
    assert output.images is not None
    images, before, mask = found.pictures(output.images, raw=raw)
    said = (found.keep_L, found.asked, found.sampling, seed, first_index)
    return EditResult(images, output.tokens, before, mask, *said)


@plain_torch()
def prepare(
    pipe: Pipeline,
    image: ImageLike,
    *,
    task: str = "inpaint",
    mask: MaskLike | None = None,
    box: Sequence[float] | None = None,
    to: Any = None,
    negative: Any = None,
    size: Any = None,
    fit: str = "crop",
    cfg: float | Sequence[float] | None = None,
    tau: float | Sequence[float] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    feather: int | None = None,
) -> PreparedEdit:
    """An edit that is checked and not drawn yet; arguments and errors are those of `edit`."""
    pipe = bare(pipe)
    wanted = SamplingSettings(cfg=listed(cfg), tau=listed(tau), top_k=top_k, top_p=top_p)
    _check(pipe, task, to, feather)
    before = read_image(image)
    pipe = _sized(pipe, size, before)
    sampling = _sampling(pipe, task, wanted, asks=to is not None or negative is not None)
    pipe.plan(sampling, negative=negative is not None)
    view = _View.of(before, pipe, task, mask, box, fit)
    keep_L = keep_mask(view.mask.cells_PQ, pipe.scales)
    prompt = pipe.prompts(_one(pipe, to), negative)
    asked = None if to is None else prompt.titles()[0]
    return PreparedEdit(pipe, prompt, sampling, keep_L, asked, view, feather)


@dataclass(frozen=True)
class _View:
    """An image, what the model sees of it, and what of it is regenerated; `last`, the last map."""

    image: Image.Image
    frame: Frame
    last: Size
    mask: Mask

    @classmethod
    def of(
        cls,
        image: Image.Image,
        pipe: Pipeline,
        task: str,
        mask: MaskLike | None,
        box: Sequence[float] | None,
        fit: str,
    ) -> Self:
        frame, last = Frame.of(image.size, pipe.vae.image_size, fit), pipe.scales.last
        return cls(image, frame, last, _mask(image, frame, last, task, mask, box))

    @property
    def seen(self) -> Image.Image:
        return self.frame.to_model(flattened(self.image))

    def raw(self, drawn: list[Image.Image]) -> Pictures:
        """The model's own images, its input, and the mask as it sees it."""
        mask = self.frame.mask_to_model(self.mask.pixels)
        return drawn, self.seen, Image.fromarray(mask).convert("L")

    def pasted(self, drawn: list[Image.Image], feather: int | None) -> Pictures:
        """The image with what was drawn laid over it, the image, and the weight of that."""
        width = feather_width(feather, self.frame, self.last)
        weight = feathered(self.mask.pixels, width, self.frame)
        return [self.frame.paste(self.image, one, weight) for one in drawn], self.image, weight


@dataclass(frozen=True)
class PreparedEdit:
    """An edit that is checked and not drawn yet, so that its candidates can be drawn in a batch
    with other images. pipe: the model at the size it draws; prompt: one; keep_L, asked, sampling:
    as in `EditResult`. Pixels go to `pictures` as they come, unfinished ones too."""

    pipe: Pipeline
    prompt: Prompts
    sampling: SamplingSettings
    keep_L: Tensor
    asked: str | None
    view: _View
    feather: int | None

    def prompts(self, candidates: int) -> Prompts:
        """One for each candidate."""
        return self.prompt[torch.zeros(candidates, dtype=torch.int64, device="cpu")]

    @plain_torch()
    def given(self) -> Tensor:
        """Tokens of the image as `generate(forced=...)` takes them, for one candidate: int64 (1, L)
        or (1, L, draws), -1 where they are drawn. The image is encoded for it."""
        return forced_ids(encode(self.pipe, [self.view.seen]), self.keep_L)

    def pictures(self, images_B3HW: Tensor, *, raw: bool = False) -> Pictures:
        """Candidates, what they are compared with, and where they differ, of the B images in [0, 1]
        that the model drew; raw: not pasted."""
        drawn = [Image.fromarray(pixels) for pixels in to_pixels(images_B3HW)]
        return self.view.raw(drawn) if raw else self.view.pasted(drawn, self.feather)


def encode(pipe: Pipeline, images: Sequence[Image.Image]) -> Tensor:
    """RGB images of the model's size -> tokens int64 on the model's device, (B, L) or (B, L,
    draws)."""
    pixels = np.stack([np.asarray(image) for image in images])
    x_B3SS = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return pipe.vae.encode(x_B3SS.to(pipe.device))


def _check(pipe: Pipeline, task: str, to: Any, feather: int | None) -> None:
    """Raise `InputError` for a width, and for a task that is unknown, of another kind of model, or
    lacks what it is towards."""
    if feather is not None and feather < 0:
        raise InputError(f"feather {feather}: must be 0 pixels or more")
    if task not in TASKS:
        raise InputError(f"task {task!r}: unknown, expected one of {', '.join(TASKS)}")
    own, does = ("prompt", "reads texts") if pipe.var.READS_TEXTS else ("class", "knows classes")
    if task in PAINTING:
        return
    if task != own:
        raise InputError(f"task {task}: model {pipe.name!r} {does}; use task {own}")
    if to is None:
        hint = "give the name or id of the class to change to"
        if own == "prompt":
            hint = "give a text that says what to change to"
        raise InputError(f"task {task}: no {own} given; {hint}")


def _sized(pipe: Pipeline, size: Any, image: Image.Image) -> Pipeline:
    """The model at `size`, or at its own in the proportions of the image."""
    if size is not None:
        return pipe.sized(size)
    width, height = image.size
    return pipe.over(pipe.var.shaped(height, width))


def _sampling(
    pipe: Pipeline, task: str, wanted: SamplingSettings, *, asks: bool
) -> SamplingSettings:
    """The settings with every value given. Raises `InputError` for guidance towards nothing."""
    if not asks:
        if wanted.cfg is not None and any(pipe.var.strengths(wanted.cfg)):
            raise InputError(
                f"cfg {wanted.cfg}: {task} towards nothing has nothing to be guided to; leave it "
                "out, or say what is to be drawn"
            )
        wanted = wanted.replace(cfg=pipe.var.UNGUIDED)
    return pipe.filled(wanted)


def _one(pipe: Pipeline, to: Any) -> Any:
    """A prompt alone, or nothing, as `Pipeline.prompts` takes several. Raises `InputError` for
    several."""
    if to is None:
        return pipe.var.unasked()
    if not isinstance(to, Prompts):
        return [to]
    if len(to) != 1:
        raise InputError(f"to: {len(to)} prompts, expected one; give them one after the other")
    return to


def _mask(
    image: Image.Image,
    frame: Frame,
    last: Size,
    task: str,
    mask: MaskLike | None,
    box: Sequence[float] | None,
) -> Mask:
    """The chosen mask. Raises `InputError` if it leaves nothing to regenerate or, for painting,
    nothing to keep."""
    if mask is not None and box is not None:
        raise InputError("mask and box: both given, expected one of them")
    if box is not None:
        what, chosen = "box", box_mask(box, frame, last, inside=task != "outpaint")
    elif mask is not None:
        what, chosen = "mask", picture_mask(mask, frame, last)
    elif image.mode == "RGBA":
        what, chosen = "alpha channel", alpha_mask(image, frame, last)
    else:
        raise InputError(
            "mask: none given; give a mask, a box, or an image with transparent pixels"
        )
    if chosen.pixels.getbbox() is None:
        raise InputError(
            f"{what}: empty, so nothing would be regenerated; cover a part of the image"
        )
    if not chosen.cells_PQ.any():
        raise InputError(
            f"{what}: covers no token of the {last[0]} x {last[1]} grid over what the model sees; "
            "make it larger, or use fit pad to show the model the whole image"
        )
    if chosen.cells_PQ.all() and task in PAINTING:
        raise InputError(
            f"{what}: full, so no token of the {last[0]} x {last[1]} grid is kept; leave a part of "
            "the image, or use task class, task prompt or generate"
        )
    return chosen
