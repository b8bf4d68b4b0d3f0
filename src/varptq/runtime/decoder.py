"""The image decoder of an integer runtime: channels last, which saves oneDNN its copies, in float32
or bfloat16: half the bytes, and faster where the CPU has bfloat16 products. Ids are not touched.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from varptq.artifact.mapped import return_free_memory
from varptq.models.pipeline import Pipeline

P = TypeVar("P", bound=Pipeline)


def decode_in(pipe: P, dtype: torch.dtype) -> P:
    """Decode images in `dtype` from now on, in place; the token map stays as it is."""
    parts = [pipe.vae.get_submodule(name) for name in pipe.vae.DECODING]
    for part in parts:
        if pipe.device.type == "cpu":
            part.to(dtype).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for module in (*parts[:1], *pipe.vae.upsamplings()):
        module.register_forward_pre_hook(_return_free_memory)
    return pipe


def _return_free_memory(*_: object) -> None:
    """What sampling or the last level has freed, before maps four times as large are taken."""
    return_free_memory()
