"""The image decoder in bfloat16 and channels last: half the bytes, and faster where the CPU has
bfloat16 products. What it costs in image quality is in docs/benchmarks.md; ids are not touched.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from varptq.models.pipeline import Pipeline

P = TypeVar("P", bound=Pipeline)


def decode_in(pipe: P, dtype: torch.dtype) -> P:
    """Decode images in `dtype` from now on, in place; the token map stays as it is."""
    if dtype != torch.float32:
        for part in (pipe.vae.post_quant_conv, pipe.vae.decoder):
            part.to(dtype).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return pipe
