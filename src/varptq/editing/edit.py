"""`edit`: regenerate a part of an image and keep the rest, with any pipeline on any runtime.

The image is encoded to tokens; at every scale the tokens of the kept part are given to the model
and the others are drawn, so that h = m * h_given + (1 - m) * h_drawn for every token embedding. In-
and out-painting run under the label "unconditional", where guidance changes nothing and the batch
is not doubled. There is no training and there are no extra weights. Source: Tian et al. (VAR),
zero-shot editing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
from varptq.models.sampling_defaults import CFG, TOP_K, TOP_P
from varptq.pictures import to_pixels
from varptq.progress import Progress, silent
from varptq.reading import ImageLike, flattened, read_image
from varptq.torch_state import plain_torch

Task = Literal["inpaint", "outpaint", "class"]
TASKS: tuple[Task, ...] = ("inpaint", "outpaint", "class")
CLASS_TASK: Task = "class"


@dataclass(frozen=True)
class EditResult:
    """images: the candidates, in the size and mode of `before` (raw: the model's, RGB). tokens:
    (n, L) int64. before: the upright input (raw: as the model sees it). mask_used: "L" of the same
    size, the weight of the new image at every pixel; 0 left the pixel unchanged. keep_L: (L,)
    bool, which tokens were given. cfg: the guidance that was used. Candidate i drew from
    (seed, first_index + i)."""

    images: list[Image.Image]
    tokens: Tensor
    before: Image.Image
    mask_used: Image.Image
    keep_L: Tensor
    cfg: float
    seed: int
    first_index: int = 0


@plain_torch()
def edit(
    pipe: Pipeline,
    image: ImageLike,
    *,
    task: str = "inpaint",
    mask: MaskLike | None = None,
    box: Sequence[float] | None = None,
    label: int | str | None = None,
    fit: str = "crop",
    candidates: int = 1,
    seed: int = 0,
    first_index: int = 0,
    cfg: float | None = None,
    top_k: int = TOP_K,
    top_p: float = TOP_P,
    feather: int | None = None,
    raw: bool = False,
    batch_size: int = DEFAULT_BATCH,
    progress: Progress = silent,
) -> EditResult:
    """Regenerate a part of `image`; returns `candidates` alternatives.

    image: path, bytes of a file or Pillow image, of any size and mode. task: "inpaint", "outpaint"
    (neither takes a label) or "class" (regenerates towards `label`, an id or name, with guidance
    `cfg`, the usual one if None). mask: picture or array (H, W) of the image's size, white or True
    is regenerated. box: instead of a mask, (x0, y0, x1, y1) relative to the image; its inside is
    regenerated, with "outpaint" what lies around it. With neither, transparent pixels are. fit:
    "crop" shows the model the centred square, "pad" the whole image. feather: pixels around the
    mask over which old and new are mixed, None is half a token. raw: the model's own image,
    not pasted. Candidate i draws from (seed, first_index + i) alone. Raises `InputError` for
    arguments and `ConfigError` for settings that cannot be used.
    """
    pipe, cfg = bare(pipe), _guidance(task, label, cfg)
    _check_counts(candidates, feather)
    prompts = _prompts(pipe, label, candidates)  # an unknown class is named before any work
    before, side = read_image(image), pipe.scales.last_side
    frame = Frame.of(before.size, pipe.vae.image_size, fit)
    chosen = _mask(before, frame, side, task, mask, box)
    seen = frame.to_model(flattened(before))
    keep_L = keep_mask(chosen.cells_PP, pipe.scales)
    output = generate(
        pipe,
        prompts,
        seed=seed,
        cfg=cfg,
        top_k=top_k,
        top_p=top_p,
        forced=forced_ids(encode(pipe, [seen]), keep_L).repeat_interleave(candidates, 0),
        first_index=first_index,
        batch_size=batch_size,
        progress=progress,
    )
    assert output.images is not None
    images = [Image.fromarray(pixels) for pixels in to_pixels(output.images)]
    if raw:
        before, weight = seen, Image.fromarray(frame.mask_to_model(chosen.pixels)).convert("L")
    else:
        weight = feathered(chosen.pixels, feather_width(feather, frame, side), frame)
        images = [frame.paste(before, generated, weight) for generated in images]
    return EditResult(images, output.tokens, before, weight, keep_L, cfg, seed, first_index)


def encode(pipe: Pipeline, images: Sequence[Image.Image]) -> Tensor:
    """RGB images of the model's size -> ids (B, L) int64 on the model's device."""
    pixels = np.stack([np.asarray(image) for image in images])
    x_B3SS = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return pipe.vae.encode(x_B3SS.to(pipe.device))


def _check_counts(candidates: int, feather: int | None) -> None:
    if candidates < 1:
        raise InputError(f"candidates {candidates}: must be at least 1")
    if feather is not None and feather < 0:
        raise InputError(f"feather {feather}: must be 0 pixels or more")


def _guidance(task: str, label: int | str | None, cfg: float | None) -> float:
    """Guidance of a task. Raises `InputError` for it and a label that the task does not take."""
    if task not in TASKS:
        raise InputError(f"task {task!r}: unknown, expected one of {', '.join(TASKS)}")
    if task == CLASS_TASK:
        if label is None:
            raise InputError(
                "task class: no label given; give the name or id of the class to change to"
            )
        return CFG if cfg is None else cfg
    if label is not None:
        raise InputError(f"label {label!r}: {task} takes none; leave it out or use task class")
    if cfg:
        raise InputError(
            f"cfg {cfg:g}: {task} has no class to be guided to; leave it out or use task class"
        )
    return 0.0


def _prompts(pipe: Pipeline, label: int | str | None, count: int) -> Prompts:
    """The label, or nothing, for every candidate. Raises `InputError` for an unknown one."""
    one = pipe.pool()[slice(0, 1)].nothing() if label is None else pipe.prompts([label])
    return one[torch.zeros(count, dtype=torch.int64, device="cpu")]


def _mask(
    image: Image.Image,
    frame: Frame,
    side: int,
    task: str,
    mask: MaskLike | None,
    box: Sequence[float] | None,
) -> Mask:
    """The chosen mask. Raises `InputError` if it leaves nothing to regenerate or, unless the task
    is "class", nothing to keep."""
    if mask is not None and box is not None:
        raise InputError("mask and box: both given, expected one of them")
    if box is not None:
        what, chosen = "box", box_mask(box, frame, side, inside=task != "outpaint")
    elif mask is not None:
        what, chosen = "mask", picture_mask(mask, frame, side)
    elif image.mode == "RGBA":
        what, chosen = "alpha channel", alpha_mask(image, frame, side)
    else:
        raise InputError(
            "mask: none given; give a mask, a box, or an image with transparent pixels"
        )
    if chosen.pixels.getbbox() is None:
        raise InputError(
            f"{what}: empty, so nothing would be regenerated; cover a part of the image"
        )
    if not chosen.cells_PP.any():
        raise InputError(
            f"{what}: covers no token of the {side} x {side} grid over what the model sees; "
            "make it larger, or use fit pad to show the model the whole image"
        )
    if chosen.cells_PP.all() and task != CLASS_TASK:
        raise InputError(
            f"{what}: full, so no token of the {side} x {side} grid is kept; leave a part of "
            "the image, or use task class or generate"
        )
    return chosen
