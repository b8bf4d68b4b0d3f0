"""ctypes binding of attention on codes, the sampler and the token map (src/attention.h).

    out = attend(scheme, qkv, cache, spans, query_bias_C=, value_bias_C=, query_factor_H=,
                 theta=None, key_mean_Hc=None)     append keys and values, answer the queries
    ids, filtered = sample(logits, guidance=None, top_k=, top_p=, temperature=1.0,
                           uniform_BlV=None, filtered=False)
    f_hat = add_phi(f_hat, h, weight, bias)        f_hat + (h + conv3x3(h)) / 2

Results do not depend on batch size, batch split, thread count or instruction set. All want the core
to be loaded (`varptq.native.binding.core`) and float32 CPU tensors, and make contiguous what is
not. Threads are torch's. What a scheme may hold is for the runtime to check, with `lacks`.

Shapes: B rows, L tokens, l tokens of a call, H heads, c head width, C = H c, V codebook, P side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from varptq.errors import NonFiniteError
from varptq.native.binding import core, reason
from varptq.native.pointers import dense, pointer
from varptq.native.structs_attention import AttentionArgs, PhiArgs, SampleArgs, TraceArgs

OK, NON_FINITE = 0, 1
MAX_HEAD_WIDTH = 128
MAX_STORED = 127
NO_THETA = -1.0
_POLICIES = {"token": 0, "segment": 1}


def _library() -> ctypes.CDLL:
    library = core()
    assert library is not None, reason()
    library.vq_attention_cache_bytes.argtypes = [ctypes.c_int64] * 3
    library.vq_attention_cache_bytes.restype = ctypes.c_int64
    return library


@dataclass(frozen=True)
class AttentionScheme:
    """What one attention layer computes: sizes, bits and policy.

    ends: number of tokens after each scale; the last is the capacity of a cache. l2_norm: q and k
    become unit vectors before their factors. Ranges contain zero, probabilities are uniform.
    max_order: finest order of shift-and-sum, which counts in calls with theta only.
    """

    heads: int
    head_width: int
    ends: tuple[int, ...]
    policy: Literal["token", "segment"]
    query_bits: int
    key_bits: int
    value_bits: int
    probability_bits: int
    l2_norm: bool
    max_order: int = 3

    @property
    def capacity(self) -> int:
        """L, the tokens a cache has room for."""
        return self.ends[-1]

    def lacks(self, theta: float | None = None) -> str | None:
        """None where the core executes this scheme, else what it lacks, for an error message."""
        if self.head_width > MAX_HEAD_WIDTH:
            return f"head width {self.head_width}, at most {MAX_HEAD_WIDTH}"
        largest = (2**self.value_bits - 1) * 2**self.max_order
        if theta is not None and largest > MAX_STORED:
            return (
                f"shift-and-sum of order {self.max_order} with {self.value_bits}-bit values: "
                f"integers up to {largest}, at most {MAX_STORED}"
            )
        return None


def _cache_bytes(scheme: AttentionScheme) -> int:
    """Bytes of the cache of one head."""
    size: int = _library().vq_attention_cache_bytes(
        scheme.head_width, scheme.capacity, len(scheme.ends)
    )
    assert size > 0, scheme.lacks()
    return size


class AttentionCache:
    """Codes of the keys and values of one layer: `data` uint8 (B, H, bytes), `length` tokens."""

    def __init__(self, scheme: AttentionScheme, rows: int) -> None:
        size = _cache_bytes(scheme)
        self.data = torch.empty((rows, scheme.heads, size), dtype=torch.uint8, device="cpu")
        self.length = 0


class AttentionTrace(NamedTuple):
    """What a call computed on the way, for tests; axis L counts the tokens of the cache.

    Codes query (B, H, l, c), key (B, H, L, c) uint8, value (B, H, L, c) int32 (with theta: 2^m
    (code - zero point)); scores (B, H, l, L) float32; probability codes (B, H, l, L) uint8; orders
    (spans, B, H, L) int32; row_scale (B, H, l), the factor of a row's integer sums.
    """

    query_codes: Tensor
    query_scale: Tensor
    query_zero: Tensor
    key_codes: Tensor
    key_scale: Tensor
    key_zero: Tensor
    value_codes: Tensor
    value_scale: Tensor
    value_zero: Tensor
    scores: Tensor
    probability_codes: Tensor
    orders: Tensor
    row_scale: Tensor


def new_trace(scheme: AttentionScheme, rows: int, tokens: int, spans: int) -> AttentionTrace:
    """Zeros to be filled by a call with `tokens` new tokens."""
    heads, width, capacity = scheme.heads, scheme.head_width, scheme.capacity

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros((rows, heads, *shape), dtype=dtype, device="cpu")

    return AttentionTrace(
        *(zeros(tokens, width, dtype=torch.uint8), zeros(tokens)),
        *(zeros(tokens, dtype=torch.int32), zeros(capacity, width, dtype=torch.uint8)),
        *(zeros(capacity), zeros(capacity, dtype=torch.int32)),
        *(zeros(capacity, width, dtype=torch.int32), zeros(capacity)),
        *(zeros(capacity, dtype=torch.int32), zeros(tokens, capacity)),
        zeros(tokens, capacity, dtype=torch.uint8),
        torch.zeros((spans, rows, heads, capacity), dtype=torch.int32, device="cpu"),
        zeros(tokens),
    )


def attend(
    scheme: AttentionScheme,
    qkv_BlT: Tensor,
    cache: AttentionCache,
    spans: Sequence[tuple[slice, tuple[int, ...]]],
    *,
    query_bias_C: Tensor,
    value_bias_C: Tensor,
    query_factor_H: Tensor,
    theta: float | None = None,
    key_mean_Hc: Tensor | None = None,
    trace: AttentionTrace | None = None,
    layer: str = "",
) -> Tensor:
    """One attention layer, from mat_qkv's output to proj's input: float32 (B, l, C).

    qkv_BlT (B, l, 3C) without biases; `cache` gains l tokens. spans: `Span`s of
    models/seams.py, that is (queries as a slice of the l tokens, where the scales that they see
    end in the cache).
    query_factor_H: the temperature exp(min(scale_mul, log 100)) with l2_norm, 0.25 / sqrt(c)
    without. key_mean_Hc is subtracted from keys before their codes. Under policy "segment" the
    tokens must be whole scales. Raises `NonFiniteError` naming `layer` where qkv holds NaN or
    infinity; the cache is then as it was.
    """
    rows, tokens = qkv_BlT.shape[:2]
    heads, width = scheme.heads, scheme.head_width
    qkv = dense(qkv_BlT, f"qkv of layer {layer}", rows, tokens, 3 * heads * width)
    query_bias = dense(query_bias_C, "query bias", heads * width)
    value_bias = dense(value_bias_C, "value bias", heads * width)
    factor = dense(query_factor_H, "query factor", heads)
    mean = None if key_mean_Hc is None else dense(key_mean_Hc, "key mean", heads, width)
    ends = torch.tensor(scheme.ends, dtype=torch.int64, device="cpu")
    bounds = [(s[0].start, s[0].stop, s[1][-1]) for s in spans]
    cuts = torch.tensor(bounds, dtype=torch.int64, device="cpu")
    out = torch.empty((rows, tokens, heads * width), dtype=torch.float32, device="cpu")
    a = AttentionArgs(batch=rows, heads=heads, width=width, tokens=tokens, start=cache.length)
    a.capacity, a.ends, a.segments = scheme.capacity, ends.data_ptr(), len(scheme.ends)
    a.spans, a.num_spans, a.policy = cuts.data_ptr(), len(spans), _POLICIES[scheme.policy]
    a.query_bits, a.key_bits = scheme.query_bits, scheme.key_bits
    a.value_bits, a.probability_bits = scheme.value_bits, scheme.probability_bits
    a.l2_norm, a.max_order = scheme.l2_norm, scheme.max_order
    a.theta = NO_THETA if theta is None else theta
    a.qkv, a.query_bias, a.value_bias = qkv.data_ptr(), query_bias.data_ptr(), value_bias.data_ptr()
    a.query_factor, a.key_mean = factor.data_ptr(), None if mean is None else mean.data_ptr()
    size = _cache_bytes(scheme)
    a.cache = pointer(cache.data, "attention cache", torch.uint8, rows, heads, size)
    a.out = out.data_ptr()
    if trace is not None:
        a.trace = ctypes.pointer(
            TraceArgs(*(pointer(t, "trace", t.dtype, *t.shape) for t in trace))
        )
    a.threads = torch.get_num_threads()
    code = _library().vq_attention(ctypes.byref(a))
    if code == NON_FINITE:
        raise NonFiniteError(
            f"layer {layer}: queries, keys or values hold NaN or infinity, expected finite numbers"
        )
    assert code == OK, f"vq_attention: {code}"
    cache.length += tokens
    return out


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
    code = _library().vq_sample(ctypes.byref(a))
    if code == NON_FINITE:
        raise NonFiniteError(
            f"logits of batch row {int(bad_row) // length}: NaN or infinity, "
            "expected finite numbers; check the weights, the quantization ranges and cfg"
        )
    assert code == OK, f"vq_sample: {code}"
    return Sampled(ids, kept)


def add_phi(f_hat_BCPP: Tensor, h_BCPP: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """f_hat + 0.5 h + 0.5 conv3x3(h), (B, C, P, P), as `Phi` of models/pyramid.py adds it.

    weight (C, C, 3, 3), bias (C,). One accumulator per output, input channels and then kernel rows
    and columns ascending.
    """
    batch, channels, side = f_hat_BCPP.shape[:3]
    shape = (batch, channels, side, side)
    f_hat, h = dense(f_hat_BCPP, "f_hat", *shape), dense(h_BCPP, "token map", *shape)
    weight = dense(weight, "phi weight", channels, channels, 3, 3)
    bias = dense(bias, "phi bias", channels)
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    a = PhiArgs(batch=batch, channels=channels, side=side, h=h.data_ptr(), out=out.data_ptr())
    a.weight, a.bias, a.f_hat = weight.data_ptr(), bias.data_ptr(), f_hat.data_ptr()
    a.threads = torch.get_num_threads()
    code = _library().vq_phi(ctypes.byref(a))
    assert code == OK, f"vq_phi: {code}"
    return out
