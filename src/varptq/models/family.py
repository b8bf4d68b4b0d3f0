"""What a family is to everything above `models`: one row of the table in `families.py`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from varptq.models.autoencoder import Autoencoder
from varptq.models.transformer import Transformer
from varptq.settings import Settings


class ArchitectureDocument(Settings):
    """Both architectures as plain, capped values: what an artifact stores of them. The caps keep a
    hostile file from asking for a model that cannot be built. A constructor raises `ConfigError`
    for values that fit no model of the family."""

    @classmethod
    @abstractmethod
    def of(cls, transformer: Any, autoencoder: Any) -> Self:
        """Of two architectures."""

    @abstractmethod
    def archs(self) -> tuple[Any, Any]:
        """The architectures of the transformer and of the autoencoder."""

    def num_names(self) -> int | None:
        """How many names the pool has where it has any; None: any number."""
        return None


@dataclass(frozen=True)
class ModelPreset:
    """One published pair of networks. `repo` None: the files are in the package."""

    name: str
    transformer_arch: Any
    autoencoder_arch: Any
    repo: str | None
    transformer_file: str
    autoencoder_file: str
    class_names: tuple[str, ...] | None = None
    family: str = "var"


@dataclass(frozen=True)
class Family:
    """How the models of a family are made.

    transformer, autoencoder: from their architecture, the latter from the transformer's too. read:
    both networks from two checkpoint files, raising `CheckpointError`. randomize: fills both with
    the values of a fresh model.
    """

    name: str
    transformer: Callable[[Any], Transformer]
    autoencoder: Callable[[Any, Any], Autoencoder]
    document: type[ArchitectureDocument]
    read: Callable[[Path, Path], tuple[Transformer, Autoencoder]]
    randomize: Callable[[Transformer, Autoencoder, torch.Generator], None]
    presets: tuple[ModelPreset, ...] = ()

    def build(
        self, transformer_arch: Any, autoencoder_arch: Any
    ) -> tuple[Transformer, Autoencoder]:
        """Both networks without values worth having."""
        transformer = self.transformer(transformer_arch)
        return transformer, self.autoencoder(autoencoder_arch, transformer_arch)
