"""The seams of a transformer: the places where quantizers and runtimes put modules of their own.

A pass over tokens is a list of stages; attention follows spans, "these queries see these keys", so
no mask is stored and the pass over all scales does the same products as one scale after another.
A seam says what it is: a Linear what it reads and of which kind it is, a model which of its Linears
a diagonal can be folded into (`Fold`), and what alone feeds a Linear (`feeds`). What stands above
`models` asks for that and never for the name of a layer.

Shapes: B rows, L tokens, l tokens of one scale, K scales, C width, H heads, c head width, T tokens
of a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.models.room import MEMORY, Room
from varptq.models.scales import Scales

LAYER_NORM_EPS = 1e-6
RESIDUAL_RATIO = 0.5
PHI_KERNEL = 3
# Tokens of the text that the account of bit operations takes a prompt to have.
USUAL_TEXT = 64
Reads = Literal["tokens", "condition", "text"]


class Span(NamedTuple):
    """Tokens of one scale, at `queries` of the current input. They see all tokens of the scales
    that end at `ends`, their own the last.

    Where the keys are those of a text, `ends` has its length alone and `own` names the scale."""

    queries: slice
    ends: tuple[int, ...]
    own: int | None = None

    @property
    def scale(self) -> int:
        """Index of the scale."""
        return len(self.ends) - 1 if self.own is None else self.own

    @property
    def keys(self) -> int:
        """How many tokens the queries see, from the first on."""
        return self.ends[-1]

    @property
    def of_text(self) -> bool:
        """Whether the keys are those of a text."""
        return self.own is not None

    @property
    def length(self) -> int:
        """How many queries there are."""
        return self.queries.stop - self.queries.start

    def over_text(self, length: int) -> Span:
        """The same queries over the `length` tokens of a text."""
        return Span(self.queries, (length,), self.scale)


def spans_of(scales: Scales, first: int = 0, end: int | None = None) -> list[Span]:
    """Block causality for an input that holds the tokens of scales `first`..`end` - 1 (default: the
    whole sequence): one span per scale."""
    chosen = range(first, scales.num_scales if end is None else end)
    starts, ends, offset = scales.starts, scales.ends, scales.starts[first]
    return [Span(slice(starts[k] - offset, ends[k] - offset), ends[: k + 1]) for k in chosen]


class LayerCache:
    """Keys and values of one block, preallocated for all L tokens: two tensors (B, H, L, c) of a
    room."""

    def __init__(self, keys_BHLc: Tensor, values_BHLc: Tensor, room: Room = MEMORY) -> None:
        self.keys, self.values, self.length = keys_BHLc, values_BHLc, 0
        self.room = room

    def append(self, k_BHlc: Tensor, v_BHlc: Tensor) -> tuple[Tensor, Tensor]:
        """Write l new tokens; returns views of all tokens so far."""
        self.room.enter(self.keys, self.values)
        end = self.length + k_BHlc.shape[2]
        self.keys[:, :, self.length : end] = k_BHlc
        self.values[:, :, self.length : end] = v_BHlc
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def rewind(self, length: int) -> None:
        """Back to the first `length` tokens; the next ones are written behind them."""
        self.length = length

    def first_rows(self, rows: int) -> LayerCache:
        """The same for the first `rows` rows, which it shares."""
        shared = LayerCache(self.keys[:rows], self.values[:rows], self.room)
        shared.length = self.length
        return shared


class TokenLinear(nn.Linear):
    """Seam: a Linear over the tokens of the scales from `first_scale` on. What scale each token is
    of matters to quantizers only. `kind` is what it is in any block, e.g. "fc2"."""

    reads: Reads = "tokens"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kind: str,
        first_scale: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype=torch.float32)
        self.kind, self.first_scale = kind, first_scale

    def forward(self, input: Tensor, spans: Sequence[Span] | None = None) -> Tensor:
        return super().forward(input)

    def tokens_per_image(self, scales: Scales, text: int = USUAL_TEXT) -> int:
        """How many tokens of one image go through this layer."""
        return scales.num_tokens - scales.starts[self.first_scale]


class ConditionLinear(nn.Linear):
    """Seam: a Linear over one vector per condition, e.g. of a class. `once`: the account of bit
    operations counts it once per image."""

    reads: Reads = "condition"

    def __init__(
        self, in_features: int, out_features: int, *, kind: str, once: bool = False
    ) -> None:
        super().__init__(in_features, out_features, dtype=torch.float32)
        self.kind, self.once = kind, once

    def tokens_per_image(self, scales: Scales, text: int = USUAL_TEXT) -> int:
        """One, or one at each of the K scales, as the paper counts VAR although the condition is
        the same at all of them."""
        return 1 if self.once else scales.num_scales


class TextLinear(nn.Linear):
    """Seam: a Linear over the tokens of a text, or with `pooled` over one vector of it, computed
    once per image. It is called with texts of one length, (B, T, in), so that nothing is padded."""

    reads: Reads = "text"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kind: str,
        pooled: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype=torch.float32)
        self.kind, self.pooled = kind, pooled

    def tokens_per_image(self, scales: Scales, text: int = USUAL_TEXT) -> int:
        """Those of a prompt of `text` tokens."""
        return 1 if self.pooled else text


class TextSummary(nn.Module):
    """Seam: one vector of each text, (R, T, in) -> (R, C), with products that are never quantized
    between its `TextLinear`s."""


SeamLinear = TokenLinear | ConditionLinear | TextLinear


def linears_of(network: nn.Module) -> dict[str, SeamLinear]:
    """The Linear seams of a float network by name."""
    return {n: m for n, m in network.named_modules() if isinstance(m, SeamLinear)}


class Scores(nn.Module):
    """Seam: attention scores of one span, q k^T. q is already scaled."""

    def forward(self, q_BHlc: Tensor, k_BHLc: Tensor, span: Span) -> Tensor:
        return q_BHlc @ k_BHLc.transpose(-1, -2)


class Mix(nn.Module):
    """Seam: attention-value product of one span, p v."""

    def forward(self, p_BHlL: Tensor, v_BHLc: Tensor, span: Span) -> Tensor:
        return p_BHlL @ v_BHLc


def mixes_of(network: nn.Module) -> dict[str, Mix]:
    """The attention-value products of a network, by name of the attention they are of."""
    found = ((name, m) for name, m in network.named_modules() if isinstance(m, Mix))
    return {name.rpartition(".")[0]: mix for name, mix in found}


def block_of(name: str) -> int | None:
    """Index of the block that a module is in, None outside of them."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else None


