"""The architectures of Infinity and its autoencoder as plain, capped values, for an artifact."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from varptq.models.convolutions import NORM_GROUPS, OTHER_GROUPS
from varptq.models.family import ArchitectureDocument
from varptq.models.infinity.bsqvae import BSQVAEArch
from varptq.models.infinity.transformer import InfinityArch
from varptq.models.rotary import QUANTUM
from varptq.models.scales import Scales
from varptq.settings import Settings

# Far above any model of this family, and small enough that empty modules are built in seconds.
Size = Annotated[int, Field(ge=1, le=2**20)]
Few = Annotated[int, Field(ge=1, le=128)]
Bits = Annotated[int, Field(ge=1, le=4096)]
Side = Annotated[int, Field(ge=1, le=1024)]
Sides = Annotated[tuple[tuple[Side, Side], ...], Field(min_length=1, max_length=64)]


class TransformerFields(Settings):
    """`InfinityArch` as plain values; `scales` are height and width of the token maps, `grid` of
    the map that positions are laid over."""

    depth: Few
    width: Size
    num_heads: Few
    ffn_width: Size
    token_bits: Bits
    text_channels: Size
    text_maxlen: Size
    pool_heads: Few
    levels: Few
    scales: Sides
    grid: tuple[Side, Side] | None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.num_heads or self.width // self.num_heads % QUANTUM:
            raise ValueError(
                f"width {self.width} does not divide into {self.num_heads} heads of a multiple of "
                f"{QUANTUM} channels"
            )
        if self.width % self.pool_heads:
            raise ValueError(
                f"width {self.width} does not divide into {self.pool_heads} pool heads"
            )
        if len(self.scales) > self.levels:
            raise ValueError(f"{len(self.scales)} scales and {self.levels} levels")
        return self

    @classmethod
    def of(cls, arch: InfinityArch) -> Self:
        values: dict[str, Any] = {
            **asdict(arch),
            "scales": arch.scales.sides,
            "grid": arch.scales.grid,
        }
        return cls(**values)

    def arch(self) -> InfinityArch:
        values: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        values["scales"] = Scales(self.scales, values.pop("grid"))
        return InfinityArch(**values)


class AutoencoderFields(Settings):
    """`BSQVAEArch` as plain values; it never has attention."""

    ch: Annotated[int, Field(ge=1, le=2**13)]
    ch_mult: Annotated[tuple[Few, ...], Field(min_length=1, max_length=10)]
    num_res_blocks: Annotated[int, Field(ge=1, le=8)]
    code_dim: Bits
    patchify: bool

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        widths = [self.ch * multiple for multiple in (1, *self.ch_mult)]
        if any(width % NORM_GROUPS and width % OTHER_GROUPS for width in widths):
            raise ValueError(f"channels are not multiples of {NORM_GROUPS} or {OTHER_GROUPS}")
        return self

    @classmethod
    def of(cls, arch: BSQVAEArch) -> Self:
        return cls(**{name: getattr(arch, name) for name in cls.model_fields})

    def arch(self) -> BSQVAEArch:
        return BSQVAEArch(**{name: getattr(self, name) for name in type(self).model_fields})


class InfinityDocument(ArchitectureDocument):
    """Both networks; their bits must agree."""

    transformer: TransformerFields
    autoencoder: AutoencoderFields

    @model_validator(mode="after")
    def _pair(self) -> Self:
        of_vae = self.autoencoder.arch().token_bits
        if self.transformer.token_bits != of_vae:
            raise ValueError(
                f"token_bits {self.transformer.token_bits}, {of_vae} in the autoencoder"
            )
        return self

    @classmethod
    def of(cls, transformer: InfinityArch, autoencoder: BSQVAEArch) -> Self:
        return cls(
            transformer=TransformerFields.of(transformer),
            autoencoder=AutoencoderFields.of(autoencoder),
        )

    def archs(self) -> tuple[InfinityArch, BSQVAEArch]:
        return self.transformer.arch(), self.autoencoder.arch()
