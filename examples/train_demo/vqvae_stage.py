"""First stage: the VQVAE, images -> tokens -> images.

    f_hat = sum over scales of phi(up(nearest entry of the area-downsampled residual))
    loss  = |image - decoder(f_hat)|^2 + perceptual LPIPS
            + mean over scales of |f_hat_k - sg(f)|^2 + commitment |sg(f_hat_k) - f|^2
sg stops gradients; the decoder's reach the encoder straight through. No discriminator is trained.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from data import Images
from loop import Batches, Stage, generator
from recipe import Recipe
from torch import Tensor

from varptq.evaluate.networks.lpips import Lpips
from varptq.models.var.pyramid import TokenPyramid
from varptq.models.var.vqvae import VQVAE

NAME = "vqvae"
# An entry is dead when its running share of uses is below this part of the mean over entries.
DEAD_SHARE = 0.03
HIT_DECAY = 0.99
TEST_BATCH = 250


def build(recipe: Recipe, device: torch.device) -> VQVAE:
    vqvae = VQVAE(recipe.vqvae.arch(recipe.scales), recipe.scales)
    vqvae.randomize(generator(recipe.seed, NAME, "weights"))
    return vqvae.to(device)


def stage(
    recipe: Recipe,
    vqvae: VQVAE,
    images: Images,
    device: torch.device,
    lpips: Lpips | None,
    identity: dict[str, Any],
) -> Stage:
    """The loop of this stage; `identity` is told apart from those of other data and recipes."""
    settings, schedule = recipe.vqvae, recipe.vqvae.schedule
    batches = Batches(len(images.labels), schedule.batch, recipe.seed, NAME)
    seen: dict[str, Tensor] = {}

    def loss(step: int) -> Tensor:
        index = batches(step)
        draws = generator(recipe.seed, NAME, "flip", step)
        x = images.batch(index, torch.rand(len(index), generator=draws) < 0.5, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            features = vqvae.features(x)
        if step == 0:
            _restart(vqvae.quantize, features.detach().float(), recipe.seed, step)
        f_hat, codebook = quantized(vqvae.quantize, features.float(), settings.commitment)
        seen["features"] = features.detach().float()
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            rebuilt = vqvae.decoder(vqvae.post_quant_conv(f_hat))
        total = F.mse_loss(rebuilt.float(), x) + codebook
        if lpips is not None:
            total = total + settings.perceptual * lpips.between(rebuilt.float(), x).mean()
        return total

    def after(step: int) -> None:
        early = step < settings.restart_until * schedule.steps
        if early and (step + 1) % settings.restart_every == 0:
            _restart(vqvae.quantize, seen["features"], recipe.seed, step)

    return Stage(NAME, vqvae, schedule, loss, identity, after)


def quantized(pyramid: TokenPyramid, features: Tensor, commitment: float) -> tuple[Tensor, Tensor]:
    """f_hat with the straight-through gradient, and the codebook's loss; counts uses of entries."""
    residual, f_hat = features.detach(), torch.zeros_like(features)
    total = features.new_zeros(())
    scales = pyramid.scales
    for scale, size in enumerate(scales.sides):
        z = F.interpolate(residual, size=size, mode="area")
        ids = pyramid.nearest(z.flatten(2).transpose(1, 2))
        _count(pyramid, scale, ids)
        part = pyramid.contribution(pyramid.embed(ids), scale)
        f_hat, residual = f_hat + part, residual - part.detach()
        total = total + F.mse_loss(f_hat, features.detach())
        total = total + commitment * F.mse_loss(f_hat.detach(), features)
    return features + (f_hat - features).detach(), total / scales.num_scales


@torch.no_grad()
def _count(pyramid: TokenPyramid, scale: int, ids: Tensor) -> None:
    hits = torch.bincount(ids.flatten(), minlength=pyramid.embedding.num_embeddings)
    buffer = pyramid.get_buffer("ema_vocab_hit_SV")
    buffer[scale].lerp_(hits.to(buffer), 1 - HIT_DECAY)


@torch.no_grad()
def _restart(pyramid: TokenPyramid, features: Tensor, seed: int, step: int) -> None:
    """Put entries that are hardly used where residuals of the present batch are.

    At the first step all are; then those below DEAD_SHARE of the mean. Candidates are the residuals
    of every scale, as the encoder meets them.
    """
    uses_V = pyramid.get_buffer("ema_vocab_hit_SV").sum(0)
    dead = (uses_V <= DEAD_SHARE * uses_V.mean()).nonzero().flatten()
    if not len(dead):
        return
    residual, candidates = features, []
    for scale, size in enumerate(pyramid.scales.sides):
        z = F.interpolate(residual, size=size, mode="area").flatten(2).transpose(1, 2)
        candidates.append(z.flatten(0, 1))
        residual = residual - pyramid.contribution(pyramid.embed(pyramid.nearest(z)), scale)
    pool = torch.cat(candidates)
    draws = generator(seed, NAME, "restart", step)
    chosen = torch.randint(len(pool), (len(dead),), generator=draws).to(pool.device)
    pyramid.embedding.weight[dead] = pool[chosen]
    # Until it is used, a fresh entry counts as one of average use.
    pyramid.get_buffer("ema_vocab_hit_SV")[:, dead] = uses_V.mean() / pyramid.scales.num_scales


@torch.no_grad()
def measure(vqvae: VQVAE, images: Images, device: torch.device) -> dict[str, float]:
    """PSNR in dB over all test images, and the share of codebook entries they use."""
    error, count = 0.0, 0
    used_V = torch.zeros(vqvae.arch.codebook_size, dtype=torch.bool, device=device)
    for index in torch.arange(len(images.labels)).split(TEST_BATCH):
        x = images.batch(index, torch.zeros(len(index), dtype=torch.bool), device)
        ids = vqvae.encode(x)
        used_V[ids.flatten()] = True
        error += float((vqvae.decode(ids) - x).double().square().mean()) * len(index)
        count += len(index)
    # The peak of images in [-1, 1] is 2.
    psnr = 10 * torch.log10(torch.tensor(4 * count / error, dtype=torch.float64))
    return {"psnr": float(psnr), "entries_used": float(used_V.double().mean())}
