"""Generation: scale by scale, with guidance, filters, forced tokens and per-image
randomness.

Each image has a generator of its own made from (seed, image index): batch size and order change
nothing but float summation. What depends on the prompt alone is computed once per image; keys and
values are written to a preallocated cache. Shapes as in models/seams.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from varptq.errors import InputError, is_out_of_memory
from varptq.models.bare import bare
from varptq.models.graphs import Graphs
from varptq.models.memory import batch_too_large
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import Prompts
from varptq.models.sampling import (
    LOGITS,
    DrawPlan,
    ImageRandom,
    SamplingSettings,
    listed,
)
from varptq.models.stepper import Batch, Stepper
from varptq.progress import Progress, silent
from varptq.torch_state import plain_torch

DEFAULT_BATCH = 16
# The random numbers of an image: seed, and index among the images of that seed.
Stream = tuple[int, int]


@dataclass(frozen=True)
class Output:
    """images (B, 3, H, W) float32 in [0, 1] (None when decoding was not asked for), tokens (B, L)
    int64, or (B, L, draws) where a token is several draws."""

    images: Tensor | None
    tokens: Tensor


@dataclass(frozen=True)
class ScaleEvent:
    """What `on_scale` sees: the guided and filtered logits (b, l draws, V) and the symbols
    (b, l draws) of images `rows` of the call."""

    scale: int
    rows: slice
    logits_BlV: Tensor
    ids_Bl: Tensor
    f_hat: Tensor


@plain_torch()
def generate(
    pipe: Pipeline,
    prompts: Prompts | Sequence[Any] | Tensor,
    *,
    seed: int = 0,
    negative: Any = None,
    size: Any = None,
    cfg: float | Sequence[float] | None = None,
    tau: float | Sequence[float] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    more_smooth: bool = False,
    guided_scales: int | None = None,
    guide_at: Sequence[int] = (LOGITS,),
    forced: Tensor | None = None,
    first_index: int = 0,
    streams: Sequence[Stream] | None = None,
    batch_size: int = DEFAULT_BATCH,
    decode: bool = True,
    cuda_graphs: bool = False,
    on_scale: Callable[[ScaleEvent], None] | None = None,
    progress: Progress = silent,
) -> Output:
    """Generate one image per prompt, with a float or a quantized pipeline.

    prompts, negative: B class ids or names, or texts, as `Pipeline.prompts` takes them. size: as
    `Pipeline.sized` takes it; None is the model's own. forced: int64 tokens to use instead of
    sampling, shaped as those of the output, -1 where free. Image i draws from (seed, first_index +
    i) only, or from the i-th of `streams`, where images of several seeds share a batch. cfg ..
    guided_scales: fields of `SamplingSettings`. guide_at: where guidance mixes its two rows: 0 the
    logits; -m, for Infinity, hidden states after the m-th last block; without 0 the asked row alone
    gives the logits. cuda_graphs: the same images by one launch a scale, recorded when a size of
    batch is first drawn (graphs.py). Source: VAR paper (sampling), docs/method.md section 1. Raises
    `InputError` for what cannot be used of prompts, size, forced tokens, streams, batch_size or
    cuda_graphs, `ConfigError` for settings, `OutOfMemoryError` for a batch that does not fit, with
    how many images would.
    """
    shared: dict[str, Any] = {"cfg": listed(cfg), "tau": listed(tau), "top_k": top_k}
    rest: dict[str, Any] = {"temperature": temperature, "more_smooth": more_smooth}
    settings = SamplingSettings(top_p=top_p, guided_scales=guided_scales, **shared, **rest)
    graphs = pipe.graphs if cuda_graphs else None
    pipe = bare(pipe).sized(size)
    asked = pipe.prompts(prompts, negative)
    plan = pipe.plan(settings, guide_at, negative=asked.has_negative)
    forced = _check_forced(pipe, forced, len(asked))
    batches = _batches(len(asked), batch_size)
    drawn_from = _check_streams(streams, seed, first_index, len(asked))
    images, tokens = [], []
    progress("generate", 0, len(asked))
    for rows in batches:
        randoms = [ImageRandom(*stream) for stream in drawn_from[rows]]
        drawing = (asked[rows], plan, randoms, None if forced is None else forced[rows])
        with _fitting(pipe, len(randoms), plan):
            ids, f_hat = _generate_batch(pipe, *drawing, rows, on_scale, graphs)
            if decode:
                images.append(decoded(pipe, f_hat))
        tokens.append(ids)
        progress("generate", rows.stop, len(asked))
    return Output(torch.cat(images) if decode else None, torch.cat(tokens))


def _batches(count: int, batch_size: int) -> list[slice]:
    if not isinstance(batch_size, Integral):
        raise InputError(f"batch_size {batch_size!r}: expected a whole number")
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: must be at least 1")
    return [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]


def _check_streams(
    streams: Sequence[Stream] | None, seed: int, first_index: int, count: int
) -> Sequence[Stream]:
    if streams is None:
        return [(seed, first_index + i) for i in range(count)]
    if len(streams) != count:
        raise InputError(f"streams: {len(streams)}, expected {count}, one for each prompt")
    for stream in streams:
        pair = stream if isinstance(stream, Sequence) else ()
        if len(pair) != 2 or not all(isinstance(number, Integral) for number in pair):
            raise InputError(
                f"stream {stream!r}: expected two whole numbers, a seed and the index of an image"
            )
    return streams


def _check_forced(pipe: Pipeline, forced: Tensor | None, count: int) -> Tensor | None:
    if forced is None:
        return None
    if not isinstance(forced, Tensor):
        raise InputError(f"forced: a {type(forced).__name__}, expected a tensor of int64 ids")
    alphabet = pipe.alphabet
    expected = alphabet.shape(count, pipe.scales.num_tokens)
    if tuple(forced.shape) != expected:
        raise InputError(
            f"forced: shape {tuple(forced.shape)}, expected {expected} (images, tokens)"
        )
    if forced.dtype not in (torch.int64, torch.int32):
        raise InputError(f"forced: {forced.dtype}, expected torch.int64 ids")
    low, high = int(forced.min()), int(forced.max())
    if low < -1 or high >= alphabet.size:
        raise InputError(f"forced: ids {low}..{high}, expected -1 (free) or 0..{alphabet.size - 1}")
    return forced.to(pipe.device)


@plain_torch()
@torch.inference_mode()
def decoded(pipe: Pipeline, f_hat: Tensor) -> Tensor:
    """Features of B images, complete ones or a `ScaleEvent`'s -> (B, 3, H, W) float32, 0 to 1."""
    parts = f_hat.split(1) if pipe.image_by_image else (f_hat,)
    # The layout of a slice may depend on what it was cut from.
    images = [pipe.vae.decode_features(part.contiguous()) for part in parts]
    return torch.cat(images).float().add(1).mul(0.5)


