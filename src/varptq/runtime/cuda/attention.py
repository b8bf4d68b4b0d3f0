"""Triton: attention on codes, from q, k, v of new tokens to the mixed values.

    append   bias, normalisation, codes of q, k, v; k and v enter the cache as int8 and never change
    stats    row maximum m and Z = sum exp(score - m) of the float softmax
    mass     attention that each key gets, averaged over the queries: the orders of shift-and-sum
    mix      probability codes rint(p rel / sp), times integer values, exact in int32

The definition is `QuantScores` and `QuantMix` (quant/attention.py) for policies "token" and
"segment" with uniform probabilities. 8-bit codes are stored less 128, entries of a codebook as they
are, with zero point 0. Values wait in the cache at
the finest order: a key of order n is read with a rounding shift (quant/shift_sum.fixed_codes).
Shapes: B rows, H heads, L cached tokens, l new ones, c head width; pairs (row, head) are programs.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from varptq.runtime.cuda.codebook import on_codebook
from varptq.runtime.cuda.quantize import ROUNDER, SCALE_FLOOR, step_of

NORM_FLOOR = tl.constexpr(1e-12)
SHIFT = tl.constexpr(128)


@triton.jit
def _rint(x):
    return (x + ROUNDER) - ROUNDER


@triton.jit
def _grid(x, TOP: tl.constexpr):
    """Scale and zero point of one token's channels; channels beyond the head are zeros."""
    high = tl.maximum(tl.max(x, axis=0), 0.0)
    low = tl.minimum(tl.min(x, axis=0), 0.0)
    scale = step_of(low, high, TOP)
    return scale, tl.minimum(tl.maximum(_rint(-tl.div_rn(low, scale)), 0.0), TOP)


@triton.jit
def _codes(x, scale, zero, TOP: tl.constexpr):
    return tl.minimum(tl.maximum(_rint(tl.div_rn(x, scale)) + zero, 0.0), TOP)


@triton.jit
def _coded(x, head, book_ptr, TOP: tl.constexpr, BOOK: tl.constexpr, WIDTH: tl.constexpr):
    """Codes of one token's channels, with their scale and zero point; on a codebook its entries."""
    if BOOK > 0:
        entries, scales = on_codebook(tl.reshape(x, (1, WIDTH)), head, book_ptr, BOOK, 1, WIDTH)
        codes, scale = tl.reshape(entries, (WIDTH,)), tl.sum(scales, axis=0)
        zero = tl.zeros_like(scale)
    else:
        scale, zero = _grid(x, TOP)
        codes = _codes(x, scale, zero, TOP)
    return codes, scale, zero


@triton.jit
def _store_codes(
    codes, scale, zero, token, channel, inside, codes_ptr, scale_ptr, zero_ptr, sum_ptr, head,
    OFFSET: tl.constexpr,
):  # fmt: skip
    stored = tl.where(inside, codes.to(tl.int32) - OFFSET, 0)
    tl.store(codes_ptr + token * head + channel, stored.to(tl.int8), mask=inside)
    tl.store(scale_ptr + token, scale)
    tl.store(zero_ptr + token, zero.to(tl.int32) - OFFSET)
    tl.store(sum_ptr + token, tl.sum(stored, axis=0))


