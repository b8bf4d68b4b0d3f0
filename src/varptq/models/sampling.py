"""From logits to token ids: guidance, top-k and top-p, and noise that belongs to one image.

guided = (1 + t) cond - t uncond with t = cfg * k / (K - 1) at scale k; top-k first, top-p on what
is left; then id = argmax(logits + temperature * g) with Gumbel noise g, which draws from
softmax(logits / temperature).
The noise of image i is a function of (seed, i) alone: batches can be cut anywhere, and a float and
a quantized model fed the same noise choose the same id unless their logits differ enough.

The loop over scales lives with the model, not here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from varptq.errors import InputError, NonFiniteError
from varptq.models.sampling_defaults import CFG, TOP_K, TOP_P
from varptq.models.scales import Scales
from varptq.settings import Settings

# Schedule of more_smooth: temperature of the Gumbel softmax from 0.27 down to 5% of it, never below
# 0.005.
SMOOTH_TAU, SMOOTH_DECAY, SMOOTH_TAU_MIN = 0.27, 0.95, 0.005
# torch.rand gives multiples of 2^-24; half a step moves them off 0, where the Gumbel noise would be
# infinite.
HALF_STEP, BELOW_ONE = 2.0**-25, 1 - 2.0**-24
# Where guidance mixes: the logits, and no hidden states.
LOGITS = 0
# Far beyond any use; logits times the one, or over the other, are finite.
MAX_CFG, MIN_DIVISOR, MAX_DIVISOR = 1e6, 1e-6, 100
# torch hands this many elements to one thread.
SERIAL_ELEMENTS = 2**15
# Odd, hence a bijection of the 32-bit integers (2^32 over the golden ratio).
MIX = 0x9E3779B1


PerScale = float | tuple[float, ...]


class SamplingSettings(Settings):
    """How an image is drawn. None stands for the model's own value, `Transformer.sampling`.

    cfg: guidance as the model's family writes it, or a value per scale. VAR: reached at the last
    scale, 0 is unguided.
    tau: divides the logits before guidance and filters; one number, or one per scale.
    top_k: candidates per token; 0, or V and above, is off.
    top_p: probability mass of the candidates; 0 or 1 is off.
    temperature: of the draw among the candidates, which the filters choose at temperature 1.
    more_smooth: feed mixtures of embeddings to the next scale instead of single codebook entries.
    guided_scales: how many scales are guided, from the first on; None is all. The rows that ask for
    nothing are not computed behind them, which at half of them saves a third of an image's work.
    """

    cfg: PerScale | None = None
    tau: PerScale | None = None
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, ge=0, le=1)
    temperature: float = Field(default=1.0, ge=MIN_DIVISOR, le=MAX_DIVISOR)
    more_smooth: bool = False
    guided_scales: int | None = Field(default=None, ge=0)

    # Before the types are looked at: what fits none of several would be told once for each.
    @field_validator("cfg", mode="before")
    @classmethod
    def _guidance(cls, value: Any) -> Any:
        return _checked(value, 0, MAX_CFG)

    @field_validator("tau", mode="before")
    @classmethod
    def _divisor(cls, value: Any) -> Any:
        return _checked(value, MIN_DIVISOR, MAX_DIVISOR)

    def filled(self, own: SamplingSettings) -> SamplingSettings:
        """These settings, with the value of `own` for each that is None."""
        said = {name: getattr(self, name) for name in type(self).model_fields}
        missing = {name: getattr(own, name) for name, value in said.items() if value is None}
        return SamplingSettings(**{**said, **missing})


def _checked(value: Any, low: float, high: float) -> Any:
    """A number, or one per scale, each of the range."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if number is not None and not (_is_number(number) and low <= number <= high):
            raise ValueError(
                f"expected numbers that are at least {low:g} and at most {high:g}, one or one for "
                "each scale"
            )
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


VAR_SAMPLING = SamplingSettings(cfg=CFG, tau=1.0, top_k=TOP_K, top_p=TOP_P)


@dataclass(frozen=True)
class DrawPlan:
    """`SamplingSettings` resolved for one model: strength t of guidance and tau of every scale, and
    the filters. guide_at: where guidance mixes its two rows, as `generate` takes it."""

    strengths: tuple[float, ...]
    taus: tuple[float, ...]
    top_k: int
    top_p: float
    temperature: float
    more_smooth: bool
    guide_at: tuple[int, ...] = (LOGITS,)

    @property
    def is_guided(self) -> bool:
        """Whether unconditional rows are needed."""
        return any(self.strengths)

    def is_guided_from(self, scale: int) -> bool:
        """Whether unconditional rows are needed at `scale` or behind it."""
        return any(self.strengths[scale:])


