"""What a family's transformer answers: the contract that everything above `models` relies on.

A family is free in how it computes. Its modules are the seams of `seams.py`, under names of its own
whose blocks are `blocks.<index>`. Shapes as in `seams.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from varptq.models.alphabet import Alphabet
from varptq.models.prompts import Prompts
from varptq.models.scales import Scales
from varptq.models.seams import Fold, Span, Stage, run_stages, spans_of


class Transformer(nn.Module):
    """A next-scale transformer made from `arch` alone, with these properties and methods."""

    arch: Any

    def __init__(self, arch: Any) -> None:
        super().__init__()
        self.arch = arch

    @property
    @abstractmethod
    def width(self) -> int:
        """C, channels of the residual stream."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """H, heads of an attention."""

    @property
    @abstractmethod
    def scales(self) -> Scales:
        """The schedule the model was trained for."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def alphabet(self) -> Alphabet:
        """What a token is; logits have draws * size entries."""

    @abstractmethod
    def prompts(self, values: Any, names: Sequence[str]) -> Prompts:
        """What a caller asks for, as prompts; `names` are those of the pool. Raises `InputError`
        naming the first that cannot be used."""

    @abstractmethod
    def pool(self, names: Sequence[str]) -> Prompts:
        """The prompts there are to draw images for."""

    @abstractmethod
    def condition(self, prompts: Any) -> Any:
        """What these prompts say to every stage."""

    def constants(self) -> dict[str, Tensor]:
        """Buffers by name that follow from the architecture."""
        return {}

    def facts(self) -> dict[str, str]:
        """The architecture in words, as rows of a table for people."""
        sides = ", ".join(map(str, self.scales.sides))
        draws, size = self.alphabet
        return {
            "transformer": f"width {self.width}, {self.num_heads} heads",
            "tokens": f"{self.scales.num_tokens} in sides {sides}; {draws} of {size} symbols each",
        }

    @abstractmethod
    def condition_vectors(self) -> Tensor:
        """(N, C) float32: all vectors that a `ConditionLinear` may read."""

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
    with torch.device("meta"):
        return type(transformer)(transformer.arch)
