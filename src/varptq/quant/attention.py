"""The simulated attention products: what stands in the seams `Scores` and `Mix`.

    QuantScores   fake(q) fake(k)^T
    QuantMix      fake(p) fake(v), v by the policy of its spec, with shift-and-sum

Policies differ in the range of v and in whether the codes of a token ever change (config.py). Like
every simulated layer they compute in float on the values of codes. Shapes as in models/seams.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varptq.models.seams import Mix, Scores, Span
from varptq.quant.affine import LEAST_SCALE, Grid, affine_values, wide
from varptq.quant.config import AttentionSpec, TensorSpec
from varptq.quant.quantizers import QUANTIZERS
from varptq.quant.shift_sum import copies_of, fixed_codes, orders, shift_sum_fake, token_scores


class QuantScores(Scores):
    """q k^T with both sides quantized. Keys per head channel share a range over all tokens of the
    call."""

    def __init__(self, spec: AttentionSpec, layer: str) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer

    def forward(self, q_BHlc: Tensor, k_BHLc: Tensor, span: Span) -> Tensor:
        query, key = self.spec.query, self.spec.key
        if query is not None:
            q_BHlc = QUANTIZERS[query.type].straight_through(q_BHlc, query)
        if key is not None:
            dim = -2 if key.strategy == "channel" else -1
            k_BHLc = QUANTIZERS[key.type].straight_through(k_BHLc, key, dim)
        return super().forward(q_BHlc, k_BHLc, span)


class QuantMix(Mix):
    """p v with p by its probability rule and v by its policy, shift-and-sum where `theta` is set.

    The order of each key follows from the float attention averaged over the queries of the call,
    before p is quantized (paper section on kernel selection; docs/method.md section 2). Policy
    "segment" cuts the values where the scales of the span end.
    """

    def __init__(self, spec: AttentionSpec, layer: str) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        self.theta: float | None = None

    def forward(self, p_BHlL: Tensor, v_BHLc: Tensor, span: Span) -> Tensor:
        if self.spec.policy == "token" and self.spec.value is not None:
            return self._folded(p_BHlL, v_BHLc, span)
        p_hat = self._fake_probability(p_BHlL)
        out_BHlc = super().forward(p_hat, self.fake_value(p_BHlL, v_BHLc, span), span)
        if not self.spec.renormalize:
            return out_BHlc
        return out_BHlc / p_hat.sum(dim=-1, keepdim=True)

    def _fake_probability(self, p_BHlL: Tensor) -> Tensor:
        spec = self.spec.probability
        return p_BHlL if spec is None else QUANTIZERS[spec.type].straight_through(p_BHlL, spec)

    def orders(self, p_BHlL: Tensor) -> Tensor:
        """(B, H, L) order of each key; 0 without shift-and-sum."""
        if self.theta is None:
            return torch.zeros_like(p_BHlL[:, :, 0], dtype=torch.int64)
        return orders(token_scores(p_BHlL), self.theta, self.spec.max_order)

    def value_grid(self, v_BHLc: Tensor, span: Span) -> Grid:
        """Grid of the values: per head over all tokens, per head and scale, or per token."""
        spec = self.spec.value
        assert spec is not None
        if self.spec.policy == "segment":
            return segment_grid(v_BHLc, spec, span.ends)
        dims = -1 if self.spec.policy == "token" else (-2, -1)
        return QUANTIZERS[spec.type].grid_of(v_BHLc, spec, dims)

    def fake_value(self, p_BHlL: Tensor, v_BHLc: Tensor, span: Span) -> Tensor:
        """v on its grid, N times finer where the attention p says so."""
        spec = self.spec.value
        if spec is None:
            return v_BHLc
        if self.theta is None and self.spec.policy == "release":
            return QUANTIZERS[spec.type].straight_through(v_BHLc, spec, (-2, -1))
        grid = self.value_grid(v_BHLc, span)
        row = QUANTIZERS[spec.type]
        if self.theta is None or not row.even_steps:
            codes = row.codes(v_BHLc, grid, spec.num_bits)
            return row.values(codes, grid, spec.num_bits).to(v_BHLc.dtype)
        order = self.orders(p_BHlL)
        if self.spec.policy == "release":
            return shift_sum_fake(v_BHLc, grid, order, spec.num_bits)
        codes = fixed_codes(v_BHLc, grid, order, spec.num_bits, self.spec.max_order)
        return affine_values(codes, grid).to(v_BHLc.dtype)

    def _folded(self, p_BHlL: Tensor, v_BHLc: Tensor, span: Span) -> Tensor:
        """Policy "token": with v_j = step_j u_j, u_j integers and step_j = s_j / N_j, the rule
        quantizes p_ij step_j, and u is multiplied as it is. Rows are renormalised by
        D_i = sum_j (p_ij step_j)^ / step_j."""
        spec = self.spec.value
        assert spec is not None
        grid, order = self.value_grid(v_BHLc, span), self.orders(p_BHlL)
        copies, row = copies_of(order, grid.scale.dtype), QUANTIZERS[spec.type]
        if self.theta is None or not row.even_steps:
            codes = row.codes(v_BHLc, grid, spec.num_bits)
        else:
            codes = fixed_codes(v_BHLc, grid, order, spec.num_bits, self.spec.max_order)
        u_BHLc = row.integers(codes, grid, spec.num_bits) * copies
        step_BHL1 = grid.scale / copies
        # Relative to the largest step, so that the rule's floor is one of probabilities. A step of
        # 0 belongs to values of 0.
        largest = step_BHL1.amax(dim=-2, keepdim=True).clamp(min=LEAST_SCALE)
        relative_BH1L = (step_BHL1 / largest).transpose(-1, -2)
        folded_BHlL = self._fake_probability(wide(p_BHlL) * relative_BH1L)
        out_BHlc = super().forward(folded_BHlL, u_BHLc, span) * largest
        if self.spec.renormalize:
            # A step may be too small to be told from 0 beside the largest; its code then is 0.
            p_hat = folded_BHlL / relative_BH1L.clamp(min=LEAST_SCALE)
            out_BHlc = out_BHlc / p_hat.sum(dim=-1, keepdim=True)
        return out_BHlc.to(v_BHLc.dtype)


def segment_grid(v_BHLc: Tensor, spec: TensorSpec, ends: tuple[int, ...]) -> Grid:
    """One range per head and scale, whose tokens end at `ends`: scale and zero_point (B, H, L,
    1)."""
    lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    parts = v_BHLc.split(lengths, dim=-2)
    grids = [QUANTIZERS[spec.type].grid_of(part, spec, (-2, -1)) for part in parts]
    repeats = [
        [grid[i].expand(-1, -1, length, -1) for grid, length in zip(grids, lengths, strict=True)]
        for i in (0, 1)
    ]
    return Grid(*(torch.cat(parts, dim=-2) for parts in repeats))
