"""Rows of the table of quantizers, each with a spec and numbers for it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from varptq.quant.config import TensorSpec
from varptq.quant.quantizers import QUANTIZERS, Quantizer

NAMES = sorted(QUANTIZERS)
RULES = ("with_zero", "min_max", "min_max_clamped")
Case = tuple[Quantizer, TensorSpec, Tensor]


def probabilities(name: str) -> bool:
    """Whether a row takes nothing but probabilities."""
    return set(QUANTIZERS[name].operands) == {"probability"}


@st.composite
def tensors(draw: Any) -> Tensor:
    """float64, of odd sizes; rows of one sign, ties, halves of steps, zeros, and ranges below the
    floors."""
    shape = (draw(st.integers(1, 2)), draw(st.sampled_from((1, 3, 37))), draw(st.integers(1, 13)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(("plain", "ties", "zeros", "tiny", "large")))
    x = x + draw(st.sampled_from((-3.0, 0.0, 0.2, 3.0)))
    if kind == "ties":
        x = (2 * x).round() / 2
    elif kind == "zeros":
        x[0] = 0.0
    return x * {"tiny": 1e-8, "large": 1e4}.get(kind, 1.0)


@st.composite
def cases(draw: Any, name: str) -> Case:
    """Any width and range rule of the row `name`; probabilities where it takes nothing else."""
    row, x = QUANTIZERS[name], draw(tensors())
    rule = draw(st.sampled_from(RULES)) if row.range_rules else "with_zero"
    bits = draw(st.sampled_from((row.widths[0], 4, row.widths[-1])))
    if probabilities(name):
        x = (x.clamp(-50, 50) * draw(st.floats(0.1, 20))).softmax(-1)
    return row, TensorSpec(num_bits=bits, type=name, range_rule=rule), x
