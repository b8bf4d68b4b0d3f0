"""The Infinity transformer (Han et al., CVPR 2025), float, with seams where quantizers go.

    block:  x += gamma1 attn(LN(x) (1 + scale1) + shift1);   x += cross(LNa(x), text)
            x += gamma2 ffn(LN(x) (1 + scale2) + shift2)

A text gives one pooled vector, which is the first token and the condition of AdaLN (shared between
blocks), and the tokens that cross-attention reads. Positions are rotary. A token is D bits; logits
are (D, 2), the second of a pair meaning 1.

Shapes: B rows, L tokens, l tokens of one scale, C width, H heads, c head width, T tokens of a text,
D bits of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.errors import InputError
from varptq.models.alphabet import Alphabet
from varptq.models.blocks import (
    NORMS,
    Attention,
    FeedForward,
    HeadNorm,
    ada_lin,
    gain_folds,
)
from varptq.models.cross import CrossAttention, TextCache, TextGroup
from varptq.models.infinity.guidance import check_places, with_mixtures
from varptq.models.infinity.schedules import is_published, reshaped, schedule_for, size_names
from varptq.models.infinity.text import TextNorm, TextPool, text_proj
from varptq.models.prompt_files import bundled_prompts
from varptq.models.rotary import Rotary, rotary
from varptq.models.sampling import PerScale, SamplingSettings, per_scale
from varptq.models.scales import Scales
from varptq.models.seams import (
    LAYER_NORM_EPS,
    ChannelFold,
    ConditionLinear,
    Fold,
    Gain,
    GatedSum,
    LayerCache,
    ModulatedNorm,
    NormFold,
    Span,
    Stage,
    TextLinear,
    TokenLinear,
    memoized,
    spans_of,
)
from varptq.models.texts import TextEncoder, TextPrompts, TextRow
from varptq.models.transformer import Transformer

BIT = 2
# How the published scripts draw: tau is 1 from this width on.
CFG, TAU, TAU_OF_LARGE, TOP_P = 3.0, 0.5, 1.0, 0.97
LARGE_WIDTH = 3584
# Of no text alone: as a short one, since rows beyond the texts of its training mean nothing.
UNASKED_LENGTH = 8
TEXTS_AT_A_TIME = 64


@dataclass(frozen=True)
class InfinityArch:
    """What the tensors of a checkpoint say about the transformer, and the schedule it is used at,
    which they do not say."""

    depth: int
    width: int
    num_heads: int
    ffn_width: int
    token_bits: int
    """D."""
    text_channels: int
    text_maxlen: int
    """Rows of what stands for no text: the longest text there is."""
    pool_heads: int
    levels: int
    """Rows of the level embedding: the most scales there are."""
    scales: Scales

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


class Condition(NamedTuple):
    """What depends on the texts alone. text: of every row, in groups of one length."""

    pooled_BC: Tensor
    shared_B16C: Tensor
    text: tuple[TextGroup, ...]


class BlockCache(NamedTuple):
    """Keys and values of one block: of the tokens so far, and of the text."""

    tokens: LayerCache
    text: TextCache

    def first_rows(self, rows: int) -> BlockCache:
        return BlockCache(self.tokens.first_rows(rows), self.text.first_rows(rows))


class InfinityBlock(nn.Module):
    """One block. Its AdaLN vectors are `ada_gss` plus the output of the shared layer."""

    # What alone feeds a Linear, so that its quantizer can carry it out while it reads.
    FEEDS = (
        ("norm1", "attn.mat_qkv"),
        ("cross_norm", "cross.mat_q"),
        ("norm2", "ffn.fc1"),
        ("ffn.act", "ffn.fc2"),
    )

    def __init__(self, arch: InfinityArch) -> None:
        super().__init__()
        width, heads = arch.width, arch.num_heads
        self.norm1, self.norm2 = ModulatedNorm(), ModulatedNorm()
        self.attn = Attention(width, heads, l2_norm=True, rotary=True)
        self.cross_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS, dtype=torch.float32)
        self.cross = CrossAttention(width, heads)
        self.ffn = FeedForward(width, arch.ffn_width)
        self.sum = GatedSum()
        self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, width, dtype=torch.float32))
        self.ada_gain = Gain(NORMS)

    def modulation(self, shared_B16C: Tensor) -> Tensor:
        return self.ada_gain(self.ada_gss + shared_B16C)

    def new_cache(self, rows: int, scales: Scales) -> BlockCache:
        return BlockCache(self.attn.new_cache(rows, scales), self.cross.new_cache())

    def folds(self) -> dict[str, Fold]:
        """Linears of this block, by name, whose input a diagonal can be folded into what makes it
        in this block."""
        norm = self.cross_norm
        return {
            **gain_folds(self.ada_gain, self.ada_gss, self.attn.mat_qkv, self.ffn.fc1),
            "attn.proj": self.attn.fold_of_values(),
            "cross.mat_q": ChannelFold((self.cross.mat_q,), (norm.weight, norm.bias)),
            "cross.proj": self.cross.fold_of_values(),
        }

    def forward(
        self,
        x_BLC: Tensor,
        ada_B16C: Tensor,
        spans: list[Span],
        text: Sequence[TextGroup],
        tables: Rotary,
        cache: BlockCache | None = None,
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = ada_B16C.unbind(2)
        own, of_text = (None, None) if cache is None else cache
        mixed_BLC = self.attn(self.norm1(x_BLC, scale1, shift1), spans, own, tables)
        x_BLC = self.sum(x_BLC, mixed_BLC, gamma1)
        x_BLC = self.sum(x_BLC, self.cross(self.cross_norm(x_BLC), spans, text, of_text))
        return self.sum(x_BLC, self.ffn(self.norm2(x_BLC, scale2, shift2), spans), gamma2)


class Infinity(Transformer):
    """Next-scale transformer over bits. Conditions are texts."""

    UNGUIDED = 1.0
    READS_TEXTS = True

    def __init__(self, arch: InfinityArch) -> None:
        super().__init__(arch)
        _check(arch)
        width, channels = arch.width, arch.text_channels
        self.cfg_uncond = nn.Parameter(torch.zeros(arch.text_maxlen, channels, dtype=torch.float32))
        self.text_norm = TextNorm(channels)
        self.text_pool = TextPool(channels, width, arch.pool_heads)
        self.text_proj = text_proj(channels, width)
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width, dtype=torch.float32))
        self.lvl_embed = nn.Embedding(arch.levels, width, dtype=torch.float32)
        first = min(1, arch.scales.num_scales - 1)
        self.word_embed = TokenLinear(arch.token_bits, width, kind="word_embed", first_scale=first)
        self.shared_ada_lin = ada_lin(width, 6, kind="shared_ada_lin", once=True)
        self.blocks = nn.ModuleList(InfinityBlock(arch) for _ in range(arch.depth))
        self.head_nm = HeadNorm(width, once=True)
        self.head = TokenLinear(width, BIT * arch.token_bits, kind="head")

    @property
    def alphabet(self) -> Alphabet:
        return Alphabet(self.arch.token_bits, BIT)

    @property
    def sampling(self) -> SamplingSettings:
        """As the published scripts draw; top-k of two symbols is nothing."""
        tau = TAU_OF_LARGE if self.width >= LARGE_WIDTH else TAU
        return SamplingSettings(cfg=CFG, tau=tau, top_k=0, top_p=TOP_P)

    def strengths(self, cfg: PerScale) -> tuple[float, ...]:
        """cfg - 1 at every scale: cfg cond + (1 - cfg) uncond."""
        return tuple(value - self.UNGUIDED for value in per_scale("cfg", cfg, self.scales))

    def over(self, scales: Scales) -> Self:
        arch = replace(self.arch, scales=scales)
        _check(arch)
        found = copy.copy(self)
        found.arch = arch
        return found

    def schedule(self, size: Any) -> Scales:
        """For a size name, with a ratio or without, or (height, width) in pixels; schedules.py."""
        return size if isinstance(size, Scales) else schedule_for(size)

    def sizes(self) -> tuple[str, ...]:
        """Every published size at every ratio, for a model of the published schedules."""
        return size_names(self.arch.levels) if is_published(self.scales) else ()

    def shaped(self, height: int, width: int) -> Scales:
        return reshaped(self.scales, height / width)

    def check_guidance(self, places: tuple[int, ...]) -> None:
        check_places(places, self.arch.depth)

    def mixed(
        self, stages: list[Stage], strengths: tuple[float, ...], places: tuple[int, ...]
    ) -> list[Stage]:
        return with_mixtures(stages, strengths, places)

    def prompts(
        self, values: Any, names: Sequence[str], encoder: TextEncoder | None
    ) -> TextPrompts:
        prompts = TextPrompts.parse(values, encoder)
        prompts.check(self.arch.text_channels, self.arch.text_maxlen)
        return prompts

    def pool(self, names: Sequence[str], encoder: TextEncoder | None) -> TextPrompts:
        """The model's own texts, else those that come with the package, where there is an encoder
        to read them."""
        if encoder is None:
            raise InputError(
                "prompts: none to draw for; a model that reads texts wants prompts=, or a text "
                "encoder for those that come with varptq"
            )
        return self.prompts(names or bundled_prompts(), names, encoder)

    def unasked(self) -> TextPrompts:
        return TextPrompts((TextRow(None, min(UNASKED_LENGTH, self.arch.text_maxlen)),))

    def facts(self) -> dict[str, str]:
        arch = self.arch
        return {
            "transformer": f"depth {arch.depth}, width {arch.width}, {arch.num_heads} heads",
            "text": f"{arch.text_channels} channels, at most {arch.text_maxlen} tokens",
            "tokens": f"{self.scales.num_tokens} in sides {self.scales}; {arch.token_bits} bits",
        }

    def condition(self, prompts: TextPrompts) -> Condition:
        """What these texts say to every stage. Raises `InputError` for one that does not fit."""
        texts = self.texts(prompts)
        pooled_BC = self._pooled(texts)
        groups = tuple(TextGroup(rows_R, self.text_proj(text)) for rows_R, text in texts)
        shared_B16C = self.shared_ada_lin(pooled_BC).unflatten(-1, (1, 6, -1))
        return Condition(pooled_BC, shared_B16C, groups)

    def texts(self, prompts: TextPrompts) -> tuple[TextGroup, ...]:
        """The normed features, (R, T, D) of all prompts of one length. Raises `InputError` for one
        that does not fit."""
        prompts.check(self.arch.text_channels, self.arch.text_maxlen)
        groups: list[TextGroup] = []
        for length in sorted({row.length for row in prompts.rows}):
            numbers = [i for i, row in enumerate(prompts.rows) if row.length == length]
            rows_R = torch.tensor(numbers, dtype=torch.int64, device="cpu")
            features_RTD = torch.stack(
                [self._features(prompts.rows[number].features_TD, length) for number in numbers]
            )
            groups.append(TextGroup(rows_R, self.text_norm(features_RTD)))
        return tuple(groups)

    def _pooled(self, texts: Sequence[TextGroup]) -> Tensor:
        """(B, C), the condition of AdaLN."""
        pooled_BC = self.pos_start.new_empty(sum(len(rows_R) for rows_R, _ in texts), self.width)
        for rows_R, text_RTD in texts:
            # Under autocast the pool is of another dtype.
            pooled_RC = self.text_pool(text_RTD).to(pooled_BC.dtype)
            pooled_BC[rows_R.to(self.device)] = pooled_RC
        return pooled_BC

    def _features(self, features_TD: Tensor | None, length: int) -> Tensor:
        """(T, D) on the model's device, in float32 as the norm takes it."""
        found = self.cfg_uncond[:length] if features_TD is None else features_TD.to(self.device)
        return found.float()

    def condition_vectors(self, pool: TextPrompts) -> Tensor:
        """Of the pool and of nothing."""
        with torch.no_grad():
            parts = pool.guided().split(TEXTS_AT_A_TIME)
            pooled_BC = torch.cat([self._pooled(self.texts(part)) for part in parts])
            return F.silu(pooled_BC.float())

    def stages(self, condition: Condition) -> list[Stage]:
        """The pass behind the embedding. AdaLN vectors are computed when a stage first runs."""
        tables = rotary(self.scales, self.arch.head_width, self.device)
        return [
            *(self._block_stage(index, condition, tables) for index in range(self.arch.depth)),
            self._norm_stage(condition.pooled_BC),
            Stage("head", lambda x, spans, _: self.head(x, spans), (), ("head",)),
        ]

    def _block_stage(self, index: int, condition: Condition, tables: Rotary) -> Stage:
        name, block = f"blocks.{index}", cast(InfinityBlock, self.blocks[index])
        modulation = memoized(lambda: block.modulation(condition.shared_B16C))

        def run(x: Tensor, spans: list[Span], cache: list[BlockCache] | None) -> Tensor:
            own = cache[index] if cache else None
            return block(x, modulation(), spans, condition.text, tables, own)

        units = (f"{name}.attn", f"{name}.cross", f"{name}.ffn")
        arguments = {units[0]: (None, tables), units[1]: (condition.text,)}
        return Stage(name, run, (), units, arguments, of_rows=(units[1],))

    def _norm_stage(self, pooled_BC: Tensor) -> Stage:
        modulation = memoized(lambda: self.head_nm.modulation(pooled_BC))
        return Stage("head_nm", lambda x, *_: self.head_nm(x, modulation()), ("head_nm.ada_lin.1",))

    def input_units(self) -> list[str]:
        """Of what is made of a text, the pool is one unit, as its softmax belongs to it, and what
        the blocks read another; keys and values of a block's own belong to its cross-attention."""
        tokens = ["word_embed"] if self.scales.num_scales > 1 else []
        return [*tokens, "text_pool", "text_proj", "shared_ada_lin.1"]

    def embed(self, condition: Condition, inputs_BLc: Tensor) -> Tensor:
        first = self.embed_first(condition)
        if inputs_BLc.shape[1] == 0:
            return first
        rest = self.embed_inputs(inputs_BLc, spans_of(self.scales, first=1))
        return torch.cat((first, rest), dim=1)

    def embed_first(self, condition: Condition) -> Tensor:
        """Input of scale 0, (B, l_0, C): the pooled text at every position."""
        start_B1C = condition.pooled_BC.unsqueeze(1) + self.pos_start
        return start_B1C + self._levels(spans_of(self.scales, 0, 1))

    def embed_inputs(self, inputs_Blc: Tensor, spans: Sequence[Span]) -> Tensor:
        """Input of the scales of `spans` from what the pyramid gives, (B, l, D)."""
        return self.word_embed(inputs_Blc.to(self.dtype), spans) + self._levels(spans)

    def _levels(self, spans: Sequence[Span]) -> Tensor:
        """(1, l, C)."""
        weight = self.lvl_embed.weight
        rows = [weight[span.scale].expand(1, span.length, -1) for span in spans]
        return torch.cat(rows, dim=1)

    def new_cache(self, rows: int) -> list[Any]:
        """Per block the preallocated keys and values of tokens, and room for those of the text."""
        return [cast(InfinityBlock, block).new_cache(rows, self.scales) for block in self.blocks]

    def folds(self) -> dict[str, Fold]:
        """One diagonal serves all that read the normed text, and one all that read its tokens; the
        GELU within `text_proj` lets none pass."""
        found = {
            f"blocks.{index}.{name}": fold
            for index, block in enumerate(self.blocks)
            for name, fold in cast(InfinityBlock, block).folds().items()
        }
        pool, (fc1, _, fc2) = self.text_pool, cast(Sequence[TextLinear], self.text_proj)
        found |= dict.fromkeys(
            ("text_pool.mat_kv", "text_proj.0"),
            ChannelFold((pool.mat_kv, fc1), (self.text_norm.weight,)),
        )
        found["text_pool.proj"] = pool.fold_of_values()
        readers = {
            f"blocks.{index}.cross.mat_kv": cast(InfinityBlock, block).cross.mat_kv
            for index, block in enumerate(self.blocks)
        }
        tokens = ChannelFold(tuple(readers.values()), (fc2.weight, fc2.bias))
        ada = cast(ConditionLinear, self.head_nm.ada_lin[1])
        head = NormFold(self.head, ada, 0, 1, (self.head.bias,))
        return {**found, **dict.fromkeys(readers, tokens), "head": head}

    def feeds(self) -> dict[str, str]:
        found = {
            f"blocks.{index}.{linear}": f"blocks.{index}.{source}"
            for index in range(self.arch.depth)
            for source, linear in InfinityBlock.FEEDS
        }
        return {**found, "text_proj.2": "text_proj.1", "head": "head_nm.norm"}


def _check(arch: InfinityArch) -> None:
    if arch.scales.num_scales > arch.levels:
        raise InputError(
            f"sides {arch.scales}: these are {arch.scales.num_scales} scales, expected at most "
            f"{arch.levels}, for which the model has embeddings"
        )
