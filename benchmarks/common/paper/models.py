"""The float models of the rows: published weights, or random ones of any shape."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.common.few_blocks import with_archs
from varptq.errors import CheckpointError, InputError
from varptq.models.family import ModelPreset
from varptq.models.infinity.schedules import schedule
from varptq.models.infinity.words import HashedWords
from varptq.models.pipeline import Pipeline, load_model
from varptq.models.presets import encoder_of, preset, resolve
from varptq.models.scales import Scales
from varptq.models.text_encoder import T5Encoder

# Rotary positions turn pairs of channels on two axes.
HEAD_STEP = 4
# The smallest published text model stands in for the larger one.
STAND_INS = {"var": "var-d16", "infinity": "infinity-125m"}


@dataclass(frozen=True)
class Shape:
    """What random models have in place of the published numbers; None leaves them.

    width: of a token. sides: of the token maps, one after another; a model with templates of its
    own takes as many maps of its square one. channels: of the autoencoder's widest map.
    """

    blocks: int | None = None
    width: int | None = None
    sides: tuple[int, ...] | None = None
    channels: int | None = None

    def archs(self, published: ModelPreset) -> tuple[Any, Any]:
        """Of transformer and autoencoder. Raises `InputError` for a width without heads."""
        arch, autoencoder = published.transformer_arch, published.autoencoder_arch
        changes: dict[str, Any] = {}
        if self.blocks is not None:
            changes["depth"] = self.blocks
        if self.sides is not None:
            texts = published.encoder is not None
            changes["scales"] = schedule(len(self.sides)) if texts else Scales(self.sides)
        if self.width is not None:
            heads = heads_of(self.width, arch.head_width)
            changes |= {"width": self.width, "num_heads": heads}
            if published.encoder is not None:
                ratio = arch.ffn_width // arch.width
                changes |= {"ffn_width": ratio * self.width, "pool_heads": heads}
        if self.channels is not None:
            autoencoder = dataclasses.replace(autoencoder, ch=self.channels)
        return dataclasses.replace(arch, **changes), autoencoder

    def build(self, name: str, dtype: torch.dtype = torch.float32) -> Pipeline:
        """The model of that name with random weights, and words in place of its text encoder."""
        published = preset(name)
        arch, autoencoder = self.archs(published)
        pipe = with_archs(published, (arch, autoencoder), dtype)
        pipe = replace(
            pipe,
            class_names=tuple(published.class_names or ()),
            sources={"var": f"random {self}", "vae": f"random {self}"},
        )
        if published.encoder is None:
            return pipe
        pipe.encoder = HashedWords(arch.text_channels, arch.text_maxlen)
        return pipe.over(arch.scales)


def heads_of(width: int, usual: int) -> int:
    """The number of heads whose width is nearest to `usual` from above. Raises `InputError`."""
    for heads in range(max(1, width // usual), 0, -1):
        if width % heads == 0 and width // heads % HEAD_STEP == 0:
            return heads
    raise InputError(f"width {width}: expected a multiple of {HEAD_STEP}")


class Source(Protocol):
    """Where float models come from."""

    @property
    def kind(self) -> str:
        """What tells this source's results from another's."""
        ...

    def check(self, name: str) -> str:
        """What `load` will read, in words. Raises `CheckpointError` where it is not there."""
        ...

    def stands_for(self, name: str) -> str:
        """The name of the model that `load` gives."""
        ...

    def archs(self, published: ModelPreset) -> tuple[Any, Any]:
        """The architectures that a model of this name has."""
        ...

    def load(self, name: str) -> Pipeline:
        """The model `name`, or what stands in for it."""
        ...


@dataclass(frozen=True)
class Random:
    """Random weights of one shape. stands_in: for every model of a family the same one does."""

    shape: Shape
    stands_in: bool = True
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def kind(self) -> str:
        return f"random {self.shape}"

    def check(self, name: str) -> str:
        arch, _ = self.archs(preset(self.stands_for(name)))
        name = self.stands_for(name)
        return f"random weights of {name}, {arch.depth} blocks of width {arch.width}"

    def stands_for(self, name: str) -> str:
        return STAND_INS[preset(name).family] if self.stands_in else name

    def archs(self, published: ModelPreset) -> tuple[Any, Any]:
        return self.shape.archs(published)

    def load(self, name: str) -> Pipeline:
        pipe = self.shape.build(self.stands_for(name))
        return pipe.to(device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Published:
    """Checkpoints under their published names in `folder`, or from the hub where that is None.
    encoder: a T5 in a folder, in place of the published one."""

    folder: Path | None = None
    encoder: str | None = None
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def kind(self) -> str:
        return "published"

    def check(self, name: str) -> str:
        if self.folder is None:
            files = resolve(name, download=True)
            return f"{files[0].name} and {files[1].name} of {preset(name).repo}"
        found = self._files(name)
        missing = [path for path in found if not path.is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder}: no {missing[0].relative_to(self.folder)}, one of the two "
                f"files of {name}; put it there, or leave out --weights to take it from the hub"
            )
        return " and ".join(str(path) for path in found)

    def stands_for(self, name: str) -> str:
        return name

    def archs(self, published: ModelPreset) -> tuple[Any, Any]:
        return published.transformer_arch, published.autoencoder_arch

    def load(self, name: str) -> Pipeline:
        """Raises `CheckpointError` for weights of another model than their file is named after."""
        published, device, dtype = preset(name), self.device, self.dtype
        if self.folder is None:
            pipe = load_model(name, download=True, device=device, dtype=dtype)
        else:
            var, vae = self._files(name)
            pipe = load_model(var=var, vae=vae, device=device, dtype=dtype).sized(published.size)
            names = tuple(published.class_names or ())
            pipe = replace(pipe, name=name, class_names=names)
            pipe.encoder = encoder_of(name, download=True)
        if self.encoder is not None and pipe.encoder is not None:
            pipe.encoder = T5Encoder(self.encoder, device=pipe.device)
        self._check_arch(pipe, published)
        return pipe

    def _files(self, name: str) -> tuple[Path, Path]:
        assert self.folder is not None
        published = preset(name)
        return self.folder / published.transformer_file, self.folder / published.autoencoder_file

    def _check_arch(self, pipe: Pipeline, published: ModelPreset) -> None:
        for field in ("depth", "width"):
            found, expected = (
                getattr(arch, field) for arch in (pipe.var.arch, published.transformer_arch)
            )
            if found != expected:
                raise CheckpointError(
                    f"{published.transformer_file}: {field} {found}, expected {expected} of "
                    f"{published.name}; the file is another model's"
                )