@triton.jit
def append(
    qkv_ptr, q_bias_ptr, v_bias_ptr, factor_ptr, q_book_ptr, k_book_ptr, v_book_ptr,
    q_ptr, qs_ptr, qz_ptr, qsum_ptr, k_ptr, ks_ptr, kz_ptr, ksum_ptr, v_ptr, vs_ptr, vd_ptr,
    new, heads, head, capacity, start,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, Q_TOP: tl.constexpr, K_TOP: tl.constexpr,
    V_TOP: tl.constexpr, V_OFFSET: tl.constexpr, V_COPIES: tl.constexpr, SEGMENT: tl.constexpr,
    Q_BOOK: tl.constexpr, K_BOOK: tl.constexpr, V_BOOK: tl.constexpr,
):  # fmt: skip
    """One program per new token and head. With SEGMENT values are left to `append_segment`."""
    row, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, i = row // new, row % new
    channel = tl.arange(0, WIDTH)
    inside = channel < head
    base = qkv_ptr + row * 3 * heads * head + h * head + channel
    bias = h * head + channel
    width = heads * head
    q = tl.load(base, mask=inside, other=0.0) + tl.load(q_bias_ptr + bias, mask=inside, other=0.0)
    k = tl.load(base + width, mask=inside, other=0.0)
    if UNIT:
        q_norm = tl.maximum(tl.sqrt(tl.sum(q * q, axis=0)), NORM_FLOOR)
        k_norm = tl.maximum(tl.sqrt(tl.sum(k * k, axis=0)), NORM_FLOOR)
        q = tl.div_rn(q, q_norm)
        k = tl.div_rn(k, k_norm)
    q = q * tl.load(factor_ptr + h)
    codes, scale, zero = _coded(q, head, q_book_ptr, Q_TOP, Q_BOOK, WIDTH)
    _store_codes(codes, scale, zero, (image * heads + h) * new + i, channel, inside,
                 q_ptr, qs_ptr, qz_ptr, qsum_ptr, head, 128 if Q_TOP == 255 else 0)  # fmt: skip
    token = (image * heads + h) * capacity + start + i
    codes, scale, zero = _coded(k, head, k_book_ptr, K_TOP, K_BOOK, WIDTH)
    _store_codes(codes, scale, zero, token, channel, inside,
                 k_ptr, ks_ptr, kz_ptr, ksum_ptr, head, 128 if K_TOP == 255 else 0)  # fmt: skip
    if not SEGMENT:
        v = tl.load(base + 2 * width, mask=inside, other=0.0)
        v += tl.load(v_bias_ptr + bias, mask=inside, other=0.0)
        if V_BOOK > 0:
            u, scale, zero = _coded(v, head, v_book_ptr, V_TOP, V_BOOK, WIDTH)
        else:
            scale, zero = _grid(v, V_TOP)
            u = _value_steps(v, scale, zero, V_TOP, V_OFFSET, V_COPIES)
        tl.store(v_ptr + token * head + channel, u.to(tl.int8), mask=inside)
        tl.store(vs_ptr + token, scale)
        tl.store(vd_ptr + token, tl.where(V_OFFSET > 0, V_OFFSET - zero, 0.0).to(tl.int32))


@triton.jit
def _value_steps(
    v, scale, zero, TOP: tl.constexpr, OFFSET: tl.constexpr, COPIES: tl.constexpr
):  # fmt: skip
    """What the cache stores of a value: code - z at the finest order, or code - 128 at 8 bits."""
    if OFFSET > 0:
        return _codes(v, scale, zero, TOP) - OFFSET
    fine = _rint(tl.div_rn(v, tl.div_rn(scale, COPIES)))
    return tl.minimum(tl.maximum(fine, -zero * COPIES), (TOP - zero) * COPIES)


@triton.jit
def append_segment(
    qkv_ptr, v_bias_ptr, v_ptr, vs_ptr, vd_ptr, new, heads, head, capacity, start, first, count,
    WIDTH: tl.constexpr, V_TOP: tl.constexpr, V_OFFSET: tl.constexpr, V_COPIES: tl.constexpr,
):  # fmt: skip
    """Values of one scale segment, one range per row and head: `count` tokens from `first` on."""
    image, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    inside = channel < head
    width = heads * head
    bias = tl.load(v_bias_ptr + h * head + channel, mask=inside, other=0.0)
    base = qkv_ptr + (image * new + first) * 3 * width + 2 * width + h * head + channel
    high = tl.zeros((WIDTH,), dtype=tl.float32)
    low = tl.zeros((WIDTH,), dtype=tl.float32)
    for i in range(count):
        v = tl.load(base + i * 3 * width, mask=inside, other=0.0) + bias
        high = tl.maximum(high, v)
        low = tl.minimum(low, v)
    scale = step_of(tl.min(low, axis=0), tl.max(high, axis=0), V_TOP)
    zero = -tl.div_rn(tl.min(low, axis=0), scale)
    zero = tl.minimum(tl.maximum(_rint(zero), 0.0), V_TOP)
    token = (image * heads + h) * capacity + start + first
    for i in range(count):
        v = tl.load(base + i * 3 * width, mask=inside, other=0.0) + bias
        u = _value_steps(v, scale, zero, V_TOP, V_OFFSET, V_COPIES)
        tl.store(v_ptr + (token + i) * head + channel, u.to(tl.int8), mask=inside)
        tl.store(vs_ptr + token + i, scale)
        tl.store(vd_ptr + token + i, tl.where(V_OFFSET > 0, V_OFFSET - zero, 0.0).to(tl.int32))