def listed(value: float | Sequence[float] | None) -> PerScale | None:
    """A number, or a sequence of one per scale as a tuple."""
    return tuple(value) if isinstance(value, Sequence) else value


def per_scale(name: str, value: PerScale, scales: Scales) -> tuple[float, ...]:
    """One number for each of the K scales. Raises `InputError` for another count."""
    if not isinstance(value, tuple):
        return (value,) * scales.num_scales
    if len(value) != scales.num_scales:
        raise InputError(
            f"{name}: {len(value)} values, expected one for all scales or {scales.num_scales}"
        )
    return value


def guidance_strength(cfg: float, scale: int, scales: Scales) -> float:
    """t of scale index `scale`: a ramp from 0 at the first scale to `cfg` at the last."""
    return cfg * scales.ratio(scale)


def guided(logits_2BlV: Tensor, t: float) -> Tensor:
    """(1 + t) cond - t uncond of rows [cond; uncond]: (2B, l, V) -> (B, l, V), same dtype."""
    cond, uncond = logits_2BlV.chunk(2)
    return (1 + t) * cond - t * uncond


def at_tau(logits: Tensor, tau: float) -> Tensor:
    """Logits over tau; untouched where it is 1."""
    return logits if tau == 1 else logits / tau


def filter_logits(logits_BlV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with -inf at the entries that top-k and then top-p drop: (..., V) -> (..., V) float32.

    top-k keeps everything not below the k-th largest, ties included. top-p goes through the rest in
    ascending order and drops while the cumulative probability is <= 1 - top_p; the largest always
    stays. Of equal logits at that border some may stay and some go. Source: VAR's sampling,
    docs/method.md section 1.
    """
    logits = logits_BlV.float()
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if not 0 < top_p < 1:
        return logits
    # Order the candidates only: sorting all V entries costs several times more.
    width = max(1, int((logits > -torch.inf).sum(-1).max()))
    descending, index = logits.topk(width)
    ascending, index = descending.flip(-1), index.flip(-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[..., -1] = False
    return logits.scatter(-1, index, ascending.masked_fill(drop, -torch.inf))


class ImageRandom:
    """The random numbers of one image for one purpose: a function of (seed, image, purpose) alone.

    `image` is the index in the whole run, not in the batch. Numbers are drawn on the CPU, whose
    generator gives the same stream for every device.
    """

    def __init__(self, seed: int, image: int, purpose: str = "tokens") -> None:
        # torch's Mersenne twister reads 32 bits of its seed, so a plain 64-bit hash could give two
        # images of one run the same noise. The image enters by a bijection: that cannot happen.
        key = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=4).digest()
        state = (int.from_bytes(key, "little") ^ (image % 2**32)) * MIX % 2**32
        self._generator = torch.Generator().manual_seed(state)

    def uniform(self, *shape: int) -> Tensor:
        """The next values: float32 in (0, 1), both ends excluded."""
        steps = torch.rand(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return steps.add_(HALF_STEP).clamp_(max=BELOW_ONE)

    def gumbel(self, *shape: int) -> Tensor:
        """The next values as standard Gumbel noise: float32, always finite (about -2.9 to 17.4)."""
        # log1p of the small side keeps the upper tail, which decides the draws, at full resolution.
        noise = self.uniform(*shape)
        # In pieces that torch computes on one thread: where a thread's share ends, its logarithm is
        # another one, and noise must not depend on the number of threads.
        for piece in noise.view(-1).split(SERIAL_ELEMENTS):
            piece.neg_().log1p_().neg_().log_().neg_()
        return noise


def image_randoms(seed: int, images: Iterable[int], purpose: str = "tokens") -> list[ImageRandom]:
    """One stream per image index."""
    return [ImageRandom(seed, image, purpose) for image in images]


def gumbel_noise(
    randoms: Sequence[ImageRandom], length: int, vocabulary: int, device: torch.device
) -> Tensor:
    """(B, length, vocabulary) float32 Gumbel noise on `device`: the next values of each image."""
    return torch.stack([random.gumbel(length, vocabulary) for random in randoms]).to(device)


def sample_ids(
    filtered_BlV: Tensor, randoms: Sequence[ImageRandom], temperature: float = 1.0
) -> Tensor:
    """(B, l, V) filtered logits -> (B, l) int64, a draw from softmax(filtered / temperature) each.

    `randoms` has one stream per row, which advances by l * V values. Raises `NonFiniteError` where
    logits are NaN or +inf, or where a token has no candidate.
    """
    batch, length, vocabulary = filtered_BlV.shape
    assert len(randoms) == batch
    noise_BlV = gumbel_noise(randoms, length, vocabulary, filtered_BlV.device)
    # Scaling the noise up is dividing the logits by the temperature, without overflow near 0.
    best_Bl, ids_Bl = noise_BlV.mul_(temperature).add_(filtered_BlV.float()).max(-1)
    finite_B = best_Bl.isfinite().all(-1)
    if not finite_B.all():
        raise NonFiniteError(
            f"logits of batch row {int((~finite_B).nonzero()[0])}: NaN or infinity, "
            "expected finite numbers; check the weights, the quantization ranges and cfg"
        )
    return ids_Bl


def smooth_embedding(
    filtered_BlV: Tensor, noise_BlV: Tensor, codebook_VC: Tensor, ratio: float
) -> Tensor:
    """more_smooth: a mixture of codebook rows instead of one row, (B, l, V) -> (B, l, C).

    h = softmax((filtered * (1 + r) + g) / tau) @ codebook, tau = max(0.27 (1 - 0.95 r), 0.005),
    with r = k / (K - 1) at scale k. `noise_BlV` is float32 Gumbel noise g, drawn after the noise
    of the ids from the same streams. The result has the codebook's dtype.
    """
    tau = max(SMOOTH_TAU * (1 - SMOOTH_DECAY * ratio), SMOOTH_TAU_MIN)
    weights_BlV = ((filtered_BlV.float() * (1 + ratio) + noise_BlV) / tau).softmax(-1)
    return weights_BlV.to(codebook_VC.dtype) @ codebook_VC


class Sampler:
    """Seam: from the transformer's logits to ids and, for `more_smooth`, to embeddings."""

    def draw(
        self,
        logits_BlV: Tensor,
        guidance: float | None,
        settings: DrawPlan,
        randoms: Sequence[ImageRandom],
        *,
        filtered: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Ids (b, l) int64 and the guided, filtered float32 logits (b, l, V), which a sampler may
        leave out where they are not asked for.

        guidance: strength t for rows [cond; uncond], None where all rows are images.
        """
        if guidance is not None:
            logits_BlV = guided(logits_BlV, guidance)
        logits_BlV = filter_logits(logits_BlV, settings.top_k, settings.top_p)
        return sample_ids(logits_BlV, randoms, settings.temperature), logits_BlV

    def smooth(
        self,
        filtered_BlV: Tensor,
        randoms: Sequence[ImageRandom],
        codebook_VC: Tensor,
        ratio: float,
    ) -> Tensor:
        """`smooth_embedding` (b, l, C) with the next noise of each image."""
        length, vocabulary = filtered_BlV.shape[1:]
        noise_BlV = gumbel_noise(randoms, length, vocabulary, filtered_BlV.device)
        return smooth_embedding(filtered_BlV, noise_BlV, codebook_VC, ratio)


class PerImageSampler(Sampler):
    """Draws image by image. In a batch, how a row of probabilities is summed depends on how many
    candidates the others have, and how a matrix product is summed on the number of rows."""

    def draw(
        self,
        logits_BlV: Tensor,
        guidance: float | None,
        settings: DrawPlan,
        randoms: Sequence[ImageRandom],
        *,
        filtered: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        images, draw = len(randoms), super().draw
        draws = [
            draw(logits_BlV[i::images], guidance, settings, [random])
            for i, random in enumerate(randoms)
        ]
        ids, logits = zip(*draws, strict=True)
        return torch.cat(ids), torch.cat(logits) if filtered else None

    def smooth(
        self,
        filtered_BlV: Tensor,
        randoms: Sequence[ImageRandom],
        codebook_VC: Tensor,
        ratio: float,
    ) -> Tensor:
        smooth = super().smooth
        rows = zip(filtered_BlV.split(1), randoms, strict=True)
        return torch.cat([smooth(row, [random], codebook_VC, ratio) for row, random in rows])