class ModulatedNorm(nn.Module):
    """Seam: LayerNorm without parameters, then (1 + scale) and shift of the condition."""

    def forward(self, x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
        normed_BLC = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=LAYER_NORM_EPS)
        return normed_BLC * (1 + scale_B1C) + shift_B1C


class GatedSum(nn.Module):
    """Seam: what a branch of a block adds to its tokens."""

    def forward(self, x_BLC: Tensor, branch_BLC: Tensor, gamma_B1C: Tensor | None = None) -> Tensor:
        """x + branch gamma, or without a gate x + branch. Nobody reads `branch` afterwards: a
        runtime may put the result in its place."""
        return x_BLC + (branch_BLC if gamma_B1C is None else branch_BLC * gamma_B1C)


class Gain(nn.Module):
    """Factors of modulated norms, where an AdaLN layer that blocks share has no rows of a block's
    own to fold them into:

        LN(x) (1 + scale) + shift   ->   gain (LN(x) (1 + scale) + shift)

    `norms` norms are modulated by vectors (B, 1, 3 norms, C) in the order gammas, scales, shifts.
    They are the identity, without a tensor, until `start`.
    """

    weight: nn.Parameter | None

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.norms = norms
        self.register_parameter("weight", None)

    def start(self, like: Tensor) -> None:
        """Be a parameter (norms, C) of ones, C, dtype and device those of `like` (..., C)."""
        self.weight = nn.Parameter(like.new_ones(self.norms, like.shape[-1]), requires_grad=False)

    def forward(self, vectors_B1nC: Tensor) -> Tensor:
        """The vectors that the norms without a gain want, once per image."""
        if self.weight is None:
            return vectors_B1nC
        gammas, scales, shifts = vectors_B1nC.split(self.norms, dim=-2)
        return torch.cat((gammas, self.weight * (1 + scales) - 1, self.weight * shifts), dim=-2)


