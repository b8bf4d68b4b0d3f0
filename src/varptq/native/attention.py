"""Attention on codes on the native core (src/attention/).

    out = attend(scheme, qkv, cache, spans, query_bias_C=, value_bias_C=, query_factor_H=,
                 tables=None, theta=None)            append keys and values, answer the queries
    enter(scheme, kv, cache, value_bias_C=)    append keys and values alone, those of a text
    out = answer(scheme, q, cache, spans, query_factor_H=, theta=None)     and ask them

Results do not depend on batch size, batch split, threads (torch's) or instruction set. Operands are
float32 CPU tensors, made contiguous where they are not. The runtime checks what a scheme may hold
(varptq.runtime.limits).

Shapes: B rows, L tokens, l tokens of a call, T tokens of a text, H heads, c head width, C = H c.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from varptq.errors import NonFiniteError
from varptq.native.binding import call, library
from varptq.native.pointers import dense, pointer
from varptq.native.quantize import Codebook, CodebookArgs

NO_THETA = -1.0
FLOAT_BYTES = 4
# Codes of up to so many bits take half a byte each.
PACKED_BITS = 4
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
        ("queries", c_int64),
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
        ("packed_keys", c_int32),
        ("packed_values", c_int32),
        ("query_book", CodebookArgs),
        ("key_book", CodebookArgs),
        ("value_book", CodebookArgs),
        ("l2_norm", c_int32),
        ("max_order", c_int32),
        ("theta", c_float),
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("query_stride", c_int64),
        ("key_stride", c_int64),
        ("query_bias", c_void_p),
        ("value_bias", c_void_p),
        ("query_factor", c_void_p),
        ("cosine", c_void_p),
        ("sine", c_void_p),
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
    max_order: finest order of shift-and-sum, which counts in calls with theta only. query_book and
    the others: codes are entries of a codebook, with zero points 128; values then have policy
    "token" and order 0. shift_sum: whether calls give a theta; without it a cache keeps values of
    up to 4 bits in halves of bytes, as it keeps keys.
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
    query_book: Codebook | None = None
    key_book: Codebook | None = None
    value_book: Codebook | None = None
    shift_sum: bool = True

    @property
    def packed_keys(self) -> bool:
        """Whether a cache has two keys' codes in a byte."""
        return self.key_bits <= PACKED_BITS and self.head_width % 4 == 0 and self.head_width > 4

    @property
    def packed_values(self) -> bool:
        return self.value_bits <= PACKED_BITS and not self.shift_sum

    @property
    def capacity(self) -> int:
        """L, the tokens a cache has room for."""
        return self.ends[-1]


def _cache_bytes(scheme: AttentionScheme) -> int:
    """Bytes of the cache of one head."""
    size: int = library().vq_attention_cache_bytes(
        *(scheme.head_width, scheme.capacity, len(scheme.ends)),
        *(scheme.packed_keys, scheme.packed_values),
    )
    assert size > 0, scheme
    return size


class AttentionCache:
    """Codes of the keys and values of one layer: `data` uint8 (B, H, bytes), `length` tokens."""

    def __init__(self, scheme: AttentionScheme, rows: int) -> None:
        size = _cache_bytes(scheme)
        self.data = torch.empty((rows, scheme.heads, size), dtype=torch.uint8, device="cpu")
        self.length = 0

    def first_rows(self, rows: int) -> AttentionCache:
        """The same for the first `rows` rows, which it shares."""
        shared = copy.copy(self)
        shared.data = self.data[:rows]
        return shared


