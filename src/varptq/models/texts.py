"""Texts as a model is asked for them: features of a text encoder, one array (T, D) per prompt.

Features come first: a list of arrays, or a file of them (prompt_files.py). Where a `TextEncoder` is
there, strings do as well. No padded row is ever kept, as it would change what a model makes of the
text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from varptq.errors import InputError
from varptq.models.class_names import UNCONDITIONAL
from varptq.models.prompts import Prompts

# Name of the array of numbers of tokens, here and in files.
LENGTHS = "lengths"
NEGATIVE = "negative prompt"
# Beyond any prompt that is meant as one, and below what a text encoder reads whole (512 tokens).
MAX_CHARACTERS = 4000


class TextEncoder(Protocol):
    """Turns texts into features; a plain object, no module of the transformer."""

    def features(self, texts: Sequence[str]) -> list[Tensor]:
        """One (T, D) float tensor per text, T >= 1, without padding."""
        ...


@dataclass(frozen=True, eq=False)
class TextRow:
    """One prompt. features: (T, D) float32 on the CPU, None for nothing, which is as long as what
    it stands beside. negative: what takes the place of nothing."""

    features_TD: Tensor | None
    length: int
    text: str | None = None
    negative: TextRow | None = None

    def nothing(self) -> TextRow:
        return self.negative or TextRow(None, self.length)

    @property
    def title(self) -> str:
        if self.features_TD is None:
            return UNCONDITIONAL
        return self.text or f"{self.length} tokens"


@dataclass(frozen=True, eq=False)
class TextPrompts(Prompts):
    """A batch of texts by their features."""

    NEGATIVE: ClassVar[bool] = True

    rows: tuple[TextRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        if isinstance(rows, slice):
            return type(self)(self.rows[rows])
        numbers = torch.arange(len(self.rows), dtype=torch.int64, device="cpu")[rows.cpu()]
        return type(self)(tuple(self.rows[number] for number in numbers.tolist()))

    def nothing(self) -> Self:
        return type(self)(tuple(row.nothing() for row in self.rows))

    def joined(self, other: TextPrompts) -> Self:
        return type(self)((*self.rows, *other.rows))

    def titles(self) -> list[str]:
        return [row.title for row in self.rows]

    def facts(self) -> list[Any]:
        """Text, where it is known, and number of tokens."""
        return [{"text": row.text, "tokens": row.length} for row in self.rows]

    def captions(self) -> list[str]:
        return [row.text for row in self.rows if row.text is not None]

    def arrays(self) -> dict[str, np.ndarray]:
        """Texts, "" where there is none, and numbers of tokens."""
        lengths = [row.length for row in self.rows]
        texts = np.array([row.text or "" for row in self.rows])
        return {"texts": texts, LENGTHS: np.array(lengths, dtype=np.int64)}

    def sha256(self) -> str:
        """Of all features, in order; negative ones too."""
        state = hashlib.sha256()
        for row in self.rows:
            for features in (row.features_TD, row.negative and row.negative.features_TD):
                shape = None if features is None else tuple(features.shape)
                state.update(f"{shape};".encode())
                if features is not None:
                    state.update(features.contiguous().numpy().tobytes())
        return state.hexdigest()

    @property
    def has_negative(self) -> bool:
        return any(row.negative is not None for row in self.rows)

    def instead_of(self, negative: TextPrompts) -> Self:
        if len(negative) not in (1, len(self)):
            raise InputError(
                f"negative: {len(negative)} prompts, expected one for all or {len(self)}, one each"
            )
        rows = negative.rows * (len(self) if len(negative) == 1 else 1)
        pairs = zip(self.rows, rows, strict=True)
        return type(self)(tuple(replace(row, negative=other) for row, other in pairs))

    def check(self, channels: int, longest: int) -> None:
        """Raises `InputError` for the first row that a model with texts of so many channels and at
        most `longest` tokens cannot read."""
        for number, row in enumerate(self.rows):
            negative = row.negative and row.negative.features_TD
            for what, features in (("prompt", row.features_TD), (NEGATIVE, negative)):
                if features is not None and features.shape[1] != channels:
                    raise InputError(
                        f"{what} {number}: features of {features.shape[1]} channels, expected "
                        f"{channels}; use the text encoder that the model was trained with"
                    )
                length = row.length if features is None else len(features)
                if length > longest:
                    raise InputError(
                        f"{what} {number}: {length} tokens, expected at most {longest}; shorten it"
                    )

    @classmethod
    def of(cls, features: Iterable[Any], texts: Sequence[str | None] | None = None) -> Self:
        """From one (T, D) array or tensor per prompt. Raises `InputError` naming the first that
        cannot be used."""
        found = [_features(value, f"prompt {number}") for number, value in enumerate(features)]
        names = [None] * len(found) if texts is None else list(texts)
        if len(names) != len(found):
            raise InputError(f"texts: {len(names)}, expected {len(found)}, one for each prompt")
        pairs = zip(found, names, strict=True)
        return cls(tuple(TextRow(row, len(row), text) for row, text in pairs))

    @classmethod
    def parse(cls, values: Any, encoder: TextEncoder | None) -> Self:
        """Prompts as they are, or features and strings as a caller writes them. Raises
        `InputError`."""
        if isinstance(values, cls):
            return values
        scalar = isinstance(values, Tensor | np.ndarray) and not values.ndim
        if isinstance(values, str | Prompts) or scalar or not isinstance(values, Iterable):
            raise InputError(f"prompts: {values!r:.60}, expected a list of features or of strings")
        listed: list[Any] = list(values)
        if not listed:
            raise InputError("prompts: empty; give at least one")
        texts = [value if isinstance(value, str) else None for value in listed]
        asked = [text for text in texts if text is not None]
        for number, text in enumerate(texts):
            if text is not None and len(text) > MAX_CHARACTERS:
                raise InputError(
                    f"prompt {number}: {text[:40]!r}... has {len(text)} characters, expected at "
                    f"most {MAX_CHARACTERS}; shorten it"
                )
        if asked and encoder is None:
            raise InputError(
                f"prompt {asked[0]!r:.60}: there is no text encoder; install varptq[text] and set "
                "pipe.encoder = varptq.T5Encoder(folder) (--encoder DIR), or give features "
                "(tokens, channels) in place of strings"
            )
        encoded = iter(encoder.features(asked)) if asked and encoder else iter(())
        features = [
            value if text is None else next(encoded)
            for value, text in zip(listed, texts, strict=True)
        ]
        return cls.of(features, texts)


def _features(value: Any, what: str) -> Tensor:
    """(T, D) float32 on the CPU."""
    if not isinstance(value, Tensor | np.ndarray):
        raise InputError(f"{what}: a {type(value).__name__}, expected features (tokens, channels)")
    features = numbers(value, what)
    if features.dim() != 2 or not features.is_floating_point():
        raise InputError(
            f"{what}: {features.dtype} of shape {tuple(features.shape)}, expected floating point "
            "of shape (tokens, channels)"
        )
    if len(features) == 0:
        raise InputError(f"{what}: has no tokens, expected one at least; an empty text has one")
    # In the dtype that is read: what is beyond its range is infinite there.
    features = features.float()
    if not bool(features.isfinite().all()):
        raise InputError(f"{what}: features hold NaN or infinity, expected finite numbers")
    return features


def numbers(value: Tensor | np.ndarray, what: str) -> Tensor:
    """An array of any byte order and strides as a tensor on the CPU. Raises `InputError` for one of
    no numbers that torch has."""
    try:
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value, value.dtype.newbyteorder("=")).reshape(value.shape)
        return torch.as_tensor(value, dtype=None, device="cpu").detach()
    except (TypeError, ValueError):
        raise InputError(f"{what}: of {value.dtype}, expected numbers of 64 bits at most") from None