@contextmanager
def _fitting(pipe: Pipeline, images: int, plan: DrawPlan) -> Iterator[None]:
    """Raises `OutOfMemoryError`, which says how many images would fit, where these do not."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise batch_too_large(pipe, images, plan.is_guided, error) from error


def _rows(
    pipe: Pipeline, graphs: Graphs | None, images: int, plan: DrawPlan
) -> AbstractContextManager[Batch]:
    """The rows of a batch, for the time of a block."""
    if graphs is not None:
        return graphs.batch(pipe.var, images, plan)
    return nullcontext(Batch(pipe.var, images, plan))


@torch.inference_mode()
def _generate_batch(
    pipe: Pipeline,
    prompts: Prompts,
    plan: DrawPlan,
    randoms: Sequence[ImageRandom],
    forced: Tensor | None,
    rows: slice,
    on_scale: Callable[[ScaleEvent], None] | None,
    graphs: Graphs | None,
) -> tuple[Tensor, Tensor]:
    """One batch: its tokens and the final f_hat."""
    vae, alphabet, sampler = pipe.vae, pipe.alphabet, pipe.sampler
    f_hat, tokens = vae.zeros(len(prompts)), list[Tensor]()
    wanted = plan.more_smooth or on_scale is not None
    with _rows(pipe, graphs, len(prompts), plan) as batch:
        stepper = Stepper(vae, prompts, plan, batch)
        for scale, part in enumerate(pipe.scales.slices()):
            logits = alphabet.by_draw(stepper.logits(scale, f_hat))
            guidance = stepper.guidance(scale)
            symbols, filtered = sampler.draw(logits, guidance, plan, randoms, filtered=wanted)
            mixture = None
            if plan.more_smooth:
                assert filtered is not None
                ratio = pipe.scales.ratio(scale)
                mixture = sampler.smooth(filtered, randoms, _codebook(pipe), ratio)
            if forced is not None:
                given = alphabet.symbols(forced[:, part])
                symbols = torch.where(given >= 0, given, symbols)
                if mixture is not None:
                    own = vae.embed(symbols)
                    mixture = torch.where((given >= 0).unsqueeze(-1), own, mixture)
            tokens.append(alphabet.tokens(symbols))
            fed = vae.embed(tokens[-1]) if mixture is None else mixture
            f_hat = vae.add_scale(f_hat, fed, scale)
            if on_scale is not None:
                assert filtered is not None
                on_scale(ScaleEvent(scale, rows, filtered, symbols, f_hat))
    return torch.cat(tokens, dim=1), f_hat


def _codebook(pipe: Pipeline) -> Tensor:
    codebook = pipe.vae.codebook()
    if codebook is None:
        raise InputError(
            f"more_smooth: a token of model {pipe.name!r} is no entry of a codebook, so there are "
            "none to mix; leave it off"
        )
    return codebook
