"""varptq in ComfyUI: load a model, generate, in-paint.

ComfyUI's IMAGE is (B, H, W, C) float32, 0 to 1; its MASK is (B, H, W) or (H, W), 1 where the image
is made anew. docs/integrations.md says how to install the pack.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import varptq
from varptq.errors import InputError
from varptq.models.placement import checked_device
from varptq.pictures import to_pixels
from varptq.runtime import RUNTIMES
from varptq.runtime.resolve import AUTO

MODEL = "VARPTQ_MODEL"
CATEGORY = "varptq"
MOST_IMAGES = 64
SEED = ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True})
PROMPT = ("STRING", {"default": "", "tooltip": "a class by name or number, or a text"})
# A number of ComfyUI cannot be left out.
OWN_CFG = -1.0
CFG_RANGE = {"default": OWN_CFG, "min": OWN_CFG, "max": 30.0, "step": 0.1}
CFG = ("FLOAT", {**CFG_RANGE, "tooltip": "strength of guidance; -1: the model's own"})


class Load:
    """An artifact or a float preset, once for all that is drawn from it."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        source = {"default": "demo", "tooltip": "a folder, org/name of the hub, or a preset's name"}
        return {
            "required": {
                "source": ("STRING", source),
                "runtime": ([AUTO, *RUNTIMES], {"default": AUTO}),
                "device": ("STRING", {"default": "cpu"}),
            }
        }

    def load(self, source: str, runtime: str, device: str) -> tuple[varptq.Pipeline]:
        place = checked_device(device)
        if "/" in source or Path(source).exists():
            return (varptq.load(source, runtime=runtime, device=place),)
        if runtime != AUTO:
            raise InputError(f"runtime {runtime!r}: {source!r} is a float model, it has none")
        return (varptq.load_model(source, device=place),)


class Generate:
    """Images of one prompt; image i draws from (seed, i) alone."""

    CATEGORY, FUNCTION = CATEGORY, "generate"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        count = {"default": 1, "min": 1, "max": MOST_IMAGES}
        return {
            "required": {
                "model": (MODEL,),
                "prompt": PROMPT,
                "seed": SEED,
                "count": ("INT", count),
                "cfg": CFG,
            }
        }

    def generate(
        self, model: varptq.Pipeline, prompt: str, seed: int, count: int, cfg: float
    ) -> tuple[Tensor]:
        drawn = varptq.generate(model, [prompt.strip()] * count, seed=seed, cfg=strength(cfg))
        assert drawn.images is not None
        return (drawn.images.permute(0, 2, 3, 1).contiguous().cpu(),)


class Inpaint:
    """Every image of a batch with the masked part made anew, in its own size."""

    CATEGORY, FUNCTION = CATEGORY, "inpaint"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prompt = (PROMPT[0], {**PROMPT[1], "tooltip": "a class or a text; empty for nothing"})
        return {
            "required": {
                "model": (MODEL,),
                "image": ("IMAGE",),
                "mask": ("MASK",),
                "prompt": prompt,
                "seed": SEED,
                "cfg": CFG,
            }
        }

    def inpaint(
        self,
        model: varptq.Pipeline,
        image: Tensor,
        mask: Tensor,
        prompt: str,
        seed: int,
        cfg: float,
    ) -> tuple[Tensor]:
        """Image i draws from (seed, i). Raises `InputError` for a mask that does not fit."""
        masks = (mask if mask.dim() == 3 else mask.unsqueeze(0)).cpu()
        if len(masks) not in (1, len(image)):
            raise InputError(f"mask: {len(masks)} for {len(image)} images, expected one or as many")
        # A fourth channel, which some nodes give, is left out.
        pictures = to_pixels(image[..., :3].permute(0, 3, 1, 2))
        edited = [
            varptq.edit(
                model,
                Image.fromarray(one),
                mask=area.ge(0.5).numpy(),
                to=prompt.strip() or None,
                seed=seed,
                first_index=index,
                cfg=strength(cfg),
            ).images[0]
            for index, (one, area) in enumerate(
                zip(pictures, masks.expand(len(image), -1, -1), strict=True)
            )
        ]
        pixels = [np.asarray(made.convert("RGB"), dtype=np.float32) / 255 for made in edited]
        return (torch.from_numpy(np.stack(pixels)),)


def strength(cfg: float) -> float | None:
    """What varptq takes for the number of a node."""
    return None if cfg == OWN_CFG else cfg


NODE_CLASS_MAPPINGS = {
    "VarptqLoad": Load,
    "VarptqGenerate": Generate,
    "VarptqInpaint": Inpaint,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "VarptqLoad": "Load model (varptq)",
    "VarptqGenerate": "Generate (varptq)",
    "VarptqInpaint": "In-paint (varptq)",
}
