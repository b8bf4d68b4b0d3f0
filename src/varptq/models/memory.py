"""How many images of one batch fit into the memory that is free: for the message when they did not.

The need of an image is an estimate from above, within a factor of two of what is measured. Nothing
is limited here; a batch that is too large is found out by trying.
"""

from __future__ import annotations

import re
import resource
import traceback
from pathlib import Path

import torch

from varptq.errors import OutOfMemoryError
from varptq.models.pipeline import Pipeline
from varptq.models.seams import Mix
from varptq.models.transformer import float_layout

# Copies of a tensor that are alive together: of the logits in the filters, of a layer's widest
# activations, of attention's scores.
LOGITS, ACTIVATIONS, SCORES = 4, 8, 2
# What is left to fragments, threads and other programs.
USABLE = 0.7


def image_bytes(pipe: Pipeline, cfg: float) -> int:
    """Of one image in a batch of `generate`: the cache of keys and values with the last scale, or
    the decoder, whichever is more."""
    var, scales, size = pipe.var, pipe.scales, pipe.dtype.itemsize
    rows, last = 2 if cfg > 0 else 1, scales.lengths[-1]
    mixes = sum(isinstance(module, Mix) for module in float_layout(var).modules())
    cache = mixes * 2 * scales.num_tokens * var.width * size
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
    pipe: Pipeline, count: int, cfg: float, error: BaseException
) -> OutOfMemoryError:
    """What to raise after `error`, which a batch of `count` images met: it says how many fit."""
    # The failed call's tensors live in its frames.
    traceback.clear_frames(error.__traceback__)
    free, need = free_bytes(pipe.device), image_bytes(pipe, cfg)
    fits = count // 2 if free is None else min(int(USABLE * free / need), count // 2)
    reason = f"memory: a batch of {count} images does not fit"
    if fits < 1:
        return OutOfMemoryError(
            f"{reason}, an image takes about {need / 1e6:.0f} MB; free some memory or choose a "
            "smaller model"
        )
    return OutOfMemoryError(f"{reason}, about {fits} do; lower batch_size (--batch-size) to {fits}")
