"""Error of the attention-value product per scale: what quantizing p and v does to p v.

Both products are fed the float model's own p and v, so nothing but their quantizers differs:
    error = ||p^ v^ - p v||^2 / ||p v||^2 over all heads, queries and channels of a scale
This is the paper's picture of coarse scales, whose few tokens gather the attention mass. How such
an error moves the next tokens is measured in tokens.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from varptq.models.pipeline import Pipeline
from varptq.models.var import Mix

Product = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def product_errors(
    pipe: Pipeline, products: list[Product], labels_B: Tensor, ids_BL: Tensor
) -> Tensor:
    """(blocks, K) float64 relative error energy of p v, one product per block (e.g. `QuantMix`).

    labels_B (B,) and ids_BL (B, L) are read teacher-forced by the float pipeline; rows are the
    conditional and the unconditional ones.
    """
    scales = pipe.scales
    sums = torch.zeros(len(products), scales.num_scales, 2, dtype=torch.float64, device="cpu")
    calls = [0] * len(products)

    def listener(block: int) -> Callable[[nn.Module, tuple[Tensor, Tensor], Tensor], None]:
        def listen(_: nn.Module, operands: tuple[Tensor, Tensor], output: Tensor) -> None:
            scale = calls[block] % scales.num_scales
            calls[block] += 1
            difference = products[block](*operands) - output
            sums[block, scale, 0] += difference.double().square().sum().cpu()
            sums[block, scale, 1] += output.double().square().sum().cpu()

        return listen

    mixes = [module for module in pipe.var.modules() if isinstance(module, Mix)]
    handles = [mix.register_forward_hook(listener(block)) for block, mix in enumerate(mixes)]
    rows, ids_BL = pipe.guidance_rows(labels_B), ids_BL.to(pipe.device)
    try:
        pipe.var(rows, pipe.vae.teacher_inputs(ids_BL).repeat(2, 1, 1))
    finally:
        for handle in handles:
            handle.remove()
    return sums[..., 0] / sums[..., 1]
