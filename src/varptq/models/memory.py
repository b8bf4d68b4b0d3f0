"""Estimates how many images fit into memory, for the message after a batch did not.

The estimate for one image is an upper bound within a factor of two of what is measured. Nothing is
limited here: a batch is tried, and the estimate is made if it fails.
"""

from __future__ import annotations

import re
import resource
import traceback
from pathlib import Path

import torch

from varptq.errors import OutOfMemoryError
from varptq.models.blocks import Attention
from varptq.models.pipeline import Pipeline
from varptq.models.transformer import float_layout
from varptq.readable import megabytes

# Copies of a tensor that are alive together: of the logits in the filters, of a layer's widest
# activations, of attention's scores.
LOGITS, ACTIVATIONS, SCORES = 4, 8, 2
# What is left to fragments, threads and other programs.
USABLE = 0.7


def image_bytes(pipe: Pipeline, is_guided: bool) -> int:
    """Bytes that one image of a batch of `generate` needs: the cache of keys and values with the
    last scale, or the decoder, whichever is more."""
    var, scales, size = pipe.var, pipe.scales, pipe.dtype.itemsize
    rows, last = 2 if is_guided else 1, scales.lengths[-1]
    attentions = sum(isinstance(module, Attention) for module in float_layout(var).modules())
    cache = attentions * 2 * scales.num_tokens * var.width * size
    symbols = var.alphabet.draws * var.alphabet.size
    logits = LOGITS * last * symbols * torch.float32.itemsize
    activations = ACTIVATIONS * last * var.width * size
    scores = SCORES * var.num_heads * last * scales.num_tokens * size
    return max(rows * (cache + logits + activations + scores), pipe.vae.decoder_bytes())


def free_bytes(device: torch.device) -> int | None:
    """What this process may still take on `device`; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = _field(Path("/proc/meminfo"), "MemAvailable")
        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            free = min(free, soft - _field(Path("/proc/self/status"), "VmSize"))
    except (OSError, LookupError):
        return None
    return max(free, 0)


def _field(path: Path, name: str) -> int:
    """Bytes of a line "Name: 123 kB"."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    if found is None:
        raise LookupError(name)
    return int(found[1]) * 1024


def batch_too_large(
    pipe: Pipeline, count: int, is_guided: bool, error: BaseException
) -> OutOfMemoryError:
    """The error to raise after a batch of `count` images failed with `error`: it says how many
    fit."""
    # The failed call's tensors live in its frames.
    traceback.clear_frames(error.__traceback__)
    free, need = free_bytes(pipe.device), image_bytes(pipe, is_guided)
    fits = count // 2 if free is None else min(int(USABLE * free / need), count // 2)
    reason = f"memory: a batch of {count} images does not fit"
    if fits < 1:
        return OutOfMemoryError(
            f"{reason}, an image takes about {megabytes(need)}; free some memory or choose a "
            "smaller model"
        )
    return OutOfMemoryError(f"{reason}, about {fits} do; lower batch_size (--batch-size) to {fits}")
