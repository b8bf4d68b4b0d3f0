"""Token-level fidelity: how far quantization moves the next-token distributions of a model.

Both models read the same tokens (teacher forcing), so every position is compared under the same
context. With p the float and q the quantized guided distribution at a position,
    kl          = sum over V of p log(p / q)
    kl_filtered = the same after p and q are cut to the entries that the filter keeps of p, and
                  renormalised there.
Sampling draws from filtered distributions, but filtering each model on its own would leave q
without mass on entries that p keeps, and make the divergence infinite. On the support of p both
have mass, so it is finite. Nothing is sampled or decoded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from varptq.errors import InputError
from varptq.models.bare import bare
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import Prompts
from varptq.models.reading import guided_logits, kl_divergence
from varptq.models.sampling import PerScale, SamplingSettings, filter_logits
from varptq.models.scales import Scales
from varptq.torch_state import plain_torch

DEFAULT_BATCH = 8


@dataclass(frozen=True)
class TokenFidelity:
    """Means over all tokens of all images, and over the tokens of each scale, coarse to fine.

    kl, kl_filtered: nats, see the module's docstring. top1: share of positions where both models
    have the same most likely entry.
    """

    num_images: int
    num_tokens: int
    kl: float
    kl_filtered: float
    top1: float
    kl_per_scale: tuple[float, ...]
    kl_filtered_per_scale: tuple[float, ...]
    top1_per_scale: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@plain_torch()
@torch.no_grad()
def token_fidelity(
    float_pipe: Pipeline,
    quant_pipe: Pipeline,
    prompts: Prompts | Sequence[Any] | Tensor,
    tokens: Tensor,
    cfg: PerScale | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = DEFAULT_BATCH,
    *,
    tau: PerScale | None = None,
    guided_scales: int | None = None,
) -> TokenFidelity:
    """Compare two pipelines on given tokens.

    prompts: B class ids or names, or what else the family takes. tokens: (B, L) int64 (or with
    draws) that both models read, best ones the float model sampled for these prompts and
    calibration has not seen. Raises `InputError` for
    models that do not speak the same tokens, and for tokens, prompts or settings out of range.
    """
    float_pipe, quant_pipe = bare(float_pipe), bare(quant_pipe)
    guidance = (cfg, tau, guided_scales)
    plan = float_pipe.plan(SamplingSettings(cfg=cfg, top_k=top_k, top_p=top_p))
    asked, alphabet = float_pipe.prompts(prompts), float_pipe.alphabet
    _check(float_pipe, quant_pipe, len(asked), tokens, batch_size)
    sums_K3 = torch.zeros(float_pipe.scales.num_scales, 3, dtype=torch.float64, device="cpu")
    for part, ids in zip(asked.split(batch_size), tokens.split(batch_size), strict=True):
        streams = [guided_logits(pipe, part, ids, *guidance) for pipe in (float_pipe, quant_pipe)]
        for (scale, p_blV), (_, q_blV) in zip(*streams, strict=True):
            sums_K3[scale] += _sums(p_blV, q_blV.to(p_blV.device), plan.top_k, plan.top_p).cpu()
    # Agreement is a share of the draws, a divergence the sum over those of a token.
    sums_K3[:, 2] /= alphabet.draws
    return _means(sums_K3, len(asked), float_pipe.scales)


def filtered_kl_divergence(p_logits: Tensor, q_logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """KL with p and q cut to the entries that the filter keeps of p and renormalised, (..., V) ->
    (...)."""
    p_kept = filter_logits(p_logits, top_k, top_p)
    return kl_divergence(p_kept, q_logits.masked_fill(p_kept == -torch.inf, -torch.inf))


def _sums(p_BlV: Tensor, q_BlV: Tensor, top_k: int, top_p: float) -> Tensor:
    """(3,) float64: kl, kl_filtered and top-1 agreement summed over the tokens of a scale."""
    same = p_BlV.argmax(-1) == q_BlV.argmax(-1)
    filtered = filtered_kl_divergence(p_BlV, q_BlV, top_k, top_p)
    return torch.stack((kl_divergence(p_BlV, q_BlV).sum(), filtered.sum(), same.double().sum()))


def _means(sums_K3: Tensor, num_images: int, scales: Scales) -> TokenFidelity:
    tokens_K = num_images * torch.tensor(scales.lengths, dtype=torch.float64, device="cpu")
    per_scale = (sums_K3 / tokens_K.unsqueeze(-1)).T.tolist()
    kl, kl_filtered, top1 = (sums_K3.sum(0) / tokens_K.sum()).tolist()
    return TokenFidelity(
        num_images,
        num_images * scales.num_tokens,
        kl,
        kl_filtered,
        top1,
        *(tuple(values) for values in per_scale),
    )


def _check(
    float_pipe: Pipeline, quant_pipe: Pipeline, count: int, tokens: Tensor, batch_size: int
) -> None:
    pair = (float_pipe, quant_pipe)
    for what, found in {
        "families": [pipe.family for pipe in pair],
        "scales": [pipe.scales for pipe in pair],
        "numbers of prompts": [pipe.var.num_prompts for pipe in pair],
        "alphabets": [tuple(pipe.alphabet) for pipe in pair],
    }.items():
        if found[0] != found[1]:
            raise InputError(
                f"models {float_pipe.name!r} and {quant_pipe.name!r}: {what} are {found[0]} and "
                f"{found[1]}; compare a quantized model with the float model it was made from"
            )
    expected = float_pipe.alphabet.shape(count, float_pipe.scales.num_tokens)
    if tuple(tokens.shape) != expected:
        raise InputError(
            f"tokens: shape {tuple(tokens.shape)}, expected {expected} (images, tokens)"
        )
    low, high = int(tokens.min()), int(tokens.max())
    last = float_pipe.alphabet.size - 1
    if low < 0 or high > last:
        raise InputError(f"tokens: ids {low}..{high}, expected 0..{last}")
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: must be at least 1")
