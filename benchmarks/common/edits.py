"""What `varptq.edit` does with a box, for one image each and in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

import varptq
from varptq.editing.edit import encode
from varptq.editing.frame import Frame
from varptq.editing.masks import box_mask, feather_width, feathered, forced_ids, keep_mask
from varptq.models.pipeline import Pipeline
from varptq.pictures import Pixels, to_pixels

Box = tuple[float, float, float, float]


def edited(
    pipe: Pipeline,
    images: Pixels,
    classes: Sequence[Any] | torch.Tensor,
    box: Box,
    *,
    cfg: float,
    seed: int,
    batch: int,
    inside: bool = True,
    first_index: int = 0,
) -> Pixels:
    """Images (N, H, W, 3) of one size with the box redrawn towards their classes, or, with `inside`
    off, what lies around it; image i draws from (seed, first_index + i)."""
    originals = [Image.fromarray(image) for image in images]
    frame = Frame.of(originals[0].size, pipe.vae.image_size, "crop")
    mask = box_mask(box, frame, pipe.scales.last, inside=inside)
    weight = feathered(mask.pixels, feather_width(None, frame, pipe.scales.last), frame)
    starts = range(0, len(originals), batch)
    given = torch.cat([encode(pipe, originals[at : at + batch]) for at in starts])
    drawn = varptq.generate(
        pipe,
        classes,
        seed=seed,
        cfg=cfg,
        forced=forced_ids(given, keep_mask(mask.cells_PQ, pipe.scales)),
        first_index=first_index,
        batch_size=batch,
    )
    assert drawn.images is not None
    pairs = zip(originals, to_pixels(drawn.images), strict=True)
    pasted = [frame.paste(a, Image.fromarray(b), weight) for a, b in pairs]
    return np.stack([np.asarray(image) for image in pasted])
