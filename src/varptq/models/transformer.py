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

from varptq.models.scales import Scales
from varptq.models.seams import Fold, Span, Stage


class Transformer(nn.Module):
    """A next-scale transformer made from `arch` alone, with these properties and methods."""

    arch: Any

    @property
    @abstractmethod
    def width(self) -> int:
        """C, channels of the residual stream."""

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

    @abstractmethod
    def condition(self, labels_B: Tensor) -> Any:
        """What these conditions say to every stage."""

    @abstractmethod
    def condition_vectors(self) -> Tensor:
        """(N, C) float32: all vectors that a `ConditionLinear` may read."""

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
