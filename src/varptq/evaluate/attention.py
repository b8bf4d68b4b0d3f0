"""Error of the attention-value product per scale: what quantizing p and v does to p v.

Both products get the float model's own p and v, so only their quantizers differ:
    error = ||p^ v^ - p v||^2 / ||p v||^2 over all heads, queries and channels of a scale
The paper shows this error at coarse scales, whose few tokens gather most of the attention. How it
changes the next-token distributions is measured in tokens.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varptq.models.cross import Mixes
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import Prompts
from varptq.models.reading import listening, read
from varptq.models.seams import Span

Product = Callable[[Tensor, Tensor, Span], Tensor]


@torch.no_grad()
def product_errors(
    pipe: Pipeline,
    products: list[Product],
    prompts: Prompts,
    tokens: Tensor,
    *,
    text: bool = False,
) -> Tensor:
    """(blocks, K) float64 relative error energy of p v, one product per block (e.g. `QuantMix`):
    of the attention over tokens, or with `text` of that over texts.

    Prompts and their tokens are read teacher-forced by the float pipeline; rows are the
    conditional and the unconditional ones.
    """
    every = Mixes.of(pipe.var)
    mixes = list((every.text if text else every.tokens).values())
    count = pipe.scales.num_scales
    sums = torch.zeros(len(products), count, 2, dtype=torch.float64, device="cpu")

    def add(block: int, output: Tensor, p_BHlL: Tensor, v_BHLc: Tensor, span: Span) -> None:
        difference = products[block](p_BHlL, v_BHLc, span) - output
        sums[block, span.scale, 0] += difference.double().square().sum().cpu()
        sums[block, span.scale, 1] += output.double().square().sum().cpu()

    with listening(dict(enumerate(mixes)), add, output=True):
        read(pipe, prompts, tokens)
    return sums[..., 0] / sums[..., 1]
