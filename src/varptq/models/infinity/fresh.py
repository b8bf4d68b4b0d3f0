"""Random values for an Infinity transformer, streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from varptq.models.blocks import INIT_LOG_SCALE
from varptq.models.infinity.transformer import Infinity

INIT_STD = 0.02
ADA_STD = 0.5


def randomize(infinity: Infinity, generator: torch.Generator) -> None:
    """Fill every parameter with the values of a fresh, trainable model (for benchmarks and tests).

    Each tensor in the dtype that the model has: a model on the meta device becomes a real one
    without a second copy of it in memory.
    """
    for _ in filled(infinity, generator):
        pass


def filled(infinity: Infinity, generator: torch.Generator) -> Iterator[nn.Module]:
    """The same, module by module: each is given once it has its values, and need not keep them."""
    for module in infinity.modules():
        with torch.no_grad():
            _fill(module, generator)
        yield module


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, torch.zeros_like(buffer, device=_real(buffer)))
    for name, parameter in list(module.named_parameters(recurse=False)):
        values = _fresh(name, parameter, generator).to(_real(parameter), parameter.dtype)
        setattr(module, name, nn.Parameter(values, requires_grad=parameter.requires_grad))


def _real(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _fresh(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Scales of attention and norms start as those of a new module, matrices by their fan-in, the
    rest small."""
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    if name == "scale_mul_1H11":
        return values.fill_(INIT_LOG_SCALE)
    if name == "weight" and parameter.dim() == 1:
        return values.fill_(1.0)
    std = ADA_STD / math.sqrt(parameter.shape[-1]) if parameter.dim() == 2 else INIT_STD
    return values.normal_(0.0, std, generator=generator)
