"""Class-conditional generation: scale by scale, with guidance, filters, forced tokens and per-image
randomness.

Each image has a generator of its own made from (seed, image index): batch size and order change
nothing but float summation. AdaLN vectors are computed once per image, keys and values live in a
preallocated cache. Shapes as in models/seams.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varptq.errors import InputError, is_out_of_memory
from varptq.models.bare import bare
from varptq.models.memory import batch_too_large
from varptq.models.pipeline import Pipeline
from varptq.models.sampling import (
    ImageRandom,
    SamplingSettings,
    guidance_strength,
    image_randoms,
)
from varptq.models.sampling_defaults import CFG, TOP_K, TOP_P
from varptq.models.seams import run_stages, spans_of
from varptq.progress import Progress, silent
from varptq.torch_state import plain_torch

DEFAULT_BATCH = 16


@dataclass(frozen=True)
class Output:
    """images (B, 3, H, W) float32 in [0, 1] (None when decoding was not asked for), tokens (B, L)
    int64."""

    images: Tensor | None
    tokens: Tensor


@dataclass(frozen=True)
class ScaleEvent:
    """What `on_scale` sees: the guided and filtered logits (b, l, V) and ids (b, l) of images
    `rows` of the call."""

    scale: int
    rows: slice
    logits_BlV: Tensor
    ids_Bl: Tensor
    f_hat: Tensor


@plain_torch()
def generate(
    pipe: Pipeline,
    labels: Sequence[int | str] | Tensor,
    *,
    seed: int = 0,
    cfg: float = CFG,
    top_k: int = TOP_K,
    top_p: float = TOP_P,
    temperature: float = 1.0,
    more_smooth: bool = False,
    forced: Tensor | None = None,
    first_index: int = 0,
    batch_size: int = DEFAULT_BATCH,
    decode: bool = True,
    on_scale: Callable[[ScaleEvent], None] | None = None,
    progress: Progress = silent,
) -> Output:
    """Generate one image per label, with a float or a quantized pipeline.

    labels: B class ids or names. forced: (B, L) int64 ids to use instead of sampling, -1 where
    free. Image i of the call draws from (seed, first_index + i) only. top_k 0 and top_p 0 or 1
    switch a filter off. Source: VAR paper (sampling), docs/method.md section 1. Raises `InputError`
    for labels, forced ids or batch_size that cannot be used, `ConfigError` for settings,
    `OutOfMemoryError` for a batch that does not fit, with how many images would.
    """
    settings = SamplingSettings(
        cfg=cfg, top_k=top_k, top_p=top_p, temperature=temperature, more_smooth=more_smooth
    )
    pipe = bare(pipe)
    labels_B = pipe.labels(labels)
    forced = _check_forced(pipe, forced, len(labels_B))
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: must be at least 1")
    images, tokens = [], []
    progress("generate", 0, len(labels_B))
    for start in range(0, len(labels_B), batch_size):
        rows = slice(start, min(start + batch_size, len(labels_B)))
        randoms = image_randoms(seed, range(first_index + rows.start, first_index + rows.stop))
        part = None if forced is None else forced[rows]
        try:
            ids, f_hat = _generate_batch(
                pipe, labels_B[rows], settings, randoms, part, rows, on_scale
            )
            if decode:
                images.append(_decode(pipe, f_hat))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise batch_too_large(pipe, len(randoms), cfg, error) from error
        tokens.append(ids)
        progress("generate", rows.stop, len(labels_B))
    return Output(torch.cat(images) if decode else None, torch.cat(tokens))


def _check_forced(pipe: Pipeline, forced: Tensor | None, count: int) -> Tensor | None:
    if forced is None:
        return None
    expected = (count, pipe.scales.num_tokens)
    if tuple(forced.shape) != expected:
        raise InputError(
            f"forced: shape {tuple(forced.shape)}, expected {expected} (images, tokens)"
        )
    if forced.dtype not in (torch.int64, torch.int32):
        raise InputError(f"forced: {forced.dtype}, expected torch.int64 ids")
    low, high = int(forced.min()), int(forced.max())
    if low < -1 or high >= pipe.var.arch.codebook_size:
        raise InputError(
            f"forced: ids {low}..{high}, expected -1 (free) or 0..{pipe.var.arch.codebook_size - 1}"
        )
    return forced.to(pipe.device)


@torch.inference_mode()
def _decode(pipe: Pipeline, f_hat: Tensor) -> Tensor:
    return pipe.vae.decode_features(f_hat).float().add(1).mul(0.5)


@torch.inference_mode()
def _generate_batch(
    pipe: Pipeline,
    labels_B: Tensor,
    settings: SamplingSettings,
    randoms: Sequence[ImageRandom],
    forced_BL: Tensor | None,
    rows: slice,
    on_scale: Callable[[ScaleEvent], None] | None,
) -> tuple[Tensor, Tensor]:
    """One batch: ids (b, L) and the final f_hat."""
    f_hat = pipe.vae.quantize.zeros(len(labels_B))
    ids_per_scale: list[Tensor] = []
    stepper, sampler = _Stepper(pipe, labels_B, settings.cfg), pipe.sampler
    wanted = settings.more_smooth or on_scale is not None
    for scale, part in enumerate(pipe.scales.slices()):
        logits_BlV, guidance = stepper.logits(scale, f_hat), stepper.guidance(scale)
        ids_Bl, filtered = sampler.draw(logits_BlV, guidance, settings, randoms, filtered=wanted)
        embedding = None
        if settings.more_smooth:
            assert filtered is not None
            codebook = pipe.vae.quantize.embedding.weight
            embedding = sampler.smooth(filtered, randoms, codebook, pipe.scales.ratio(scale))
        if forced_BL is not None:
            given = forced_BL[:, part] >= 0
            ids_Bl = torch.where(given, forced_BL[:, part], ids_Bl)
            if embedding is not None:
                embedding = torch.where(
                    given.unsqueeze(-1), pipe.vae.quantize.embed(ids_Bl), embedding
                )
        if embedding is None:
            embedding = pipe.vae.quantize.embed(ids_Bl)
        f_hat = pipe.vae.quantize.add_scale(f_hat, embedding, scale)
        ids_per_scale.append(ids_Bl)
        if on_scale is not None:
            assert filtered is not None
            on_scale(ScaleEvent(scale, rows, filtered, ids_Bl, f_hat))
    return torch.cat(ids_per_scale, dim=1), f_hat


class _Stepper:
    """Logits scale by scale; rows are [conditional; unconditional], the latter only when guidance
    needs it."""

    def __init__(self, pipe: Pipeline, labels_B: Tensor, cfg: float) -> None:
        self.pipe, self.cfg = pipe, cfg
        rows = pipe.guidance_rows(labels_B) if cfg > 0 else labels_B
        self.condition = pipe.var.condition(rows)
        self.stages = pipe.var.stages(self.condition)
        self.cache = pipe.var.new_cache(len(rows))

    def logits(self, scale: int, f_hat: Tensor) -> Tensor:
        """(rows, l, V) float32 logits of `scale`, given f_hat of the scales before it."""
        var, spans = self.pipe.var, spans_of(self.pipe.scales, scale, scale + 1)
        if scale == 0:
            x_BlC = var.embed_first(self.condition)
        else:
            x_BlC = var.embed_inputs(self.pipe.vae.quantize.next_input(f_hat, scale - 1), spans)
            if self.cfg > 0:
                x_BlC = x_BlC.repeat(2, 1, 1)
        return run_stages(self.stages, x_BlC, spans, self.cache)

    def guidance(self, scale: int) -> float | None:
        """Strength at `scale`, None where all rows are images."""
        return guidance_strength(self.cfg, scale, self.pipe.scales) if self.cfg > 0 else None
