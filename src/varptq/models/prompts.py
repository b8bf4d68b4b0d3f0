"""Prompts: what a model is asked to draw, one per image.

A `Prompts` is a batch of them. A transformer makes one from what a caller writes (`prompts`) and
lists those that calibration and evaluation may draw (`pool`); only its own `condition` looks
inside. The rules that pick prompts from the pool are here, as functions of its size and a seed.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from varptq.errors import InputError
from varptq.models.class_names import MAX_CHARACTERS, UNCONDITIONAL, place_of, title_of

# What a picture of a class should fit.
CAPTION = "a photo of a {}"


class Prompts(ABC):
    """A batch of prompts. Rows are chosen as those of a tensor are, by a slice or by indices.

    NEGATIVE: whether others can take the place of nothing.
    """

    NEGATIVE: ClassVar[bool] = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, rows: slice | Tensor) -> Self: ...

    @abstractmethod
    def nothing(self) -> Self:
        """As many prompts that ask for nothing: the second half of the rows guidance needs."""

    @abstractmethod
    def joined(self, other: Any) -> Self:
        """These, then those of the same kind."""

    @abstractmethod
    def titles(self) -> list[str]:
        """A name for each, for people."""

    @abstractmethod
    def facts(self) -> list[Any]:
        """A plain value for each, to be stored beside its image."""

    def captions(self) -> list[str]:
        """A text for each that its picture should fit; empty where there are none."""
        return []

    def arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays, to be stored beside what was made of these."""
        return {"labels": np.array(self.facts())}

    def sha256(self) -> str:
        """Of what they ask for, in order."""
        return hashlib.sha256(repr(self.facts()).encode()).hexdigest()

    def instead_of(self, negative: Any) -> Self:
        """The same with others that take the place of nothing: one for all, or one each. Only where
        `NEGATIVE` says so. Raises `InputError` for another number of them."""
        raise NotImplementedError

    @property
    def has_negative(self) -> bool:
        """Whether others take the place of nothing."""
        return False

    def guided(self) -> Self:
        """The rows that guidance needs, in the order `sampling.guided` takes them: all that is
        asked for, then nothing as often."""
        return self.joined(self.nothing())

    def split(self, size: int) -> list[Self]:
        """Batches of `size`, the last one smaller."""
        return [self[slice(start, start + size)] for start in range(0, len(self), size)]


@dataclass(frozen=True, eq=False)
class ClassPrompts(Prompts):
    """Class ids (B,) int64 on the CPU, `num_classes` meaning none, of classes with these names (as
    class_names.py has them) or without names."""

    labels_B: Tensor
    num_classes: int
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels_B)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return self._of(self.labels_B[rows])

    def nothing(self) -> Self:
        return self._of(torch.full_like(self.labels_B, self.num_classes))

    def joined(self, other: ClassPrompts) -> Self:
        return self._of(torch.cat((self.labels_B, other.labels_B)))

    def titles(self) -> list[str]:
        return [self._title(label) for label in self.labels_B.tolist()]

    def facts(self) -> list[Any]:
        """Class ids."""
        return self.labels_B.tolist()

    def captions(self) -> list[str]:
        """Of the class names, as CLIP is asked for them."""
        if not self.names:
            return []
        return [CAPTION.format(title.replace("_", " ")) for title in self.titles()]

    def _title(self, label: int) -> str:
        if label == self.num_classes:
            return UNCONDITIONAL
        return title_of(self.names[label]) if self.names else f"class {label}"

    def _of(self, labels_B: Tensor) -> Self:
        return type(self)(labels_B, self.num_classes, self.names)

    @classmethod
    def pool(cls, num_classes: int, names: Sequence[str]) -> Self:
        """Every class once."""
        labels_B = torch.arange(num_classes, dtype=torch.int64, device="cpu")
        return cls(labels_B, num_classes, tuple(names))

    @classmethod
    def _own(cls, prompts: Prompts, num_classes: int) -> Self:
        if not isinstance(prompts, cls):
            raise InputError("prompts: these are texts, but this model is asked for classes")
        if prompts.num_classes != num_classes:
            raise InputError(
                f"prompts: of {prompts.num_classes} classes, expected {num_classes}; make them "
                "with this model"
            )
        return prompts

    @classmethod
    def parse(cls, values: Any, num_classes: int, names: Sequence[str]) -> Self:
        """Class ids and names as a caller writes them, "unconditional" being one of every model, or
        prompts of a model with as many classes. Raises `InputError` naming the first that does not
        exist."""
        if isinstance(values, Prompts):
            return cls._own(values, num_classes)
        values = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
        # A lone name would pass as a sequence of letters.
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise InputError(f"labels: {values!r}, expected a list of class ids and names")
        labels = [_label(value, num_classes, names) for value in values]
        if not labels:
            raise InputError("labels: empty; give at least one class")
        labels_B = torch.tensor(labels, dtype=torch.int64, device="cpu")
        return cls(labels_B, num_classes, tuple(names))


def _label(value: Any, num_classes: int, names: Sequence[str]) -> int:
    if isinstance(value, str) and not value.removeprefix("-").isdecimal():
        return _label_of_name(value, num_classes, names)
    if isinstance(value, bool) or not isinstance(value, Integral | str):
        raise InputError(f"class {value!r}: expected an id or a name, got {type(value).__name__}")
    # Python converts no text of thousands of digits.
    known = not isinstance(value, str) or len(value) <= MAX_CHARACTERS
    if not known or not 0 <= int(value) < num_classes:
        raise InputError(f"class {value!s:.{MAX_CHARACTERS}}: not in 0..{num_classes - 1}")
    return int(value)


def _label_of_name(name: str, num_classes: int, names: Sequence[str]) -> int:
    if name == UNCONDITIONAL:
        return num_classes
    if not names:
        raise InputError(f"class {name!r}: there are no class names; give an id")
    return place_of(name, names)


def listed(value: Any) -> Any:
    """A single prompt, a string or an array (tokens, channels), as a list of one."""
    single = isinstance(value, str) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 2)
    return [value] if single else value


def dealt(size: int, count: int, seed: int) -> Tensor:
    """(count,) int64 places in a pool of `size`, distinct ones in random order; a smaller pool is
    gone through again, each time in another order. For calibration."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // size)
    order = [
        torch.randperm(size, generator=generator, dtype=torch.int64, device="cpu")
        for _ in range(rounds)
    ]
    return torch.cat(order)[:count]


def balanced(size: int, count: int, seed: int) -> Tensor:
    """(count,) int64: one random order of the pool, repeated, so that the place of an image does
    not depend on how many are asked for. For evaluation."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator, dtype=torch.int64, device="cpu")
    return order.repeat(-(-count // size))[:count]


def spread(size: int, count: int) -> Tensor:
    """(count,) int64 ascending places, spread evenly over the pool. For sensitivities."""
    return torch.arange(count, dtype=torch.int64, device="cpu") * size // count
