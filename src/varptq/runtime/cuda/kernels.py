"""`CudaKernels`: the operations of runtime/kernels.py on Triton's kernels, tensors on any device.

They run on a GPU. Under TRITON_INTERPRET=1 the same kernels run on the CPU, slowly; that is how
their logic is tested without a GPU. Results match the reference: equal codes, equal integers,
floats up to rounding.
"""

# Launches pass plain numbers for Triton's compile-time constants.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor, nn

from varptq.models import finite
from varptq.models.rotary import Rotary
from varptq.models.sampling import Sampler
from varptq.models.seams import LAYER_NORM_EPS, Span
from varptq.quant.affine import LEAST_SCALE
from varptq.quant.config import MAX_STORED, largest_stored
from varptq.quant.shift_sum import orders
from varptq.quant.transforms import signs
from varptq.runtime.cuda import attention, gemm
from varptq.runtime.cuda.codebook import book, positive_entries
from varptq.runtime.cuda.quantize import CodeRows, quantize
from varptq.runtime.kernels import AttentionRule, InputRule, Pending, Weight

BLOCK_Q, BLOCK_K = 32, 64


@dataclass
class Rows:
    """Codes of the rows of one input, and the shape they came in."""

    codes: CodeRows
    shape: tuple[int, ...]
    pairs: bool


@dataclass
class Cache:
    """Codes of the keys and values of one block: (B H, L, c) int8, and (B H, L) grids."""

    k: Tensor
    k_scale: Tensor
    k_zero: Tensor
    k_sum: Tensor
    v: Tensor
    v_scale: Tensor
    v_extra: Tensor
    heads: int
    length: int = 0

    def rewind(self, length: int) -> None:
        """Back to the first `length` tokens; the next ones are written behind them."""
        self.length = length

    def first_rows(self, rows: int) -> Cache:
        """The same for the first `rows` rows, which it shares."""
        kept = slice(0, rows * self.heads)
        keys = (self.k[kept], self.k_scale[kept], self.k_zero[kept], self.k_sum[kept])
        values = (self.v[kept], self.v_scale[kept], self.v_extra[kept])
        return Cache(*keys, *values, self.heads, self.length)


