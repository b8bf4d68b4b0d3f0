"""OrbitQuant (arXiv 2607.02461), re-implemented from its description, as far as a comparison needs
it. It sees no data.

    u = P x / |x|,  x^ = |x| P^T c(u)      inputs, a token at a time; rows of weights the same way
    P   a permutation, signs, and Hadamard in blocks of the largest power of two in the width
    c   the optimal codebook of one coordinate of a point on the unit sphere of that dimension
    AdaLN layers                            weights of 4 bits, nearest, groups of 64; inputs 16 bits
    attention, word_embed, head             16 bits

It was published for diffusion transformers, at W4A4, W3A3 and W2A4. Simulated in float.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.models.pipeline import Pipeline
from varptq.models.seams import Span, TokenLinear
from varptq.quant.config import LayerRule, LinearSpec, QuantConfig, TensorSpec
from varptq.quant.transforms import hadamard

ADALN, ADALN_GROUP = "*ada_lin.1", 64
# Of weights and inputs, and what the rows of a study are called.
WIDTHS = {f"orbitquant w{w}a{a}": (w, a) for w, a in ((4, 4), (3, 3), (2, 4))}
# Of the density that a codebook is optimal for, and of its iteration.
POINTS, ROUNDS = 20_001, 2000


def account_config(weight_bits: int, input_bits: int) -> QuantConfig:
    """The same assignment as a config, which the BOP account and `convert` understand."""
    book = TensorSpec(num_bits=weight_bits, type="codebook", strategy="channel")
    token = TensorSpec(num_bits=input_bits, type="codebook", strategy="token")
    group = TensorSpec(num_bits=4, strategy="group", group_size=ADALN_GROUP)
    rules = (
        LayerRule(targets="word_embed", weight=None, input=None),
        LayerRule(targets="head", weight=None, input=None),
        LayerRule(targets=ADALN, weight=group, input=None),
    )
    linear = LinearSpec(weight=book, input=token)
    name = f"orbitquant-w{weight_bits}a{input_bits}"
    return QuantConfig(name=name, linear=linear, attention=None, rules=rules)


@cache
def codebook(num_bits: int, width: int) -> Tensor:
    """(2^b,) float32, ascending: the means of the cells that they are nearest to (Lloyd, Max), for
    the density (1 - u^2)^((width - 3) / 2) of a coordinate u."""
    # Beyond eight deviations is nothing that float64 would tell from 0.
    edge = min(1.0, 8.0 / width**0.5)
    u = torch.linspace(-edge, edge, POINTS, dtype=torch.float64)
    density = (1 - u.square()).clamp(min=0).pow((width - 3) / 2)
    mass, moment = (F.pad(x.cumsum(0), (1, 0)) for x in (density, density * u))
    shares = (torch.arange(2**num_bits, dtype=torch.float64) + 0.5) / 2**num_bits
    levels = u[torch.searchsorted(mass[1:], shares * mass[-1])]
    for _ in range(ROUNDS):
        borders = torch.searchsorted(u, (levels[1:] + levels[:-1]) / 2)
        ends = F.pad(borders, (1, 1))
        ends[-1] = POINTS
        means = moment[ends].diff() / mass[ends].diff()
        if torch.equal(means, levels):
            break
        levels = means
    return levels.float()


class Rotation:
    """P of one width, drawn from a seed."""

    def __init__(self, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(width, generator=generator)
        self.signs = 1.0 - 2.0 * torch.randint(2, (width,), generator=generator).float()
        self.block = width & -width

    def __call__(self, x: Tensor) -> Tensor:
        """(..., width)."""
        return hadamard(x[..., self.order] * self.signs, self.block)


def rounded(x: Tensor, num_bits: int, rotation: Rotation) -> Tensor:
    """x^ in the rotated basis."""
    norm = x.norm(dim=-1, keepdim=True)
    book = codebook(num_bits, x.shape[-1])
    u = rotation(x / (norm + 1e-10)).contiguous()
    return book[torch.bucketize(u, (book[1:] + book[:-1]) / 2)] * norm


class OrbitLinear(nn.Module):
    """Simulated layer in a Linear seam."""

    def __init__(self, linear: nn.Linear, widths: tuple[int, int], seed: int) -> None:
        super().__init__()
        self.rotation, self.input_bits = Rotation(linear.in_features, seed), widths[1]
        self.weight = rounded(linear.weight.detach(), widths[0], self.rotation)
        self.bias = linear.bias

    def forward(self, x: Tensor, spans: Sequence[Span] | None = None) -> Tensor:
        return F.linear(rounded(x, self.input_bits, self.rotation), self.weight, self.bias)


def adaln_weight(weight: Tensor) -> Tensor:
    """Symmetric steps of 4 bits, in groups."""
    groups = weight.unflatten(-1, (-1, ADALN_GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)


def orbitquant(pipe: Pipeline, widths: tuple[int, int], seed: int) -> Pipeline:
    """The simulated model; the pipeline given is left as it is."""
    var = copy.deepcopy(pipe.var)
    for name, module in list(var.named_modules()):
        if name.endswith(ADALN.removeprefix("*")) and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(adaln_weight(module.weight), requires_grad=False)
        elif isinstance(module, TokenLinear) and name.startswith("blocks."):
            parent, _, child = name.rpartition(".")
            setattr(var.get_submodule(parent), child, OrbitLinear(module, widths, seed))
    return replace(pipe, var=var)
