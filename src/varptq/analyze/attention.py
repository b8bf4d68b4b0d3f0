"""How attention spreads over the keys, per scale: what a quantizer of probabilities must represent.

    histogram    share of probabilities p in (2^-(j+1), 2^-j], j = 0 .. 23; smaller ones in the last
    mass         sum of the probabilities in each bin
    top          attention mass of the top key, and of the top tenth of the keys
    effective    exp(entropy) of a row: the number of equally attended keys of the same entropy
    by key       attention mass that the queries of a scale give to the keys of each scale

Attention over texts is counted by itself, where there is any; its keys have no scales, and their
number is a mean.
Measured in the float model's teacher-forced pass, over conditional and unconditional rows; means
over rows, heads and queries. Nothing is quantized here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varptq.models.cross import Mixes
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import Prompts
from varptq.models.reading import listening, read
from varptq.models.scales import Scales
from varptq.models.seams import Span

NUM_BINS = 24


class AttentionStatistics:
    """Sums over the attention maps of a model with K scales and `blocks` blocks. text: the keys are
    those of texts."""

    def __init__(self, scales: Scales, blocks: int, *, text: bool = False) -> None:
        count = scales.num_scales
        self.scales, self.text = scales, text
        self.keys_K = torch.zeros(count, dtype=torch.float64, device="cpu")
        self.rows_bK = torch.zeros(blocks, count, dtype=torch.float64, device="cpu")
        self.counts_bKn = torch.zeros(blocks, count, NUM_BINS, dtype=torch.float64, device="cpu")
        self.mass_bKn = torch.zeros_like(self.counts_bKn)
        self.top_bK2 = torch.zeros(blocks, count, 2, dtype=torch.float64, device="cpu")
        self.effective_bK = torch.zeros_like(self.rows_bK)
        self.by_key_bKK = torch.zeros(blocks, count, count, dtype=torch.float64, device="cpu")

    def add(self, block: int, scale: int, p_BHlL: Tensor) -> None:
        """Add the probabilities of one block at one scale; rows sum to 1."""
        p_RL = p_BHlL.double().flatten(0, -2)
        bins = (-p_RL.log2()).floor().clamp(0, NUM_BINS - 1).long().flatten()
        self.rows_bK[block, scale] += len(p_RL)
        self.counts_bKn[block, scale] += bins.bincount(minlength=NUM_BINS).cpu()
        self.mass_bKn[block, scale] += bins.bincount(p_RL.flatten(), minlength=NUM_BINS).cpu()
        keys = p_RL.shape[-1]
        self.keys_K[scale] += keys * len(p_RL)
        top = p_RL.topk(-(-keys // 10), dim=-1).values
        self.top_bK2[block, scale] += torch.stack((top[:, 0].sum(), top.sum())).cpu()
        entropy = -torch.special.xlogy(p_RL, p_RL).sum(-1)
        self.effective_bK[block, scale] += entropy.exp().sum().cpu()
        slices = () if self.text else self.scales.slices()[: scale + 1]
        for key_scale, part in enumerate(slices):
            self.by_key_bKK[block, scale, key_scale] += p_RL[:, part].sum().cpu()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: everything per scale, the concentration per block and scale too."""
        rows_K = self.rows_bK.sum(0)
        keys_K = self.keys_K / rows_K
        counts_Kn = self.counts_bKn.sum(0)
        top_bK2 = self.top_bK2 / self.rows_bK.unsqueeze(-1)
        effective_bK = self.effective_bK / self.rows_bK
        found = {
            "keys": keys_K.tolist() if self.text else list(self.scales.ends),
            "histogram": (counts_Kn / counts_Kn.sum(-1, keepdim=True)).tolist(),
            "mass": (self.mass_bKn.sum(0) / rows_K.unsqueeze(-1)).tolist(),
            "top_key": top_bK2[..., 0].mean(0).tolist(),
            "top_tenth": top_bK2[..., 1].mean(0).tolist(),
            "effective_keys": effective_bK.mean(0).tolist(),
            "effective_share": (effective_bK.mean(0) / keys_K).tolist(),
            "by_key_scale": (self.by_key_bKK.sum(0) / rows_K.unsqueeze(-1)).tolist(),
            "top_key_per_block": top_bK2[..., 0].tolist(),
            "effective_keys_per_block": effective_bK.tolist(),
        }
        if self.text:
            del found["by_key_scale"]
        return found


@torch.no_grad()
def attention_statistics(
    pipe: Pipeline, prompts: Prompts, tokens: Tensor, batch_size: int = 8, *, text: bool = False
) -> AttentionStatistics:
    """Read prompts and their tokens through the float model and count: attention over tokens, or
    with `text` over texts."""
    every = Mixes.of(pipe.var)
    mixes = list((every.text if text else every.tokens).values())
    statistics = AttentionStatistics(pipe.scales, len(mixes), text=text)

    def add(block: int, p_BHlL: Tensor, _: Tensor, span: Span) -> None:
        statistics.add(block, span.scale, p_BHlL)

    with listening(dict(enumerate(mixes)), add):
        batches = zip(prompts.split(batch_size), tokens.split(batch_size), strict=True)
        for part, ids in batches:
            read(pipe, part, ids)
    return statistics
