"""The VAR transformer (Tian et al., NeurIPS 2024), float, with seams where quantizers go.

A pass is the list of `stages`: the blocks, the norm before the head, the head.

Shapes: B rows, L tokens, l tokens of one scale, K scales, C width, H heads, c head width, V
codebook.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.models.alphabet import Alphabet
from varptq.models.blocks import Block, HeadNorm, ada_lin
from varptq.models.prompts import ClassPrompts
from varptq.models.scales import Scales
from varptq.models.seams import (
    ConditionLinear,
    Fold,
    NormFold,
    Span,
    Stage,
    TokenLinear,
    memoized,
    spans_of,
)
from varptq.models.transformer import Transformer

INIT_STD = 0.02


@dataclass(frozen=True)
class VARArch:
    """What the tensors of a checkpoint say about the transformer (docs/method.md section 1)."""

    num_classes: int
    depth: int
    width: int
    num_heads: int
    scales: Scales
    codebook_size: int
    code_dim: int
    l2_norm: bool
    shared_adaln: bool

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


class Condition(NamedTuple):
    """All that depends on the class alone: its embedding, and the input of `Block.modulation`."""

    class_BC: Tensor
    shared: Tensor


class VAR(Transformer):
    """Next-scale transformer, upstream's parameter names. Conditions are classes."""

    def __init__(self, arch: VARArch) -> None:
        super().__init__(arch)
        width, scales = arch.width, arch.scales
        self.class_emb = nn.Embedding(arch.num_classes + 1, width, dtype=torch.float32)
        self.pos_start = nn.Parameter(torch.zeros(1, scales.lengths[0], width, dtype=torch.float32))
        self.pos_1LC = nn.Parameter(torch.zeros(1, scales.num_tokens, width, dtype=torch.float32))
        self.lvl_embed = nn.Embedding(scales.num_scales, width, dtype=torch.float32)
        # The first scale starts from the class. A model of one scale has this layer all the same.
        first = min(1, scales.num_scales - 1)
        self.word_embed = TokenLinear(arch.code_dim, width, kind="word_embed", first_scale=first)
        if arch.shared_adaln:
            self.shared_ada_lin = ada_lin(width, 6, kind="shared_ada_lin")
        numbers = {"l2_norm": arch.l2_norm, "shared_adaln": arch.shared_adaln}
        self.blocks = nn.ModuleList(
            Block(width, arch.num_heads, **numbers) for _ in range(arch.depth)
        )
        self.head_nm = HeadNorm(width)
        self.head = TokenLinear(width, arch.codebook_size, kind="head")
        self.register_buffer("lvl_1L", scales.scale_of_L().view(1, -1).to(self.pos_1LC.device))

    @property
    def alphabet(self) -> Alphabet:
        return Alphabet(1, self.arch.codebook_size)

    def prompts(self, values: Any, names: Sequence[str], encoder: Any) -> ClassPrompts:
        return ClassPrompts.parse(values, self.arch.num_classes, names)

    def pool(self, names: Sequence[str], encoder: Any) -> ClassPrompts:
        return ClassPrompts.pool(self.arch.num_classes, names)

    @property
    def num_prompts(self) -> int:
        return self.arch.num_classes

    def facts(self) -> dict[str, str]:
        arch = self.arch
        return {
            "transformer": f"depth {arch.depth}, width {arch.width}, {arch.num_heads} heads, "
            f"{arch.num_classes} classes",
            "tokens": f"{self.scales.num_tokens} in sides {self.scales}; "
            f"codebook {arch.codebook_size} x {arch.code_dim}",
        }

    def constants(self) -> dict[str, Tensor]:
        return {"lvl_1L": self.scales.scale_of_L().view(1, -1)}

    def condition(self, prompts: ClassPrompts | Tensor) -> Condition:
        """What the stages need to know of these classes, given as prompts or labels (B,)."""
        labels_B = prompts.labels_B if isinstance(prompts, ClassPrompts) else prompts
        class_BC = self.class_emb(labels_B.to(self.device))
        if not self.arch.shared_adaln:
            return Condition(class_BC, class_BC)
        return Condition(class_BC, self.shared_ada_lin(class_BC).unflatten(-1, (1, 6, -1)))

    def condition_vectors(self, pool: Any) -> Tensor:
        """(classes + 1, C) float32: all that a `ConditionLinear` may read."""
        return F.silu(self.class_emb.weight.detach().float())

    def stages(self, condition: Condition) -> list[Stage]:
        """The pass behind the embedding. The AdaLN vectors of a stage are computed when it first
        runs, so a list kept for an image computes them once."""
        return [
            *(self._block_stage(index, condition.shared) for index in range(self.arch.depth)),
            self._norm_stage(condition.class_BC),
            Stage("head", lambda x, spans, _: self.head(x, spans), (), ("head",)),
        ]

    def _block_stage(self, index: int, shared: Tensor) -> Stage:
        name, block = f"blocks.{index}", cast(Block, self.blocks[index])
        modulation = memoized(lambda: block.modulation(shared))
        own = () if self.arch.shared_adaln else (f"{name}.ada_lin.1",)
        return Stage(
            name,
            lambda x, spans, cache: block(x, modulation(), spans, cache[index] if cache else None),
            own,
            (f"{name}.attn", f"{name}.ffn"),
            prepare=modulation,
        )

    def _norm_stage(self, class_BC: Tensor) -> Stage:
        modulation = memoized(lambda: self.head_nm.modulation(class_BC))
        return Stage(
            "head_nm",
            lambda x, *_: self.head_nm(x, modulation()),
            ("head_nm.ada_lin.1",),
            prepare=modulation,
        )

    def input_units(self) -> list[str]:
        """Linears that run before the stages and whose rounding is learned on its own."""
        tokens = ["word_embed"] if self.scales.num_scales > 1 else []
        return [*tokens, "shared_ada_lin.1"] if self.arch.shared_adaln else tokens

    def embed(self, condition: Condition, inputs_BLc: Tensor) -> Tensor:
        """Input of the first stage for all scales, (B, L, C)."""
        first = self.embed_first(condition)
        if inputs_BLc.shape[1] == 0:
            return first
        rest = self.embed_inputs(inputs_BLc, spans_of(self.scales, first=1))
        return torch.cat((first, rest), dim=1)

    def embed_first(self, condition: Condition) -> Tensor:
        """Input of scale 0, (B, l_0, C): the class embedding at every position."""
        positions = slice(0, self.scales.ends[0])
        return condition.class_BC.unsqueeze(1) + self.pos_start + self._position(positions)

    def embed_inputs(self, inputs_Blc: Tensor, spans: Sequence[Span]) -> Tensor:
        """Input of the scales of `spans` from token embeddings (B, l, Cvae)."""
        positions = slice(self.scales.starts[spans[0].scale], spans[-1].keys)
        return self.word_embed(inputs_Blc.to(self.dtype), spans) + self._position(positions)

    def _position(self, positions: slice) -> Tensor:
        levels = cast(Tensor, self.lvl_1L)[:, positions]
        return self.lvl_embed(levels) + self.pos_1LC[:, positions]

    def new_cache(self, rows: int) -> list[Any]:
        """Preallocated keys and values for `rows` rows, one entry per block."""
        blocks = (cast(Block, block) for block in self.blocks)
        return [block.attn.new_cache(rows, self.scales) for block in blocks]

    def folds(self) -> dict[str, Fold]:
        """Linears by name whose input a diagonal can be folded into what makes it."""
        found: dict[str, Fold] = {
            f"blocks.{index}.{name}": fold
            for index, block in enumerate(self.blocks)
            for name, fold in cast(Block, block).folds().items()
        }
        ada = cast(ConditionLinear, self.head_nm.ada_lin[1])
        return {**found, "head": NormFold(self.head, ada, 0, 1, (self.head.bias,))}

    def feeds(self) -> dict[str, str]:
        """Names of Linears -> name of the norm or activation that feeds that Linear alone."""
        found = {
            f"blocks.{index}.{linear}": f"blocks.{index}.{source}"
            for index in range(self.arch.depth)
            for source, linear in Block.FEEDS
        }
        return {**found, "head": "head_nm.norm"}


@torch.no_grad()
def randomize(var: VAR, generator: torch.Generator) -> None:
    """Fill every parameter with the values of a fresh, trainable model (for benchmarks and tests).

    AdaLN outputs are kept away from zero, so that every block contributes.
    """
    for name, parameter in var.named_parameters():
        if name.endswith("scale_mul_1H11"):
            continue
        std = 0.5 / math.sqrt(parameter.shape[-1]) if "ada_lin.1.weight" in name else INIT_STD
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        values.normal_(0.0, std, generator=generator)
        parameter.copy_(values)
