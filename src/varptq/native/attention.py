"""Attention on codes on the native core (src/attention/).

    out = attend(scheme, qkv, cache, spans, query_bias_C=, value_bias_C=, query_factor_H=,
                 theta=None)     append keys and values, answer the queries

Results do not depend on batch size, batch split, threads (torch's) or instruction set. Operands are
float32 CPU tensors, made contiguous where they are not. What a scheme may hold is for the runtime
to check (varptq.runtime.limits).

Shapes: B rows, L tokens, l tokens of a call, H heads, c head width, C = H c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from varptq.errors import NonFiniteError
from varptq.native.binding import call, library
from varptq.native.pointers import dense, pointer

NO_THETA = -1.0
_POLICIES = {"token": 0, "segment": 1}


class TraceArgs(ctypes.Structure):
    """vq_attention_trace of src/attention/attention.h, field by field in the same order."""

    _fields_ = (
        ("query_codes", c_void_p),
        ("query_scale", c_void_p),
        ("query_zero", c_void_p),
        ("key_codes", c_void_p),
        ("key_scale", c_void_p),
        ("key_zero", c_void_p),
        ("value_codes", c_void_p),
        ("value_scale", c_void_p),
        ("value_zero", c_void_p),
        ("scores", c_void_p),
        ("probability_codes", c_void_p),
        ("orders", c_void_p),
        ("row_scale", c_void_p),
    )


class AttentionArgs(ctypes.Structure):
    """vq_attention_args of src/attention/attention.h, field by field in the same order."""

    _fields_ = (
        ("batch", c_int64),
        ("heads", c_int64),
        ("width", c_int64),
        ("tokens", c_int64),
        ("start", c_int64),
        ("capacity", c_int64),
        ("ends", c_void_p),
        ("segments", c_int64),
        ("spans", c_void_p),
        ("num_spans", c_int64),
        ("policy", c_int32),
        ("query_bits", c_int32),
        ("key_bits", c_int32),
        ("value_bits", c_int32),
        ("probability_bits", c_int32),
        ("l2_norm", c_int32),
        ("max_order", c_int32),
        ("theta", c_float),
        ("qkv", c_void_p),
        ("query_bias", c_void_p),
        ("value_bias", c_void_p),
        ("query_factor", c_void_p),
        ("cache", c_void_p),
        ("out", c_void_p),
        ("trace", ctypes.POINTER(TraceArgs)),
        ("threads", c_int32),
    )


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


def _cache_bytes(scheme: AttentionScheme) -> int:
    """Bytes of the cache of one head."""
    size: int = library().vq_attention_cache_bytes(
        scheme.head_width, scheme.capacity, len(scheme.ends)
    )
    assert size > 0, scheme
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
    trace: AttentionTrace | None = None,
    layer: str = "",
) -> Tensor:
    """One attention layer, from mat_qkv's output to proj's input: float32 (B, l, C).

    qkv_BlT (B, l, 3C) without biases; `cache` gains l tokens. spans: `Span`s of
    models/seams.py, that is (queries as a slice of the l tokens, where the scales that they see
    end in the cache).
    query_factor_H: the temperature exp(min(scale_mul, log 100)) with l2_norm, 0.25 / sqrt(c)
    without. Under policy "segment" the tokens must be whole scales. Raises `NonFiniteError` naming
    `layer` where qkv holds NaN or infinity; the cache is then as it was.
    """
    rows, tokens = qkv_BlT.shape[:2]
    heads, width = scheme.heads, scheme.head_width
    qkv = dense(qkv_BlT, f"qkv of layer {layer}", rows, tokens, 3 * heads * width)
    query_bias = dense(query_bias_C, "query bias", heads * width)
    value_bias = dense(value_bias_C, "value bias", heads * width)
    factor = dense(query_factor_H, "query factor", heads)
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
    a.query_factor = factor.data_ptr()
    size = _cache_bytes(scheme)
    a.cache = pointer(cache.data, "attention cache", torch.uint8, rows, heads, size)
    a.out = out.data_ptr()
    if trace is not None:
        a.trace = ctypes.pointer(
            TraceArgs(*(pointer(t, "trace", t.dtype, *t.shape) for t in trace))
        )
    a.threads = torch.get_num_threads()
    if not call("vq_attention", a):
        raise NonFiniteError(
            f"layer {layer}: queries, keys or values hold NaN or infinity, expected finite numbers"
        )
    cache.length += tokens
    return out
