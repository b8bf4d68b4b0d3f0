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
from varptq.models.reading import guided_logits, kl_divergence
from varptq.models.sampling import SamplingSettings, filter_logits
from varptq.models.sampling_defaults import CFG, TOP_K, TOP_P
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
    labels_B: Tensor | Sequence[int | str],
    ids_BL: Tensor,
    cfg: float = CFG,
    top_k: int = TOP_K,
    top_p: float = TOP_P,
    batch_size: int = DEFAULT_BATCH,
) -> TokenFidelity:
    """Compare two pipelines on given tokens.

    labels_B: B class ids or names. ids_BL: (B, L) int64 tokens that both models read, best
    tokens that the float model sampled for these labels and calibration has not seen. Raises
    `InputError` for models with different tokens, and for tokens, labels or settings out of
    range.
    """
    float_pipe, quant_pipe = bare(float_pipe), bare(quant_pipe)
    SamplingSettings(cfg=cfg, top_k=top_k, top_p=top_p)
    labels_B = float_pipe.labels(labels_B)
    _check(float_pipe, quant_pipe, labels_B, ids_BL, batch_size)
    sums_K3 = torch.zeros(float_pipe.scales.num_scales, 3, dtype=torch.float64, device="cpu")
    for labels_b, ids_bL in zip(labels_B.split(batch_size), ids_BL.split(batch_size), strict=True):
        streams = [guided_logits(pipe, labels_b, ids_bL, cfg) for pipe in (float_pipe, quant_pipe)]
        for (scale, p_blV), (_, q_blV) in zip(*streams, strict=True):
            sums_K3[scale] += _sums(p_blV, q_blV.to(p_blV.device), top_k, top_p).cpu()
    return _means(sums_K3, len(labels_B), float_pipe.scales)


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
    float_pipe: Pipeline, quant_pipe: Pipeline, labels_B: Tensor, ids_BL: Tensor, batch_size: int
) -> None:
    for what in ("scales", "num_classes", "codebook_size"):
        found = [getattr(pipe.var.arch, what) for pipe in (float_pipe, quant_pipe)]
        if found[0] != found[1]:
            raise InputError(
                f"models {float_pipe.name!r} and {quant_pipe.name!r}: {what} are {found[0]} and "
                f"{found[1]}; compare a quantized model with the float model it was made from"
            )
    expected = (len(labels_B), float_pipe.scales.num_tokens)
    if tuple(ids_BL.shape) != expected:
        raise InputError(
            f"tokens: shape {tuple(ids_BL.shape)}, expected {expected} (images, tokens)"
        )
    low, high = int(ids_BL.min()), int(ids_BL.max())
    last = float_pipe.var.arch.codebook_size - 1
    if low < 0 or high > last:
        raise InputError(f"tokens: ids {low}..{high}, expected 0..{last}")
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: must be at least 1")
