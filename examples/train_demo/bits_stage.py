"""First stage of the text demo: the bitwise autoencoder, images -> bits -> images.

    r_k   = area(f - sg(f_hat_k)),  bits_k = r_k > 0,  f_hat_{k+1} = f_hat_k + up(+-1 / sqrt(d))
    loss  = |image - decoder(f_hat)|^2 + perceptual LPIPS + commitment |f - sg(f_hat)|^2
            + entropy mean over scales of [H(p) - H(mean of p over the batch)],  p = sigma(T r_k)
sg stops gradients; the decoder's reach the encoder straight through the signs. There is no codebook
to learn. The entropies are those of LFQ (Yu et al. 2023) per bit, as BSQ (Zhao et al. 2024) has
them: the first keeps residuals away from zero, where noise flips their sign; the second keeps every
bit in use. T is 2 sqrt(d), so p is that of a bit whose two values are +-1 / sqrt(d). No
discriminator is trained. The whole may start from what another run or autoencoder has learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from data import Images
from loop import Batches, Stage, generator
from text_recipe import TextRecipe
from torch import Tensor, nn

from varptq.evaluate.networks.lpips import Lpips
from varptq.models import convolutions
from varptq.models.infinity.bsqvae import BSQVAE
from varptq.models.infinity.pyramid import BitPyramid
from varptq.models.prompts import spread

NAME = "bits"
TEST_IMAGES, TEST_BATCH = 2000, 100
# The peak of images in [-1, 1] is 2.
PEAK = 2.0
# A bit's mean is kept so far from 0 and 1, where the entropy has no slope.
SMALL = 1e-4


def build(recipe: TextRecipe, start: Mapping[str, Tensor], device: torch.device) -> BSQVAE:
    """An autoencoder: fresh, but for what `start` has of it."""
    vae = BSQVAE(recipe.bits.arch(), recipe.scales)
    convolutions.randomize(vae, generator(recipe.seed, NAME, "weights"))
    take(vae, start)
    return vae.to(device)


def take(module: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Tensors of `start` that have a name and shape of the module's own take their places."""
    own = module.state_dict()
    fitting = {k: v.float() for k, v in start.items() if k in own and v.shape == own[k].shape}
    module.load_state_dict(own | fitting)


def stage(
    recipe: TextRecipe,
    vae: BSQVAE,
    images: Images,
    device: torch.device,
    lpips: Lpips | None,
    identity: dict[str, Any],
) -> Stage:
    """The loop of this stage; `identity` is told apart from those of other data and recipes."""
    settings, schedule = recipe.bits, recipe.bits.schedule
    batches = Batches(len(images.labels), schedule.batch, recipe.seed, NAME)

    def loss(step: int) -> Tensor:
        index = batches(step)
        draws = generator(recipe.seed, NAME, "flip", step)
        x = images.batch(index, torch.rand(len(index), generator=draws) < 0.5, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            features = vae.features(x)
        f_hat, commitment, entropy = quantized(vae.pyramid, features.float())
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            rebuilt = vae.decoder(f_hat)
        total = F.mse_loss(rebuilt.float(), x)
        total = total + settings.commitment * commitment + settings.entropy * entropy
        if lpips is not None:
            total = total + settings.perceptual * lpips.between(rebuilt.float(), x).mean()
        return total

    return Stage(NAME, vae, schedule, loss, identity)


def quantized(pyramid: BitPyramid, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f_hat with the straight-through gradient, the commitment's distance and the entropies."""
    f_hat, entropy = torch.zeros_like(features), features.new_zeros(())
    for scale in range(pyramid.scales.num_scales):
        residual_BlC = pyramid.residual(features, f_hat, scale)
        logit_BlC = 2 * pyramid.latent_bits**0.5 * residual_BlC
        mean_C = logit_BlC.sigmoid().mean((0, 1)).clamp(SMALL, 1 - SMALL)
        entropy = entropy + _entropy(logit_BlC).mean() - _entropy(mean_C.logit()).mean()
        bits = (residual_BlC.detach() > 0).long()
        f_hat = pyramid.add_scale(f_hat, pyramid.embed(bits), scale)
    commitment = F.mse_loss(features, f_hat)
    return features + (f_hat - features).detach(), commitment, entropy / pyramid.scales.num_scales


def _entropy(logit: Tensor) -> Tensor:
    """Of a bit that is set with probability sigmoid(logit), nats; finite gradients everywhere."""
    return F.softplus(logit) - logit * logit.sigmoid()


def test_numbers(images: Images) -> Tensor:
    """Which test images measures are taken of: some, spread over the classes."""
    return spread(len(images.labels), min(TEST_IMAGES, len(images.labels)))


@torch.no_grad()
def measure(vae: BSQVAE, images: Images, device: torch.device) -> dict[str, float]:
    """PSNR in dB over those test images, and the mean entropy of a bit over them, in bits."""
    numbers = test_numbers(images)
    error, count, ones = 0.0, len(numbers), torch.zeros(())
    for index in numbers.split(TEST_BATCH):
        x = images.batch(index, torch.zeros(len(index), dtype=torch.bool), device)
        bits = vae.encode(x)
        ones = ones + bits.double().sum(0).cpu()
        error += float((vae.decode(bits) - x).double().square().mean()) * len(index)
    psnr = 10 * torch.log10(torch.tensor(PEAK**2 * count / error, dtype=torch.float64))
    mean = (ones / count).clamp(SMALL, 1 - SMALL)
    bits_used = float(_entropy(mean.logit()).mean()) / math.log(2)
    return {"psnr": float(psnr), "entropy_of_a_bit": bits_used}