class CudaKernels:
    """Integer operations on Triton kernels."""

    name = "cuda"

    def refuse_linear(self, rule: InputRule) -> str | None:
        """What cannot be executed of this layer; None if all can."""
        if not rule.sign_split and rule.range_rule != "with_zero":
            return f"input range rule {rule.range_rule!r}"
        if not rule.weight_zero_is_code:
            return "weight zero points that are no codes"
        for group in (rule.group, rule.weight_group):
            # A tile of Triton has a power of two of channels; a whole row is filled up with zeros.
            if group and group != rule.inputs and group & (group - 1):
                return f"groups of {group} of {rule.inputs} inputs, no power of two"
        return None

    def refuse_attention(self, rule: AttentionRule) -> str | None:
        spec = rule.spec
        if spec.policy == "release":
            return "policy 'release', whose codes change when the cache grows"
        q, k, p, v = spec.query, spec.key, spec.probability, spec.value
        if q is None or k is None or p is None or v is None:
            return "an operand in float"
        if spec.renormalize:
            return "renormalized probabilities"
        if any(x.range_rule != "with_zero" for x in (q, k, v)):
            return "ranges without zero"
        if rule.theta is not None and largest_stored(v.num_bits, spec.max_order) > MAX_STORED:
            return f"shift-and-sum on {v.num_bits}-bit values, more than 8 bits hold"
        return None

    def pack(self, weight: Weight, rule: InputRule) -> gemm.CudaWeight:
        segment = min(
            rule.group or weight.codes.shape[1], rule.weight_group or weight.codes.shape[1]
        )
        return gemm.pack(weight, segment)

    def quantize(
        self, x: Tensor | Pending, rule: InputRule, means: Tensor | None, rows: Tensor | None
    ) -> Rows:
        """Codes of x (B, l, K) or (B, K). Raises `NonFiniteError` naming the layer."""
        gain = shift = None
        values = x.x_BLC if isinstance(x, Pending) else x
        if isinstance(x, Pending):
            gain, shift = x.scale_B1C.squeeze(1), x.shift_B1C.squeeze(1)
        width, tokens = values.shape[-1], values.shape[1] if values.dim() == 3 else 1
        group = rule.group or width
        codes = quantize(
            values.reshape(-1, width),
            num_bits=rule.num_bits,
            group=group,
            segment=min(group, rule.weight_group or width),
            gain=gain,
            shift=shift,
            gelu=rule.gelu,
            rows_per_image=tokens,
            eps=LAYER_NORM_EPS,
            means=means,
            mean_row=None if means is None else _per_token(rows, tokens, values.device),
            signs=signs(rule.block, values.device) if rule.block else None,
            sign_split=rule.sign_split,
            book=book(rule.type, rule.num_bits, values.device),
        )
        message = f"layer {rule.layer}: input holds NaN or infinity"
        finite.require(codes.scale.isfinite().all(), message)
        return Rows(codes, tuple(values.shape[:-1]), rule.sign_split)

    def linear(
        self, codes: Rows, packed: gemm.CudaWeight, bias: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        """float32 y (..., N)."""
        y = gemm.linear(
            codes.codes,
            packed,
            bias=bias,
            bias_row=None if rows is None else _on_device(rows, codes.codes.codes.device),
            rows_per_image=1 if rows is None else len(rows),
            pairs=codes.pairs,
        )
        return y.unflatten(0, codes.shape)

    def new_cache(self, rule: AttentionRule, rows: int, ends: tuple[int, ...]) -> Cache:
        device, num_tokens = rule.q_bias.device, ends[-1]
        pairs = rows * rule.num_heads

        def ints() -> Tensor:
            return torch.zeros(pairs, num_tokens, dtype=torch.int32, device=device)

        def codes() -> Tensor:
            shape = (pairs, num_tokens, rule.head_width)
            return torch.zeros(shape, dtype=torch.int8, device=device)

        def scales() -> Tensor:
            return torch.zeros(pairs, num_tokens, dtype=torch.float32, device=device)

        keys, values = (codes(), scales(), ints(), ints()), (codes(), scales(), ints())
        return Cache(*keys, *values, rule.num_heads)

    def attend(
        self,
        qkv_BlD: Tensor,
        rule: AttentionRule,
        cache: Cache,
        spans: Sequence[Span],
        tables: Rotary | None = None,
    ) -> Tensor:
        """Add the tokens of qkv (B, l, 3 C) to the cache, then float32 (B, l, C) by span. Raises
        `NonFiniteError` naming the layer, and the cache is as before."""
        assert tables is None, "refused before"
        rule.check_finite(qkv_BlD)
        call = _Call(qkv_BlD.contiguous(), rule, cache)
        call.append(spans)
        for span in spans:
            call.attend(span)
        return call.out_BLC

    def phi(self, phi: nn.Conv2d) -> nn.Module:
        """The convolution as it is: on a GPU images of one batch are not kept apart."""
        return phi

    def sampler(self) -> Sampler:
        return Sampler()


def _per_token(rows: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """(tokens,) int32 on the device: the row that each token takes. One row stands for all tokens
    of a single scale, and None for the first row."""
    if rows is None:
        return torch.zeros(tokens, dtype=torch.int32, device=device)
    return _on_device(rows, device).expand(tokens).contiguous()


def _on_device(rows: Tensor, device: torch.device) -> Tensor:
    """int32 rows, which come on the CPU, on the device."""
    return ints(tuple(rows.tolist()), device)


@functools.cache
def ints(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """(numbers,) int32, copied to the device once: a CUDA graph cannot hold a copy from memory of
    the host, and reads this one as long as it lives."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


class _Call:
    """One `attend`: the operands its kernels share."""

    def __init__(self, qkv_BlD: Tensor, rule: AttentionRule, cache: Cache) -> None:
        self.qkv, self.rule, self.cache = qkv_BlD, rule, cache
        rows, self.new, _ = qkv_BlD.shape
        self.rows, self.pairs = rows, rows * rule.num_heads
        self.width = max(gemm.MIN_K, triton.next_power_of_2(rule.head_width))
        device, shape = qkv_BlD.device, (self.pairs, self.new)
        self.q = torch.empty(*shape, rule.head_width, dtype=torch.int8, device=device)
        self.q_scale = torch.empty(shape, dtype=torch.float32, device=device)
        self.q_zero = torch.empty(shape, dtype=torch.int32, device=device)
        self.q_sum = torch.empty_like(self.q_zero)
        self.row_max, self.row_z = torch.empty_like(self.q_scale), torch.empty_like(self.q_scale)
        channels = rule.num_heads * rule.head_width
        self.out_BLC = torch.empty(rows, self.new, channels, dtype=torch.float32, device=device)
        self.order = rule.spec.max_order if rule.theta is not None else 0

    def append(self, spans: Sequence[Span]) -> None:
        """Codes of the new tokens; those of the first span are the oldest."""
        rule, cache, spec = self.rule, self.cache, self.rule.spec
        assert spec.query and spec.key and spec.value
        by_segment = spec.policy == "segment"
        value = {
            "V_TOP": float(2**spec.value.num_bits - 1),
            "V_OFFSET": 128 if spec.value.num_bits == 8 else 0,
            "V_COPIES": float(2**self.order),
        }
        sizes = (self.new, rule.num_heads, rule.head_width, cache.k.shape[1], cache.length)
        values = (cache.v, cache.v_scale, cache.v_extra)
        books = [
            book(x.type, x.num_bits, self.qkv.device) for x in (spec.query, spec.key, spec.value)
        ]
        q_book, k_book, v_book = map(positive_entries, books)
        attention.append[(self.rows * self.new, rule.num_heads)](
            self.qkv, rule.q_bias, rule.v_bias, rule.q_factor, *books,
            self.q, self.q_scale, self.q_zero, self.q_sum,
            cache.k, cache.k_scale, cache.k_zero, cache.k_sum, *values, *sizes,
            WIDTH=self.width, UNIT=rule.l2_norm,
            Q_TOP=float(2**spec.query.num_bits - 1), K_TOP=float(2**spec.key.num_bits - 1),
            Q_BOOK=q_book, K_BOOK=k_book, V_BOOK=v_book, SEGMENT=by_segment,
            enable_fp_fusion=False, **value,
        )  # fmt: skip
        for span in spans if by_segment else ():
            first, count = span.queries.start, span.length
            attention.append_segment[(self.rows, rule.num_heads)](
                self.qkv, rule.v_bias, *values, *sizes, first, count, WIDTH=self.width, **value
            )
        cache.length += self.new

    def attend(self, span: Span) -> None:
        """One span: statistics, orders where shift-and-sum is on, and the product."""
        rule, cache = self.rule, self.cache
        queries = span.length
        keys = span.keys
        operands = (
            self.q, self.q_scale, self.q_zero, self.q_sum,
            cache.k, cache.k_scale, cache.k_zero, cache.k_sum, self.row_max, self.row_z,
        )  # fmt: skip
        sizes = (self.new, span.queries.start, queries, keys, cache.k.shape[1], rule.head_width)
        tiles = {"WIDTH": self.width, "BQ": BLOCK_Q, "BK": BLOCK_K}
        by_query = (self.pairs, triton.cdiv(queries, BLOCK_Q))
        attention.stats[by_query](*operands, *sizes, **tiles)
        order = torch.zeros_like(cache.k_zero)
        if rule.theta is not None:
            abar = torch.zeros_like(cache.k_scale)
            attention.mass[(self.pairs, triton.cdiv(keys, BLOCK_K))](
                *operands, abar, *sizes, **tiles
            )
            order = orders(abar, rule.theta, self.order).int()
        relative, scales, ends = self._steps(order, span)
        assert rule.spec.probability is not None
        attention.mix[by_query](
            *operands, cache.v, cache.v_extra, self.order - order, relative, scales, ends,
            self.out_BLC, *sizes, rule.num_heads, len(ends), int(rule.spec.policy == "segment"),
            P_TOP=float(2**rule.spec.probability.num_bits - 1), **tiles,
        )  # fmt: skip

    def _steps(self, order: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """The factor of p per key (B H, L), the scale of each segment, and the segments' ends.

        Policy "token" folds the step of a token into p, relative to the largest; "segment" brings
        all values of a segment to its finest step.
        """
        cache = self.cache
        if self.rule.spec.policy == "segment":
            ends = ints(span.ends, order.device)
            scales = cache.v_scale[:, ends - 1] / 2**self.order
            return torch.ones_like(cache.v_scale), scales.contiguous(), ends
        step = cache.v_scale / torch.exp2(order.float())
        # A step of 0 belongs to values of 0.
        largest = step[:, : span.keys].amax(dim=1, keepdim=True).clamp(min=LEAST_SCALE)
        return step / largest, largest.contiguous(), ints((span.keys,), order.device)