def start_gains(network: nn.Module, names: Collection[str], like: Tensor) -> None:
    """Start the gains that have a tensor among `names` of a state dict."""
    for name, module in network.named_modules():
        if isinstance(module, Gain) and f"{name}.weight" in names:
            module.start(like)


class Phi(nn.Conv2d):
    """Seam: phi(h) = 0.5 h + 0.5 conv(h) of the token map, size preserving."""

    def __init__(self, code_dim: int) -> None:
        super().__init__(
            code_dim, code_dim, PHI_KERNEL, padding=PHI_KERNEL // 2, dtype=torch.float32
        )

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, P, P) -> (B, C, P, P)."""
        return (1 - RESIDUAL_RATIO) * input + RESIDUAL_RATIO * super().forward(input)


class NormFold(NamedTuple):
    """`consumer` reads what a `ConditionLinear` scales and shifts: `ada` holds C rows for each
    vector, of which `scale_row` and `shift_row` count. `biases` add to the output, in order of its
    rows."""

    consumer: nn.Linear
    ada: nn.Linear
    scale_row: int
    shift_row: int
    biases: tuple[Tensor, ...]


class ValueFold(NamedTuple):
    """`consumer` reads the mixed values of an attention: rows `rows` of `source` and `bias` make
    them."""

    consumer: nn.Linear
    source: nn.Linear
    rows: slice
    bias: Tensor


class GainFold(NamedTuple):
    """`consumer` reads norm `row` of those that `gain` goes with; `like` is one of the vectors of
    AdaLN (..., C)."""

    consumer: nn.Linear
    gain: Gain
    row: int
    like: Tensor


class ChannelFold(NamedTuple):
    """All of `consumers` read, and nothing else does, channels that are multiplied where the first
    axis of each of `tensors` is: affine parameters of a norm, or weight and bias of a Linear."""

    consumers: tuple[nn.Linear, ...]
    tensors: tuple[Tensor, ...]


Fold = NormFold | ValueFold | GainFold | ChannelFold


def consumers_of(fold: Fold) -> tuple[nn.Linear, ...]:
    """The Linears whose columns a diagonal is divided out of."""
    return fold.consumers if isinstance(fold, ChannelFold) else (fold.consumer,)


def memoized(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`make`, run at its first call alone. `functools.cache` is opaque to torch.compile."""
    made: list[Tensor] = []

    def once() -> Tensor:
        if not made:
            made.append(make())
        return made[0]

    return once


class Stage(NamedTuple):
    """One step of a pass: `run(x, spans, cache)` takes the tokens (B, l, C) of all rows on.

    name: of the module that does it. condition_units, token_units: submodules of it whose rounding
    is learned on its own, in the order in which they run; a stage that is itself such a unit is the
    last of the pass. arguments: what a token unit is called with behind (x, spans), where it reads
    more than tokens; of_rows: those units whose arguments are other ones for other rows. prepare:
    makes what `run` keeps of the condition, which else its first call makes.
    """

    name: str
    run: Callable[[Tensor, list[Span], Any], Tensor]
    condition_units: tuple[str, ...] = ()
    token_units: tuple[str, ...] = ()
    arguments: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
    of_rows: tuple[str, ...] = ()
    prepare: Callable[[], object] | None = None


def run_stages(
    stages: list[Stage], x_BlC: Tensor, spans: list[Span], cache: list[Any] | None = None
) -> Tensor:
    """(B, l, C) through all stages -> float32 logits (B, l, V)."""
    for stage in stages:
        x_BlC = stage.run(x_BlC, spans, cache)
    return x_BlC.float()
