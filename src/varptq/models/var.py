"""The VAR transformer (Tian et al., NeurIPS 2024), float, with seams where quantizers go.

    block:  x += attn(LN(x) (1 + scale1) + shift1) gamma1;   x += ffn(LN(x) (1 + scale2) + shift2)
    gamma2

Two ways through the same modules: `forward` runs all K scales in one block-causal pass
(teacher-forced), `step` runs one scale against a preallocated cache. Block causality is a list of
spans (queries of scale k see the keys of scales 0..k), so no mask is stored and both ways do the
same products. The seams are child modules: every `nn.Linear`, `ModulatedNorm` and the activation
before one, and in attention `Scores` (q k^T) and `Mix` (p v), or the whole `Attention` with its
cache. Nothing here knows of quantization.

Shapes: B rows, L tokens, l tokens of one scale, K scales, C width, H heads, c head width, V
codebook.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.models.scales import Scales

LAYER_NORM_EPS = 1e-6
MLP_RATIO = 4
MAX_LOG_SCALE = math.log(100.0)
INIT_LOG_SCALE = math.log(4.0)
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


class Span(NamedTuple):
    """Tokens of `scale`, at `queries` of the current input, see the first `keys` cached tokens."""

    queries: slice
    keys: int
    scale: int


def spans_of(scales: Scales, first: int = 0, end: int | None = None) -> list[Span]:
    """Block causality for an input that holds the tokens of scales `first`..`end` - 1 (default: the
    whole sequence): one span per scale."""
    chosen = range(first, scales.num_scales if end is None else end)
    offset = scales.starts[first]
    return [
        Span(slice(scales.starts[k] - offset, scales.ends[k] - offset), scales.ends[k], k)
        for k in chosen
    ]


class LayerCache:
    """Keys and values of one block, preallocated for all L tokens: two tensors (B, H, L, c)."""

    def __init__(self, keys_BHLc: Tensor, values_BHLc: Tensor) -> None:
        self.keys, self.values, self.length = keys_BHLc, values_BHLc, 0

    def append(self, k_BHlc: Tensor, v_BHlc: Tensor) -> tuple[Tensor, Tensor]:
        """Write l new tokens; returns views of all tokens so far."""
        end = self.length + k_BHlc.shape[2]
        self.keys[:, :, self.length : end] = k_BHlc
        self.values[:, :, self.length : end] = v_BHlc
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class TokenLinear(nn.Linear):
    """Seam: a Linear over tokens. What scale each token is of matters to quantizers only."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias, dtype=torch.float32)

    def forward(self, input: Tensor, spans: Sequence[Span] | None = None) -> Tensor:
        return super().forward(input)


class Scores(nn.Module):
    """Seam: attention scores of one span, q k^T. q is already scaled."""

    def forward(self, q_BHlc: Tensor, k_BHLc: Tensor) -> Tensor:
        return q_BHlc @ k_BHLc.transpose(-1, -2)


class Mix(nn.Module):
    """Seam: attention-value product of one span, p v."""

    def forward(self, p_BHlL: Tensor, v_BHLc: Tensor) -> Tensor:
        return p_BHlL @ v_BHLc