@triton.jit
def _scores(
    q_ptr, qs_ptr, qz_ptr, qsum_ptr, k_ptr, ks_ptr, kz_ptr, ksum_ptr,
    query, in_q, key, in_k, channel, head,
):  # fmt: skip
    """(BQ, BK) float32 scores, -inf beyond the keys: exact integers times both scales."""
    in_c = channel < head
    q = tl.load(q_ptr + query[:, None] * head + channel[None, :],
                mask=in_q[:, None] & in_c[None, :], other=0)  # fmt: skip
    k = tl.load(k_ptr + key[None, :] * head + channel[:, None],
                mask=in_k[None, :] & in_c[:, None], other=0)  # fmt: skip
    product = tl.dot(q, k, out_dtype=tl.int32)
    qz = tl.load(qz_ptr + query, mask=in_q, other=0)
    qsum = tl.load(qsum_ptr + query, mask=in_q, other=0)
    kz = tl.load(kz_ptr + key, mask=in_k, other=0)
    ksum = tl.load(ksum_ptr + key, mask=in_k, other=0)
    product -= qz[:, None] * ksum[None, :] + kz[None, :] * (qsum - head * qz)[:, None]
    qs = tl.load(qs_ptr + query, mask=in_q, other=0.0)
    ks = tl.load(ks_ptr + key, mask=in_k, other=0.0)
    scores = product.to(tl.float32) * (qs[:, None] * ks[None, :])
    return tl.where(in_k[None, :], scores, float("-inf"))