class AttentionTrace(NamedTuple):
    """Intermediate results of a call, for tests; axis L counts the tokens of the cache.

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


class _Call:
    """One call of the core: what all three functions tell it. It keeps what it points to alive."""

    def __init__(
        self,
        scheme: AttentionScheme,
        cache: AttentionCache,
        rows: int,
        theta: float | None,
        trace: AttentionTrace | None,
    ) -> None:
        self.scheme, self.cache, self.alive = scheme, cache, [cache.data]
        a = AttentionArgs(batch=rows, heads=scheme.heads, width=scheme.head_width)
        ends = self._kept(torch.tensor(scheme.ends, dtype=torch.int64, device="cpu"))
        a.start, a.capacity, a.segments = cache.length, scheme.capacity, len(scheme.ends)
        a.ends, a.policy = ends.data_ptr(), _POLICIES[scheme.policy]
        a.query_bits, a.key_bits = scheme.query_bits, scheme.key_bits
        a.value_bits, a.probability_bits = scheme.value_bits, scheme.probability_bits
        for name in ("query_book", "key_book", "value_book"):
            book: Codebook | None = getattr(scheme, name)
            if book is not None:
                setattr(a, name, book.arguments())
        assert theta is None or scheme.shift_sum, scheme
        a.packed_keys, a.packed_values = scheme.packed_keys, scheme.packed_values
        a.l2_norm, a.max_order = scheme.l2_norm, scheme.max_order
        a.theta = NO_THETA if theta is None else theta
        size = _cache_bytes(scheme)
        a.cache = pointer(cache.data, "attention cache", torch.uint8, rows, scheme.heads, size)
        if trace is not None:
            a.trace = ctypes.pointer(
                TraceArgs(*(pointer(t, "trace", t.dtype, *t.shape) for t in trace))
            )
        a.threads = torch.get_num_threads()
        self.arguments = a

    @property
    def channels(self) -> int:
        """C."""
        return self.scheme.heads * self.scheme.head_width

    def dense(self, x: Tensor, what: str, *shape: int) -> int:
        """The address of x as float32 of this shape."""
        return self._kept(dense(x, what, *shape)).data_ptr()

    def queries(self, spans: Sequence[tuple[Any, ...]], count: int, factor_H: Tensor) -> Tensor:
        """What is asked, besides the queries themselves; returns where the answers go."""
        a = self.arguments
        bounds = [(s[0].start, s[0].stop, s[1][-1]) for s in spans]
        cuts = self._kept(torch.tensor(bounds, dtype=torch.int64, device="cpu"))
        a.queries, a.spans, a.num_spans = count, cuts.data_ptr(), len(spans)
        a.query_factor = self.dense(factor_H, "query factor", self.scheme.heads)
        out = torch.empty((a.batch, count, self.channels), dtype=torch.float32, device="cpu")
        a.out = out.data_ptr()
        return out

    def run(self, layer: str) -> None:
        if not call("vq_attention", self.arguments):
            raise NonFiniteError(
                f"layer {layer}: queries, keys or values hold NaN or infinity, expected finite "
                "numbers"
            )
        self.cache.length += self.arguments.tokens

    def _kept(self, t: Tensor) -> Tensor:
        self.alive.append(t)
        return t


def attend(
    scheme: AttentionScheme,
    qkv_BlD: Tensor,
    cache: AttentionCache,
    spans: Sequence[tuple[Any, ...]],
    *,
    query_bias_C: Tensor,
    value_bias_C: Tensor,
    query_factor_H: Tensor,
    tables: tuple[Tensor, Tensor] | None = None,
    theta: float | None = None,
    trace: AttentionTrace | None = None,
    layer: str = "",
) -> Tensor:
    """One attention layer, from mat_qkv's output to proj's input: float32 (B, l, C).

    qkv_BlD (B, l, 3C) without biases; `cache` gains l tokens. spans: `Span`s of
    models/seams.py, that is (queries as a slice of the l tokens, where the scales that they see
    end in the cache).
    query_factor_H: the temperature exp(min(scale_mul, log 100)) with l2_norm, 0.25 / sqrt(c)
    without. tables: cosines and sines (L', c / 2) float32 of all tokens that the cache has room for
    or more, by which q and k are turned last. Under policy "segment" the tokens must be whole
    scales. Raises `NonFiniteError` naming `layer` where qkv holds NaN or infinity; the cache is
    then as it was.
    """
    rows, tokens = qkv_BlD.shape[:2]
    one = _Call(scheme, cache, rows, theta, trace)
    a, channels = one.arguments, one.channels
    out = one.queries(spans, tokens, query_factor_H)
    a.tokens, a.query_stride, a.key_stride = tokens, 3 * channels, 3 * channels
    a.query = one.dense(qkv_BlD, f"qkv of layer {layer}", rows, tokens, 3 * channels)
    a.key, a.value = a.query + channels * FLOAT_BYTES, a.query + 2 * channels * FLOAT_BYTES
    a.query_bias = one.dense(query_bias_C, "query bias", channels)
    a.value_bias = one.dense(value_bias_C, "value bias", channels)
    if tables is not None:
        room = scheme.capacity
        cosine, sine = (t[:room] for t in tables)
        a.cosine = one.dense(cosine, "rotary cosines", room, scheme.head_width // 2)
        a.sine = one.dense(sine, "rotary sines", room, scheme.head_width // 2)
    one.run(layer)
    return out


def enter(
    scheme: AttentionScheme,
    kv_BTD: Tensor,
    cache: AttentionCache,
    *,
    value_bias_C: Tensor,
    theta: float | None = None,
    trace: AttentionTrace | None = None,
    layer: str = "",
) -> None:
    """Keys and values kv_BTD (B, T, 2C), without bias, into `cache`, which gains T tokens that
    nobody asks yet. Raises as `attend`."""
    rows, tokens = kv_BTD.shape[:2]
    one = _Call(scheme, cache, rows, theta, trace)
    a, channels = one.arguments, one.channels
    a.tokens, a.key_stride = tokens, 2 * channels
    a.key = one.dense(kv_BTD, f"keys and values of layer {layer}", rows, tokens, 2 * channels)
    a.value = a.key + channels * FLOAT_BYTES
    a.value_bias = one.dense(value_bias_C, "value bias", channels)
    one.run(layer)


def answer(
    scheme: AttentionScheme,
    q_BlC: Tensor,
    cache: AttentionCache,
    spans: Sequence[tuple[Any, ...]],
    *,
    query_factor_H: Tensor,
    theta: float | None = None,
    trace: AttentionTrace | None = None,
    layer: str = "",
) -> Tensor:
    """Queries q_BlC (B, l, C) over what has entered `cache`: float32 (B, l, C). spans: (queries as
    a slice of the l, number of keys last in a tuple). Raises as `attend`."""
    rows, count, _ = q_BlC.shape
    one = _Call(scheme, cache, rows, theta, trace)
    a, channels = one.arguments, one.channels
    out = one.queries(spans, count, query_factor_H)
    a.query_stride = channels
    a.query = one.dense(q_BlC, f"queries of layer {layer}", rows, count, channels)
    one.run(layer)
    return out
