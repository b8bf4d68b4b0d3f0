"""The architectures of VAR and its VQVAE as plain, capped values, for an artifact."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from varptq.models.convolutions import NORM_GROUPS
from varptq.models.family import ArchitectureDocument
from varptq.models.scales import Scales
from varptq.models.var.transformer import VARArch
from varptq.models.var.vqvae import VQVAEArch
from varptq.settings import Settings

# Far above any model of this family, and small enough that empty modules are built in seconds.
Size = Annotated[int, Field(ge=1, le=2**20)]
Few = Annotated[int, Field(ge=1, le=128)]
Side = Annotated[int, Field(ge=1, le=1024)]
Sides = Annotated[tuple[Side, ...], Field(min_length=1, max_length=64)]


class TransformerFields(Settings):
    """`VARArch` as plain values; `scales` are the sides of the token maps."""

    num_classes: Size
    depth: Few
    width: Size
    num_heads: Size
    scales: Sides
    codebook_size: Size
    code_dim: Size
    l2_norm: bool
    shared_adaln: bool

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} does not divide into {self.num_heads} heads")
        return self

    @classmethod
    def of(cls, arch: VARArch) -> Self:
        values: dict[str, Any] = {**asdict(arch), "scales": arch.scales.plain()}
        return cls(**values)

    def arch(self) -> VARArch:
        values: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        values["scales"] = Scales(self.scales)
        return VARArch(**values)


class AutoencoderFields(Settings):
    """`VQVAEArch` as plain values."""

    ch: Annotated[int, Field(ge=1, le=2**13)]
    ch_mult: Annotated[tuple[Few, ...], Field(min_length=1, max_length=10)]
    num_res_blocks: Annotated[int, Field(ge=1, le=8)]
    code_dim: Size
    codebook_size: Size
    num_phi: Few
    attn_levels: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=10)]
    mid_attn: bool
    quant_kernel: Annotated[int, Field(ge=1, le=15)]
    hit_scales: Annotated[int, Field(ge=0, le=256)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if any(self.ch * multiple % NORM_GROUPS for multiple in (1, *self.ch_mult)):
            raise ValueError(f"channels are not multiples of {NORM_GROUPS}")
        if any(level >= len(self.ch_mult) for level in self.attn_levels):
            raise ValueError(f"attn_levels {self.attn_levels} beyond {len(self.ch_mult)} levels")
        return self

    @classmethod
    def of(cls, arch: VQVAEArch) -> Self:
        return cls(**asdict(arch))

    def arch(self) -> VQVAEArch:
        return VQVAEArch(**{name: getattr(self, name) for name in type(self).model_fields})


class VARDocument(ArchitectureDocument):
    """Both networks; they must share the codebook."""

    transformer: TransformerFields
    autoencoder: AutoencoderFields

    @model_validator(mode="after")
    def _pair(self) -> Self:
        for field in ("codebook_size", "code_dim"):
            if getattr(self.transformer, field) != getattr(self.autoencoder, field):
                raise ValueError(f"{field} differs between transformer and autoencoder")
        return self

    @classmethod
    def of(cls, transformer: VARArch, autoencoder: VQVAEArch) -> Self:
        return cls(
            transformer=TransformerFields.of(transformer),
            autoencoder=AutoencoderFields.of(autoencoder),
        )

    def archs(self) -> tuple[VARArch, VQVAEArch]:
        return self.transformer.arch(), self.autoencoder.arch()

    def num_names(self) -> int:
        return self.transformer.num_classes
