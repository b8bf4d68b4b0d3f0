"""Inputs of units that are more than one tensor: rows are chosen as those of a tensor are, and what
depends on their texts is made when they are asked for.

Texts are of different lengths, so nothing made of them is stored: a step reads a few rows, whose
texts cost little beside a unit over all tokens of an image. R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from varptq.models.cross import TextGroup


class Inputs(Protocol):
    """Rows of inputs; a tensor (rows, ...) is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows_R: Tensor, /) -> Any: ...


@dataclass(frozen=True)
class TokensAndMore:
    """Tokens (rows, L, C), and what else a unit is called with for some of the rows."""

    tokens: Tensor
    arguments: Callable[[Tensor], tuple[Any, ...]]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows_R: Tensor) -> tuple[Any, ...]:
        """The tokens of these rows (R, L, C), then the rest."""
        return (self.tokens[rows_R], *self.arguments(rows_R))


@dataclass(frozen=True)
class Texts:
    """The texts of `count` rows alone."""

    count: int
    groups: Callable[[Tensor], tuple[TextGroup, ...]]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows_R: Tensor) -> tuple[TextGroup, ...]:
        """In groups of one length, numbered within these rows."""
        return self.groups(rows_R)
