"""The contract of a transformer: what everything above `models` may ask of it.

A family is free in how it computes. Its modules are the seams of `seams.py`, under names of its own
whose blocks are `blocks.<index>`. Shapes as in `seams.py`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from varptq.errors import ConfigError, InputError
from varptq.models.alphabet import Alphabet
from varptq.models.cross import TextGroup
from varptq.models.meta import on_meta
from varptq.models.prompts import Prompts
from varptq.models.sampling import (
    LOGITS,
    VAR_SAMPLING,
    PerScale,
    SamplingSettings,
    guidance_strength,
    per_scale,
)
from varptq.models.scales import Scales
from varptq.models.seams import Fold, Span, Stage, run_stages, spans_of


class Transformer(nn.Module):
    """A next-scale transformer made from `arch` alone, a frozen dataclass of hashable values with
    `width`, `num_heads`, `depth` and `scales`, with these properties and methods.

    UNGUIDED: the cfg that means no guidance. READS_TEXTS: whether prompts are texts.
    """

    UNGUIDED: ClassVar[float] = 0.0
    READS_TEXTS: ClassVar[bool] = False
    arch: Any

    def __init__(self, arch: Any) -> None:
        super().__init__()
        self.arch = arch

    @property
    def width(self) -> int:
        """C, channels of the residual stream."""
        return self.arch.width

    @property
    def num_heads(self) -> int:
        """H, heads of an attention."""
        return self.arch.num_heads

    @property
    def scales(self) -> Scales:
        """The schedule that tokens follow: the model's own, or the one it was put `over`."""
        return self.arch.scales

    def over(self, scales: Scales) -> Self:
        """This network over another schedule: a second object around the same modules and tensors.

        Raises `InputError` where the model draws at its own schedule only."""
        if scales != self.scales:
            raise InputError(
                f"sides {scales}: this model knows its own only, {self.scales}; leave the size out"
            )
        return self

    def first_blocks(self, count: int) -> Self:
        """This network with its first `count` blocks, at most all: a second object around the same
        modules and tensors. What it computes means nothing, but takes its share of the time."""
        found = copy.copy(self)
        found.arch = replace(self.arch, depth=min(count, self.arch.depth))
        found._modules = dict(self._modules)
        found.blocks = cast(nn.ModuleList, self.blocks)[:count]
        return found

    def schedule(self, size: Any) -> Scales:
        """The schedule for images of `size`: a `Scales`, or what a family calls a size.

        Raises `InputError` for a size that the model does not know."""
        if isinstance(size, Scales):
            return size
        raise InputError(f"size {size!r}: this model draws at one size only; leave it out")

    def sizes(self) -> tuple[str, ...]:
        """Names that `schedule` takes, for a model that draws at several sizes."""
        return ()

    def shaped(self, height: int, width: int) -> Scales:
        """The schedule nearest to these proportions, of as many maps as the present one: that one
        itself, for a model that draws at one size."""
        return self.scales

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, all of one."""
        return next(self.parameters()).dtype

    @property
    @abstractmethod
    def alphabet(self) -> Alphabet:
        """What a token is; logits have draws * size entries."""

    @property
    def sampling(self) -> SamplingSettings:
        """The settings that hold unless a caller gives others, none of them None: those of the VAR
        paper, unless a family has its own."""
        return VAR_SAMPLING

    def strengths(self, cfg: PerScale) -> tuple[float, ...]:
        """Strength t of guidance at every scale, (1 + t) cond - t uncond: a ramp from 0 at the
        first to `cfg` at the last, unless a family has its own rule or each is given. Raises
        `InputError` for another number of values than of scales."""
        if isinstance(cfg, tuple):
            return per_scale("cfg", cfg, self.scales)
        return tuple(guidance_strength(cfg, k, self.scales) for k in range(self.scales.num_scales))

    def check_guidance(self, places: tuple[int, ...]) -> None:
        """Raise `ConfigError` for places where this model cannot mix the two rows of guidance: all
        but the logits, unless a family knows others."""
        if places != (LOGITS,):
            raise ConfigError(
                f"guide_at {list(places)}: this model is guided in its logits only; leave it out"
            )

    def mixed(
        self, stages: list[Stage], strengths: tuple[float, ...], places: tuple[int, ...]
    ) -> list[Stage]:
        """The pass with its rows mixed at `places`, all but the logits."""
        return stages

    @abstractmethod
    def prompts(self, values: Any, names: Sequence[str], encoder: Any) -> Prompts:
        """Prompts from what a caller writes; the model's own prompts stay as they are. `names` are
        those of the pool, `encoder` is a `TextEncoder` or None. Raises `InputError` naming the
        first that cannot be used."""

    @abstractmethod
    def pool(self, names: Sequence[str], encoder: Any) -> Prompts:
        """The prompts that calibration and evaluation draw images for where nobody says which.
        Raises `InputError` where there are none."""

    def unasked(self) -> Prompts:
        """One prompt that asks for nothing, where there is none that it could stand beside."""
        return self.pool((), None)[slice(0, 1)].nothing()

    @property
    def num_prompts(self) -> int | None:
        """How many prompts there are in all; None where they cannot be counted."""
        return None

    @abstractmethod
    def condition(self, prompts: Any) -> Any:
        """What the stages need to know of these prompts."""

    def texts(self, prompts: Any) -> tuple[TextGroup, ...]:
        """What units that read nothing but texts are called with, group by group; without texts
        there are none."""
        return ()

    def constants(self) -> dict[str, Tensor]:
        """Buffers by name that follow from the architecture."""
        return {}

    def facts(self) -> dict[str, str]:
        """The architecture in words, as rows of a table for people."""
        draws, size = self.alphabet
        return {
            "transformer": f"width {self.width}, {self.num_heads} heads",
            "tokens": f"{self.scales.num_tokens} in sides {self.scales}; "
            f"{draws} of {size} symbols each",
        }

    @abstractmethod
    def condition_vectors(self, pool: Any) -> Tensor:
        """(N, C) float32: all vectors that a `ConditionLinear` may read, of the prompts there are
        and of those in `pool`."""

    def forward(self, prompts: Any, inputs_BLc: Tensor) -> Tensor:
        """Teacher-forced logits of all scales in one block-causal pass.

        prompts: what `condition` takes, B of them; inputs_BLc (B, L - l_0, c), the input tokens of
        scales 1..K-1 as `Autoencoder.teacher_inputs` gives them. Returns float32 logits (B, L, V).
        """
        condition = self.condition(prompts)
        x_BLC = self.embed(condition, inputs_BLc)
        return run_stages(self.stages(condition), x_BLC, spans_of(self.scales))

    @abstractmethod
    def embed(self, condition: Any, inputs_BLc: Tensor) -> Tensor:
        """Input of the first stage for all scales, (B, L, C), from the input tokens of scales
        1..K-1, (B, L - l_0, c)."""

    @abstractmethod
    def embed_first(self, condition: Any) -> Tensor:
        """Input of the first stage at scale 0, (B, l_0, C)."""

    @abstractmethod
    def embed_inputs(self, inputs_Blc: Tensor, spans: Sequence[Span]) -> Tensor:
        """Input of the first stage at the scales of `spans`, none of them 0, (B, l, C)."""

    @abstractmethod
    def stages(self, condition: Any) -> list[Stage]:
        """The pass behind the embedding, from (B, l, C) to logits (B, l, V)."""

    @abstractmethod
    def input_units(self) -> list[str]:
        """Linears that run before the stages and whose rounding is learned on its own."""

    @abstractmethod
    def new_cache(self, rows: int) -> list[Any]:
        """Preallocated keys and values for `rows` rows, one entry per block."""

    @abstractmethod
    def folds(self) -> dict[str, Fold]:
        """Linears by name whose input a diagonal can be folded into what makes it."""

    @abstractmethod
    def feeds(self) -> dict[str, str]:
        """Names of Linears -> name of the norm or activation that feeds that Linear alone."""


def float_layout(transformer: Transformer) -> Transformer:
    """The float model of this architecture on the meta device, whatever stands in `transformer` in
    the places of its modules."""
    with on_meta():
        return type(transformer)(transformer.arch)
