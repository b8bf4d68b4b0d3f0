"""The image decoder of an integer runtime: channels last, which spares oneDNN copies, in float32 or
bfloat16 (half the bytes, and faster where the CPU has bfloat16 products). Token ids do not change.
Where its convolutions compute on integers, what is between them is float32.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from varptq.artifact.mapped import return_free_memory
from varptq.models.pipeline import Pipeline
from varptq.runtime.convolutions import decodes_on_integers

P = TypeVar("P", bound=Pipeline)


def decode_in(pipe: P, dtype: torch.dtype) -> P:
    """Decode images in `dtype` from now on, in place, unless on integers; the token map stays as
    it is."""
    integers = decodes_on_integers(pipe.vae)
    dtype = torch.float32 if integers else dtype
    parts = [pipe.vae.get_submodule(name) for name in pipe.vae.DECODING]
    for part in parts:
        part.to(dtype)
        if pipe.device.type == "cpu":
            part.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    # Maps on integers have memory that goes from one to the next (native/room.py).
    later = [] if integers else pipe.vae.upsamplings()
    for module in (*parts[:1], *later):
        module.register_forward_pre_hook(_return_free_memory)
    return pipe


def _return_free_memory(*_: object) -> None:
    """Return what sampling or the last level freed, before allocating maps four times as large."""
    return_free_memory()
