"""The simulated layers with their elementwise quantizers compiled: the same bits in less time.

Sampling simulated models is most of a table's hours, and about a third of it goes into passes over
activations, which a compiler fuses. Division, rounding and comparison have one right answer, and
logarithms of probabilities were found to round to the same codes (tests/benchmarks), so the images
stay what they were; products of matrices stay as they are. Compiling takes about 80 s a process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from varptq.quant.quantizers import QUANTIZERS

# Number of dimensions, widths in bits and range rules make one version each.
VERSIONS = 512


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` compiled where no gradient is wanted, as it is otherwise."""
    fast = torch.compile(function, dynamic=True, fullgraph=True)

    def either(x: Tensor, *rest: Any) -> Tensor:
        return (function if x.requires_grad else fast)(x, *rest)

    return either


def compile_quantizers() -> None:
    """From here on, all simulated layers of this process use compiled quantizers."""
    from torch._dynamo import config  # two seconds that only this takes

    config.recompile_limit = VERSIONS
    for name, row in QUANTIZERS.items():
        if row.trained is not None:
            QUANTIZERS[name] = replace(row, trained=compiled(row.trained))
