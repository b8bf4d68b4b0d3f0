"""A family of models as everything above `models` sees it: one row of the table in
`families.py`."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from varptq.models.autoencoder import Autoencoder
from varptq.models.transformer import Transformer
from varptq.models.wrappers import Part
from varptq.settings import Settings


class ArchitectureDocument(Settings):
    """Both architectures as plain, capped values: what an artifact stores of them. The caps keep a
    hostile file from asking for a model that cannot be built. A constructor raises `ConfigError`
    for values that fit no model of the family."""

    @classmethod
    @abstractmethod
    def of(cls, transformer: Any, autoencoder: Any) -> Self:
        """The document of two architectures."""

    @abstractmethod
    def archs(self) -> tuple[Any, Any]:
        """The architectures of the transformer and of the autoencoder."""

    def num_names(self) -> int | None:
        """How many names the prompts of the pool must have, if they have names; None: any
        number."""
        return None


@dataclass(frozen=True)
class ModelPreset:
    """One published pair of networks. `repo` None: the files are in the package. `licence`: of the
    weights, as SPDX calls it; None where it is not known. `size`: of the
    images it is for, where its tensors do not say; None is what the family takes then. `encoder`: a
    `TextEncoder` for its prompts, maybe with a download."""

    name: str
    transformer_arch: Any
    autoencoder_arch: Any
    repo: str | None
    transformer_file: str
    autoencoder_file: str
    class_names: tuple[str, ...] | None = None
    family: str = "var"
    licence: str | None = None
    size: Any = None
    encoder: Callable[[bool], Any] | None = None


class FileNames(NamedTuple):
    """What people call the two files of a model, so that they are found in a folder: how each name
    begins, in lower case."""

    transformer: re.Pattern[str]
    autoencoder: re.Pattern[str]


@dataclass(frozen=True)
class Family:
    """How the models of a family are made.

    transformer, autoencoder: from their architecture, the latter from the transformer's too. read:
    both networks from two checkpoint files, floating tensors in a dtype, or as they are on the
    mapped file, raising `CheckpointError`.
    randomize: fills both with the values of a fresh model; what is on the meta device becomes real.
    randomize_parts: the same, giving each module of the transformer once it has its values, so that
    whoever takes them need not hold them all; None for a family without large models.
    part: what the transformer is among the networks that checkpoints hold (wrappers.py).
    file_names: None for a family that has no files. reads_texts: whether its prompts are texts.
    """

    name: str
    transformer: Callable[[Any], Transformer]
    autoencoder: Callable[[Any, Any], Autoencoder]
    document: type[ArchitectureDocument]
    read: Callable[[Path, Path, torch.dtype | None], tuple[Transformer, Autoencoder]]
    randomize: Callable[[Transformer, Autoencoder, torch.Generator], None]
    presets: tuple[ModelPreset, ...] = ()
    part: Part | None = None
    randomize_parts: (
        Callable[[Transformer, Autoencoder, torch.Generator], Iterator[nn.Module]] | None
    ) = None
    file_names: FileNames | None = None
    reads_texts: bool = False

    def build(
        self, transformer_arch: Any, autoencoder_arch: Any
    ) -> tuple[Transformer, Autoencoder]:
        """Both networks, their values not set."""
        transformer = self.transformer(transformer_arch)
        return transformer, self.autoencoder(autoencoder_arch, transformer_arch)