class Attention(nn.Module):
    """Self-attention. With `l2_norm` q and k are unit vectors and q carries exp(min(scale_mul, log
    100)); without it q is scaled by 0.25 / sqrt(c)."""

    def __init__(self, arch: VARArch) -> None:
        super().__init__()
        width = arch.width
        self.num_heads, self.head_width, self.l2_norm = (
            arch.num_heads,
            arch.head_width,
            arch.l2_norm,
        )
        self.mat_qkv = TokenLinear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.v_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.register_buffer("zero_k_bias", torch.zeros(width, dtype=torch.float32))
        if arch.l2_norm:
            self.scale_mul_1H11 = nn.Parameter(
                torch.full((1, arch.num_heads, 1, 1), INIT_LOG_SCALE, dtype=torch.float32)
            )
        self.proj = TokenLinear(width, width)
        self.scores = Scores()
        self.mix = Mix()

    def new_cache(self, rows: int, num_tokens: int) -> LayerCache:
        """Preallocated keys and values of this block for `rows` rows of `num_tokens` tokens."""
        shape = (rows, self.num_heads, num_tokens, self.head_width)
        return LayerCache(self.q_bias.new_empty(shape), self.q_bias.new_empty(shape))

    def forward(self, x_BLC: Tensor, spans: list[Span], cache: LayerCache | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C); `spans` index the queries of `x_BLC` and count keys in cache +
        input."""
        q_BHLc, k_BHLc, v_BHLc = self._qkv(x_BLC, spans)
        if cache is not None:
            k_BHLc, v_BHLc = cache.append(k_BHLc, v_BHLc)
        mixed = [
            self._attend(q_BHLc[:, :, s.queries], k_BHLc[:, :, : s.keys], v_BHLc[:, :, : s.keys])
            for s in spans
        ]
        out_BHLc = mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)
        return self.proj(out_BHLc.transpose(1, 2).flatten(2), spans)

    def _attend(self, q_BHlc: Tensor, k_BHLc: Tensor, v_BHLc: Tensor) -> Tensor:
        scores_BHlL = self.scores(q_BHlc, k_BHLc)
        p_BHlL = scores_BHlL.softmax(dim=-1, dtype=torch.float32)
        return self.mix(p_BHlL.to(v_BHLc.dtype), v_BHLc)

    def _qkv(self, x_BLC: Tensor, spans: list[Span]) -> tuple[Tensor, Tensor, Tensor]:
        bias = torch.cat((self.q_bias, cast(Tensor, self.zero_k_bias), self.v_bias))
        qkv = self.mat_qkv(x_BLC, spans) + bias
        heads = qkv.unflatten(-1, (3, self.num_heads, self.head_width))
        q_BHLc, k_BHLc, v_BHLc = heads.permute(2, 0, 3, 1, 4).unbind(0)
        if not self.l2_norm:
            return q_BHLc * (0.25 / math.sqrt(self.head_width)), k_BHLc, v_BHLc
        temperature = self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
        return F.normalize(q_BHLc, dim=-1) * temperature, F.normalize(k_BHLc, dim=-1), v_BHLc


class FeedForward(nn.Module):
    """fc2(GELU_tanh(fc1(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = TokenLinear(width, MLP_RATIO * width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = TokenLinear(MLP_RATIO * width, width)

    def forward(self, x_BLC: Tensor, spans: Sequence[Span]) -> Tensor:
        return self.fc2(self.act(self.fc1(x_BLC, spans)), spans)


def _ada_lin(width: int, vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, vectors * width, dtype=torch.float32))


class ModulatedNorm(nn.Module):
    """Seam: LayerNorm without parameters, then (1 + scale) and shift of the condition."""

    def forward(self, x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
        normed_BLC = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=LAYER_NORM_EPS)
        return normed_BLC * (1 + scale_B1C) + shift_B1C


class Block(nn.Module):
    """One transformer block. Its AdaLN vectors come from its own `ada_lin`, or with shared AdaLN
    (d36) from `ada_gss` plus the output of the shared layer."""

    def __init__(self, arch: VARArch) -> None:
        super().__init__()
        self.norm1, self.norm2 = ModulatedNorm(), ModulatedNorm()
        self.attn = Attention(arch)
        self.ffn = FeedForward(arch.width)
        if arch.shared_adaln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, arch.width, dtype=torch.float32))
        else:
            self.ada_lin = _ada_lin(arch.width, 6)

    def modulation(self, condition: Tensor) -> Tensor:
        """(B, C) class embedding, or (B, 1, 6, C) from the shared layer -> (B, 1, 6, C)."""
        if condition.dim() == 4:
            return self.ada_gss + condition
        return self.ada_lin(condition).unflatten(-1, (1, 6, -1))

    def forward(
        self, x_BLC: Tensor, ada_B16C: Tensor, spans: list[Span], cache: LayerCache | None = None
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = ada_B16C.unbind(2)
        x_BLC = x_BLC + self.attn(self.norm1(x_BLC, scale1, shift1), spans, cache) * gamma1
        return x_BLC + self.ffn(self.norm2(x_BLC, scale2, shift2), spans) * gamma2


class HeadNorm(nn.Module):
    """LayerNorm before the head, modulated by its own AdaLN layer (scale, shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ModulatedNorm()
        self.ada_lin = _ada_lin(width, 2)

    def modulation(self, class_BC: Tensor) -> Tensor:
        """(B, C) -> (B, 1, 2, C)."""
        return self.ada_lin(class_BC).unflatten(-1, (1, 2, -1))

    def forward(self, x_BLC: Tensor, ada_B12C: Tensor) -> Tensor:
        scale, shift = ada_B12C.unbind(2)
        return self.norm(x_BLC, scale, shift)


class Condition(NamedTuple):
    """What depends on the class alone, computed once per image and used at every scale."""

    class_BC: Tensor
    blocks: list[Tensor]
    head_B12C: Tensor


class VAR(nn.Module):
    """Next-scale transformer, upstream's parameter names. `forward` is the teacher-forced pass."""

    def __init__(self, arch: VARArch) -> None:
        super().__init__()
        self.arch = arch
        width, scales = arch.width, arch.scales
        self.class_emb = nn.Embedding(arch.num_classes + 1, width, dtype=torch.float32)
        self.pos_start = nn.Parameter(torch.zeros(1, scales.lengths[0], width, dtype=torch.float32))
        self.pos_1LC = nn.Parameter(torch.zeros(1, scales.num_tokens, width, dtype=torch.float32))
        self.lvl_embed = nn.Embedding(scales.num_scales, width, dtype=torch.float32)
        self.word_embed = TokenLinear(arch.code_dim, width)
        if arch.shared_adaln:
            self.shared_ada_lin = _ada_lin(width, 6)
        self.blocks = nn.ModuleList(Block(arch) for _ in range(arch.depth))
        self.head_nm = HeadNorm(width)
        self.head = TokenLinear(width, arch.codebook_size)
        self.register_buffer("lvl_1L", scales.scale_of_L().view(1, -1).to(self.pos_1LC.device))

    @property
    def scales(self) -> Scales:
        return self.arch.scales

    @property
    def device(self) -> torch.device:
        return self.pos_1LC.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pos_1LC.dtype

    def forward(self, labels_B: Tensor, inputs_BLc: Tensor) -> Tensor:
        """Teacher-forced logits of all scales in one block-causal pass.

        labels_B (B,) int64, `num_classes` meaning unconditional; inputs_BLc (B, L - l_0, Cvae), the
        input tokens of scales 1..K-1 as `vae.teacher_inputs` gives them. Returns float32 logits (B,
        L, V).
        """
        condition = self.condition(labels_B)
        x_BLC = self.embed(condition.class_BC, inputs_BLc)
        spans = spans_of(self.scales)
        for block, ada in zip(self.blocks, condition.blocks, strict=True):
            x_BLC = block(x_BLC, ada, spans)
        return self.logits(x_BLC, condition.head_B12C, spans)

    def condition(self, labels_B: Tensor) -> Condition:
        """AdaLN vectors of every block and the head for these labels."""
        class_BC = self.class_emb(labels_B)
        shared = self.block_condition(class_BC)
        blocks = [cast(Block, block).modulation(shared) for block in self.blocks]
        return Condition(class_BC, blocks, self.head_nm.modulation(class_BC))

    def block_condition(self, class_BC: Tensor) -> Tensor:
        """What `Block.modulation` takes: class embeddings, or the shared layer's (B, 1, 6, C)."""
        if not self.arch.shared_adaln:
            return class_BC
        return self.shared_ada_lin(class_BC).unflatten(-1, (1, 6, -1))

    def embed(self, class_BC: Tensor, inputs_BLc: Tensor) -> Tensor:
        """Input of the first block for all scales, (B, L, C)."""
        first = self.embed_first(class_BC)
        if inputs_BLc.shape[1] == 0:
            return first
        rest = self.embed_inputs(inputs_BLc, spans_of(self.scales, first=1))
        return torch.cat((first, rest), dim=1)

    def embed_first(self, class_BC: Tensor) -> Tensor:
        """Input of scale 0, (B, l_0, C): the class embedding at every position."""
        positions = slice(0, self.scales.ends[0])
        return class_BC.unsqueeze(1) + self.pos_start + self._position(positions)

    def embed_inputs(self, inputs_Blc: Tensor, spans: list[Span]) -> Tensor:
        """Input of the scales of `spans` from token embeddings (B, l, Cvae)."""
        positions = slice(self.scales.starts[spans[0].scale], spans[-1].keys)
        return self.word_embed(inputs_Blc.to(self.dtype), spans) + self._position(positions)

    def _position(self, positions: slice) -> Tensor:
        levels = cast(Tensor, self.lvl_1L)[:, positions]
        return self.lvl_embed(levels) + self.pos_1LC[:, positions]

    def new_cache(self, rows: int) -> list[LayerCache]:
        """Preallocated keys and values for `rows` rows, one entry per block."""
        blocks = (cast(Block, block) for block in self.blocks)
        return [block.attn.new_cache(rows, self.scales.num_tokens) for block in blocks]

    def step(
        self, x_BlC: Tensor, condition: Condition, scale: int, cache: list[LayerCache]
    ) -> Tensor:
        """One scale against the cache: embedded input (B, l, C) -> float32 logits (B, l, V)."""
        spans = spans_of(self.scales, scale, scale + 1)
        for block, ada, layer in zip(self.blocks, condition.blocks, cache, strict=True):
            x_BlC = block(x_BlC, ada, spans, layer)
        return self.logits(x_BlC, condition.head_B12C, spans)

    def logits(self, x_BLC: Tensor, head_B12C: Tensor, spans: list[Span]) -> Tensor:
        """float32 logits (B, L, V) from the last block's output."""
        return self.head(self.head_nm(x_BLC, head_B12C), spans).float()


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