@triton.jit
def stats(
    q_ptr, qs_ptr, qz_ptr, qsum_ptr, k_ptr, ks_ptr, kz_ptr, ksum_ptr, max_ptr, z_ptr,
    new, first, queries, keys, capacity, head,
    WIDTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """m and Z of each query of the span, in two sweeps over the keys."""
    pair = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BQ + tl.arange(0, BQ)
    in_q = i < queries
    query = pair * new + first + i
    channel = tl.arange(0, WIDTH)
    largest = tl.full((BQ,), float("-inf"), dtype=tl.float32)
    for block in range(0, keys, BK):
        j = block + tl.arange(0, BK)
        scores = _scores(q_ptr, qs_ptr, qz_ptr, qsum_ptr, k_ptr, ks_ptr, kz_ptr, ksum_ptr,
                         query, in_q, pair * capacity + j, j < keys, channel, head)  # fmt: skip
        largest = tl.maximum(largest, tl.max(scores, axis=1))
    total = tl.zeros((BQ,), dtype=tl.float32)
    for block in range(0, keys, BK):
        j = block + tl.arange(0, BK)
        scores = _scores(q_ptr, qs_ptr, qz_ptr, qsum_ptr, k_ptr, ks_ptr, kz_ptr, ksum_ptr,
                         query, in_q, pair * capacity + j, j < keys, channel, head)  # fmt: skip
        total += tl.sum(tl.exp(scores - largest[:, None]), axis=1)
    tl.store(max_ptr + query, largest, mask=in_q)
    tl.store(z_ptr + query, total, mask=in_q)


@triton.jit
def mass(
    q_ptr, qs_ptr, qz_ptr, qsum_ptr, k_ptr, ks_ptr, kz_ptr, ksum_ptr, max_ptr, z_ptr, abar_ptr,
    new, first, queries, keys, capacity, head,
    WIDTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Attention of each key averaged over the queries of the span, (B H, L) float32."""
    pair = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BK + tl.arange(0, BK)
    channel = tl.arange(0, WIDTH)
    total = tl.zeros((BK,), dtype=tl.float32)
    for block in range(0, queries, BQ):
        i = block + tl.arange(0, BQ)
        in_q = i < queries
        query = pair * new + first + i
        scores = _scores(q_ptr, qs_ptr, qz_ptr, qsum_ptr, k_ptr, ks_ptr, kz_ptr, ksum_ptr,
                         query, in_q, pair * capacity + j, j < keys, channel, head)  # fmt: skip
        largest = tl.load(max_ptr + query, mask=in_q, other=0.0)
        z = tl.load(z_ptr + query, mask=in_q, other=1.0)
        p = tl.exp(scores - largest[:, None]) / z[:, None]
        total += tl.sum(tl.where(in_q[:, None], p, 0.0), axis=0)
    tl.store(abar_ptr + pair * capacity + j, total / queries, mask=j < keys)


@triton.jit
def mix(
    q_ptr, qs_ptr, qz_ptr, qsum_ptr, k_ptr, ks_ptr, kz_ptr, ksum_ptr, max_ptr, z_ptr,
    v_ptr, vd_ptr, shift_ptr, relative_ptr, segment_scale_ptr, ends_ptr, out_ptr,
    new, first, queries, keys, capacity, head, heads, segments, left,
    P_TOP: tl.constexpr, WIDTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (B, l, H c): probability codes times value codes, segment by segment.

    shift (B H, L) int32: how far a value is shifted down to its order; `left` says whether it is
    then shifted back up to one scale per segment. relative (B H, L): factor of p before coding.
    segment_scale (B H, segments) with the segments' ends.
    """
    pair = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BQ + tl.arange(0, BQ)
    in_q = i < queries
    query = pair * new + first + i
    channel = tl.arange(0, WIDTH)
    in_c = channel < head
    largest = tl.load(max_ptr + query, mask=in_q, other=0.0)
    z = tl.load(z_ptr + query, mask=in_q, other=1.0)
    top = tl.zeros((BQ,), dtype=tl.float32)
    for block in range(0, keys, BK):
        j = block + tl.arange(0, BK)
        scores = _scores(q_ptr, qs_ptr, qz_ptr, qsum_ptr, k_ptr, ks_ptr, kz_ptr, ksum_ptr,
                         query, in_q, pair * capacity + j, j < keys, channel, head)  # fmt: skip
        relative = tl.load(relative_ptr + pair * capacity + j, mask=j < keys, other=0.0)
        p = tl.div_rn(tl.exp(scores - largest[:, None]), z[:, None]) * relative[None, :]
        top = tl.maximum(top, tl.max(p, axis=1))
    step = tl.div_rn(tl.maximum(top, SCALE_FLOOR), P_TOP)
    out = tl.zeros((BQ, WIDTH), dtype=tl.float32)
    begin = 0
    for s in range(segments):
        end = tl.load(ends_ptr + s)
        acc = tl.zeros((BQ, WIDTH), dtype=tl.int32)
        for block in range(begin, end, BK):
            j = block + tl.arange(0, BK)
            in_k = j < end
            token = pair * capacity + j
            scores = _scores(q_ptr, qs_ptr, qz_ptr, qsum_ptr, k_ptr, ks_ptr, kz_ptr, ksum_ptr,
                             query, in_q, token, in_k, channel, head)  # fmt: skip
            relative = tl.load(relative_ptr + token, mask=in_k, other=0.0)
            p = tl.div_rn(tl.exp(scores - largest[:, None]), z[:, None]) * relative[None, :]
            codes = tl.minimum(_rint(tl.div_rn(p, step[:, None])), P_TOP).to(tl.int32)
            shift = tl.load(shift_ptr + token, mask=in_k, other=0)
            u = tl.load(v_ptr + token[:, None] * head + channel[None, :],
                        mask=in_k[:, None] & in_c[None, :], other=0).to(tl.int32)  # fmt: skip
            u = (u + ((1 << shift) >> 1)[:, None]) >> shift[:, None]
            u = u << (shift * left)[:, None]
            d = tl.load(vd_ptr + token, mask=in_k, other=0)
            # Codes go up to 255: less 128 they are int8, and 128 times the column sum comes back.
            acc += tl.dot((codes - SHIFT).to(tl.int8), u.to(tl.int8), out_dtype=tl.int32)
            acc += SHIFT * tl.sum(u, axis=0)[None, :] + tl.sum(codes * d[None, :], axis=1)[:, None]
        out += acc.to(tl.float32) * tl.load(segment_scale_ptr + pair * segments + s)
        begin = end
    out = out * step[:, None]
    row = (pair // heads) * new + first + i
    place = (row[:, None] * heads + pair % heads) * head + channel[None, :]
    tl.store(out_ptr + place, out, mask=in_q[:, None] & in_c[None, :])
