"""Guidance, filters and the draw of token ids on the native core (src/sampler/).

    ids, filtered = sample(logits, guidance=None, top_k=, top_p=, temperature=1.0,
                           uniform_BlV=None, filtered=False)

Results do not depend on batch size, batch split, threads (torch's) or instruction set. Shapes: B
images, l tokens of a scale, V codebook.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from varptq.errors import NonFiniteError
from varptq.native.binding import call
from varptq.native.pointers import dense


class SampleArgs(ctypes.Structure):
    """vq_sample_args of src/sampler/sampler.h, field by field in the same order."""

    _fields_ = (
        ("rows", c_int64),
        ("vocabulary", c_int64),
        ("logits", c_void_p),
        ("unconditional", c_void_p),
        ("guidance", c_float),
        ("guidance_plus_one", c_float),
        ("top_k", c_int64),
        ("top_p", c_double),
        ("temperature", c_float),
        ("uniform", c_void_p),
        ("ids", c_void_p),
        ("filtered", c_void_p),
        ("bad_row", c_void_p),
        ("threads", c_int32),
    )


class Sampled(NamedTuple):
    """ids (B, l) int64 and filtered float32 (B, l, V); None where not asked for."""

    ids: Tensor | None
    filtered: Tensor | None


def sample(
    logits_BlV: Tensor,
    *,
    guidance: float | None = None,
    top_k: int,
    top_p: float,
    temperature: float = 1.0,
    uniform_BlV: Tensor | None = None,
    filtered: bool = False,
) -> Sampled:
    """`guided`, `filter_logits` and `sample_ids` of models/sampling.py in one pass.

    guidance: strength t for (2B, l, V) logits of rows [cond; uncond], None for (B, l, V).
    uniform_BlV: (B, l, V), a stream's `ImageRandom.uniform(l, V)` per row; Gumbel noise is made of
    it where an entry is kept, equal to `ImageRandom.gumbel` to rounding. Without it no ids are
    drawn. `filtered` asks for the guided and filtered logits. Equal logits at the border of top-p
    stay from the lowest index on. Raises `NonFiniteError` as `sample_ids` does.
    """
    rows = logits_BlV.shape[0] // (1 if guidance is None else 2)
    length, vocabulary = logits_BlV.shape[1:]
    shape = (rows, length, vocabulary)
    halves = 1 if guidance is None else 2
    logits = dense(logits_BlV, "logits", halves * rows, length, vocabulary)
    uniform = None if uniform_BlV is None else dense(uniform_BlV, "noise", *shape)
    ids = None if uniform is None else torch.empty(shape[:2], dtype=torch.int64, device="cpu")
    kept = torch.empty(shape, dtype=torch.float32, device="cpu") if filtered else None
    bad_row = torch.zeros(1, dtype=torch.int64, device="cpu")
    a = SampleArgs(rows=rows * length, vocabulary=vocabulary, logits=logits.data_ptr())
    if guidance is not None:
        a.unconditional = logits[rows:].data_ptr()
        a.guidance, a.guidance_plus_one = guidance, 1 + guidance
    a.top_k, a.top_p, a.temperature = top_k, top_p, temperature
    a.uniform = None if uniform is None else uniform.data_ptr()
    a.ids = None if ids is None else ids.data_ptr()
    a.filtered = None if kept is None else kept.data_ptr()
    a.bad_row, a.threads = bad_row.data_ptr(), torch.get_num_threads()
    if not call("vq_sample", a):
        raise NonFiniteError(
            f"logits of batch row {int(bad_row) // length}: NaN or infinity, "
            "expected finite numbers; check the weights, the quantization ranges and cfg"
        )
    return Sampled(ids, kept)
