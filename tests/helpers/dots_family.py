"""A third family, wholly outside of `src`: small in every way, and other in every way it may be.

Prompts are points of the plane, a token is three draws of two symbols, a block has three pieces
whose rounding is learned, its norm feeds the attention alone, and the autoencoder has two layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.errors import InputError
from varptq.models.alphabet import Alphabet
from varptq.models.autoencoder import Autoencoder
from varptq.models.blocks import Attention, FeedForward
from varptq.models.family import ArchitectureDocument, Family, ModelPreset
from varptq.models.prompts import Prompts
from varptq.models.scales import Scales, Size
from varptq.models.seams import (
    ConditionLinear,
    Fold,
    ModulatedNorm,
    NormFold,
    Span,
    Stage,
    TokenLinear,
    spans_of,
)
from varptq.models.transformer import Transformer
from varptq.settings import Settings

# Largest side of a map in tokens.
MOST = 32
CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))


@dataclass(frozen=True)
class DotsArch:
    depth: int = 2
    width: int = 48
    num_heads: int = 3
    sides: Sequence[Any] = (1, 2, 5)
    draws: int = 3


@dataclass(frozen=True)
class PixelArch:
    patch: int = 3


@dataclass(frozen=True, eq=False)
class Points(Prompts):
    """Rows x, y and whether the point is asked for."""

    rows_B3: Tensor

    def __len__(self) -> int:
        return len(self.rows_B3)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return type(self)(self.rows_B3[rows])

    def nothing(self) -> Self:
        return type(self)(torch.zeros_like(self.rows_B3))

    def joined(self, other: Any) -> Self:
        return type(self)(torch.cat((self.rows_B3, other.rows_B3)))

    def titles(self) -> list[str]:
        return [f"({x:g}, {y:g})" if asked else "nowhere" for x, y, asked in self.facts()]

    def facts(self) -> list[Any]:
        return self.rows_B3.tolist()

    @classmethod
    def of(cls, points: Any) -> Self:
        try:
            rows = [[float(x), float(y), 1.0] for x, y in points]
        except (TypeError, ValueError):
            raise InputError(f"points {points!r}: expected pairs of numbers") from None
        return cls(torch.tensor(rows))


class DotsBlock(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm, self.ada = ModulatedNorm(), ConditionLinear(width, 2 * width, kind="ada")
        self.attn = Attention(width, num_heads, l2_norm=False)
        self.ffn, self.gate = FeedForward(width), TokenLinear(width, width, kind="gate")

    def forward(self, x: Tensor, scale_shift: Tensor, spans: list[Span], cache: Any) -> Tensor:
        scale, shift = scale_shift.unsqueeze(1).chunk(2, -1)
        x = x + self.attn(self.norm(x, scale, shift), spans, cache)
        x = x + self.ffn(x, spans)
        return x + 0.1 * self.gate(x, spans)


class Dots(Transformer):
    def __init__(self, arch: DotsArch) -> None:
        super().__init__(arch)
        width = arch.width
        self.place = nn.Parameter(torch.zeros(3, width))
        self.rows = nn.Embedding(MOST, width)
        self.columns = nn.Embedding(MOST, width)
        self.word_embed = TokenLinear(arch.draws, width, kind="word_embed", first_scale=1)
        self.blocks = nn.ModuleList(DotsBlock(width, arch.num_heads) for _ in range(arch.depth))
        self.head = TokenLinear(width, 2 * arch.draws, kind="head")

    scales = property(lambda self: Scales(self.arch.sides))  # pyright: ignore
    alphabet = property(lambda self: Alphabet(self.arch.draws, 2))  # pyright: ignore

    def prompts(self, values: Any, names: Sequence[str], encoder: Any) -> Points:
        return values if isinstance(values, Points) else Points.of(values)

    def pool(self, names: Sequence[str], encoder: Any) -> Points:
        return Points.of(CORNERS)

    def over(self, scales: Scales) -> Self:
        view = copy(self)
        view.arch = replace(self.arch, sides=scales.sides)
        return view

    def schedule(self, size: Any) -> Scales:
        """A height and a width in tokens, reached in three steps."""
        if isinstance(size, Scales):
            return size
        height, width = size
        return Scales([1, (max(1, height // 2), max(1, width // 2)), (height, width)])

    def condition(self, prompts: Points) -> Tensor:
        return prompts.rows_B3.to(self.place) @ self.place

    def condition_vectors(self, pool: Any) -> Tensor:
        return (Points.of(CORNERS).guided().rows_B3.to(self.place) @ self.place).detach().float()

    def embed(self, condition: Tensor, inputs_BLc: Tensor) -> Tensor:
        rest = self.embed_inputs(inputs_BLc, spans_of(self.scales, first=1))
        return torch.cat((self.embed_first(condition), rest), dim=1)

    def embed_first(self, condition: Tensor) -> Tensor:
        return condition.unsqueeze(1) + self._position(0)

    def embed_inputs(self, inputs_Blc: Tensor, spans: Sequence[Span]) -> Tensor:
        where = torch.cat([self._position(span.scale) for span in spans])
        return self.word_embed(inputs_Blc.to(self.dtype), spans) + where

    def _position(self, scale: int) -> Tensor:
        """(l, C): nothing is learned of a place but its row and its column."""
        height, width = (
            torch.arange(side, device=self.device) for side in self.scales.sides[scale]
        )
        return (self.rows(height)[:, None] + self.columns(width)).flatten(0, 1)

    def stages(self, condition: Tensor) -> list[Stage]:
        def run(index: int) -> Any:
            block = cast(DotsBlock, self.blocks[index])
            ada = block.ada(condition)
            return lambda x, spans, cache: block(x, ada, spans, cache[index] if cache else None)

        units = ("attn", "ffn", "gate")
        names = [f"blocks.{index}" for index in range(self.arch.depth)]
        return [
            *(
                Stage(name, run(i), (f"{name}.ada",), tuple(f"{name}.{unit}" for unit in units))
                for i, name in enumerate(names)
            ),
            Stage("head", lambda x, spans, _: self.head(x, spans), (), ("head",)),
        ]

    def input_units(self) -> list[str]:
        return ["word_embed"]

    def new_cache(self, rows: int) -> list[Any]:
        return [cast(Any, block).attn.new_cache(rows, self.scales) for block in self.blocks]

    def folds(self) -> dict[str, Fold]:
        found: dict[str, Fold] = {}
        for index, block in enumerate(cast(list[DotsBlock], list(self.blocks))):
            attention = block.attn
            biases = (attention.q_bias, cast(Tensor, attention.zero_k_bias), attention.v_bias)
            place = NormFold(attention.mat_qkv, block.ada, 0, 1, biases)
            found[f"blocks.{index}.attn.mat_qkv"] = place
            found[f"blocks.{index}.attn.proj"] = attention.fold_of_values()
        return found

    def feeds(self) -> dict[str, str]:
        pairs = (("attn.mat_qkv", "norm"), ("ffn.fc2", "ffn.act"))
        depth = range(self.arch.depth)
        return {
            f"blocks.{i}.{linear}": f"blocks.{i}.{source}"
            for i in depth
            for linear, source in pairs
        }


class Pixels(Autoencoder):
    """One layer in, one layer out; a token is the signs of three numbers."""

    ENCODING, DECODING = ("inwards",), ("outwards",)

    def __init__(self, arch: PixelArch, transformer: DotsArch) -> None:
        super().__init__()
        self.arch, self._scales, self._draws = arch, Scales(transformer.sides), transformer.draws
        self.inwards = nn.Conv2d(3, transformer.draws, arch.patch, stride=arch.patch)
        self.outwards = nn.ConvTranspose2d(transformer.draws, 3, arch.patch, stride=arch.patch)

    scales = property(lambda self: self._scales)  # pyright: ignore
    alphabet = property(lambda self: Alphabet(self._draws, 2))  # pyright: ignore
    device = property(lambda self: self.inwards.weight.device)  # pyright: ignore

    @property
    def image_size(self) -> Size:
        height, width = self.scales.last
        return height * self.arch.patch, width * self.arch.patch

    def over(self, scales: Scales) -> Self:
        view = copy(self)
        view._scales = scales
        return view

    def zeros(self, batch: int) -> Tensor:
        return self.inwards.weight.new_zeros(batch, self._draws, *self.scales.last)

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens.to(self.inwards.weight) * 2 - 1

    def add_scale(self, f_hat: Tensor, h_BlC: Tensor, scale: int) -> Tensor:
        h_BCPQ = h_BlC.transpose(1, 2).unflatten(2, self.scales.sides[scale])
        return f_hat + F.interpolate(h_BCPQ, size=self.scales.last) / 2**scale

    def next_input(self, f_hat: Tensor, scale: int) -> Tensor:
        return F.adaptive_avg_pool2d(f_hat, self.scales.sides[scale + 1]).flatten(2).transpose(1, 2)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        left, tokens = self.inwards(images_B3HW), []
        for scale, size in enumerate(self.scales.sides):
            signs = F.adaptive_avg_pool2d(left, size).flatten(2).transpose(1, 2) > 0
            tokens.append(signs.long())
            left = left - self.add_scale(self.zeros(len(left)), self.embed(tokens[-1]), scale)
        return torch.cat(tokens, 1)

    def decode_features(self, f_hat: Tensor) -> Tensor:
        return self.outwards(f_hat.to(self.outwards.weight)).clamp(-1, 1)


class DotsFields(Settings):
    depth: int = Field(ge=1, le=16)
    width: int = Field(ge=1, le=4096)
    num_heads: int = Field(ge=1, le=64)
    sides: tuple[Any, ...]
    draws: int = Field(ge=1, le=64)


class PixelFields(Settings):
    patch: int = Field(ge=1, le=64)


class DotsDocument(ArchitectureDocument):
    transformer: DotsFields
    autoencoder: PixelFields

    @classmethod
    def of(cls, transformer: DotsArch, autoencoder: PixelArch) -> Self:
        return cls(
            transformer=DotsFields(**asdict(transformer)),
            autoencoder=PixelFields(**asdict(autoencoder)),
        )

    def archs(self) -> tuple[DotsArch, PixelArch]:
        fields = {name: getattr(self.transformer, name) for name in DotsFields.model_fields}
        return DotsArch(**fields), PixelArch(self.autoencoder.patch)


def read(transformer: Path, autoencoder: Path) -> Any:
    raise NotImplementedError("this family has random weights only")


def randomize(transformer: Transformer, autoencoder: Autoencoder, generator: Any) -> None:
    with torch.no_grad():
        for parameter in (*transformer.parameters(), *autoencoder.parameters()):
            spread = 1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.normal_(0.0, spread, generator=generator)


PRESET = ModelPreset("dots", DotsArch(), PixelArch(), None, "", "", family="dots")
FAMILY = Family("dots", Dots, Pixels, DotsDocument, read, randomize, (PRESET,))
