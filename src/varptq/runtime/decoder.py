"""The image decoder of an integer runtime: channels last, which spares oneDNN copies, in float32 or
bfloat16 (half the bytes, and faster where the CPU has bfloat16 products). Token ids do not change.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from varptq.artifact.mapped import return_free_memory
from varptq.models.pipeline import Pipeline
from varptq.models.vqvae import Upsample

P = TypeVar("P", bound=Pipeline)


def decode_in(pipe: P, dtype: torch.dtype) -> P:
    """Decode images in `dtype` from now on, in place; the token map stays as it is."""
    for part in (pipe.vae.post_quant_conv, pipe.vae.decoder):
        if pipe.device.type == "cpu":
            part.to(dtype).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    pipe.vae.post_quant_conv.register_forward_pre_hook(_return_free_memory)
    for module in pipe.vae.decoder.modules():
        if isinstance(module, Upsample):
            module.register_forward_pre_hook(_return_free_memory)
    return pipe


def _return_free_memory(*_: object) -> None:
    """Return what sampling or the last level freed, before allocating maps four times as large."""
    return_free_memory()
