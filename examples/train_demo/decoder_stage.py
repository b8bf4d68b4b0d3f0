"""A stage of its own: the decoder again, on tokens that stay as they are, against a discriminator.

    loss = |image - rebuilt|_1 + a * (-D(rebuilt) + m * |features of D: image - rebuilt|_1)
           + mean max(0, 1 - D(image)) + mean max(0, 1 + D(rebuilt))
The first line trains the decoder with D fixed, the second D with the decoder fixed. a is such that
the second term's gradient at the rebuilt image is `adversarial` times as long as the first's.
Encoder, codebook and phi do not move, so a transformer trained on their tokens still fits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from data import Images
from loop import Batches, Stage, generator
from recipe import DecoderRecipe
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from varptq.models.convolutions import IMAGE_CHANNELS
from varptq.models.var.vqvae import VQVAE

NAME = "decoder"
LEAK = 0.2
# Keeps the ratio of two gradients finite where the adversarial one vanishes.
TINY = 1e-8


class Discriminator(nn.Module):
    """Images (B, 3, S, S) -> a score per patch, and the features before it. Strides of 2 between
    `widths`; spectral norm bounds how fast a score can change with the image."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        first = nn.Conv2d(IMAGE_CHANNELS, widths[0], 3, padding=1)
        halving = [nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths)]
        self.layers = nn.ModuleList(spectral_norm(layer) for layer in (first, *halving))
        self.score = spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images_B3SS: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for layer in self.layers:
            images_B3SS = F.leaky_relu(layer(images_B3SS), LEAK)
            features.append(images_B3SS)
        return self.score(images_B3SS), features


class Pair(nn.Module):
    """What the stage trains."""

    def __init__(self, vqvae: VQVAE, discriminator: Discriminator) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vqvae.post_quant_conv, vqvae.decoder
        self.discriminator = discriminator

    def fixed(self, images_B3SS: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The discriminator as it is: gradients reach the images, not its weights."""
        state = dict(self.discriminator.named_parameters()) | dict(
            self.discriminator.named_buffers()
        )
        frozen = {name: tensor.detach() for name, tensor in state.items()}
        return functional_call(self.discriminator, frozen, (images_B3SS,))


def build(recipe: DecoderRecipe, vqvae: VQVAE, device: torch.device) -> Pair:
    """The discriminator starts at random; `vqvae` is frozen but for its decoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(recipe.seed, NAME, "weights").initial_seed())
        discriminator = Discriminator(recipe.widths)
    vqvae.requires_grad_(False)
    pair = Pair(vqvae, discriminator.to(device))
    return pair.requires_grad_(True)


def stage(
    recipe: DecoderRecipe,
    pair: Pair,
    vqvae: VQVAE,
    ids_2NL: Tensor,
    images: Images,
    device: torch.device,
    identity: dict[str, Any],
) -> Stage:
    """The loop of this stage; `ids_2NL` are the tokens of the images and of their mirror images."""
    batches = Batches(len(images.labels), recipe.schedule.batch, recipe.seed, NAME)

    def loss(step: int) -> Tensor:
        index = batches(step)
        flip = torch.rand(len(index), generator=generator(recipe.seed, NAME, "flip", step)) < 0.5
        x = images.batch(index, flip, device)
        with torch.no_grad():
            f_hat = vqvae.quantize.accumulate(ids_2NL[flip.long(), index].to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            rebuilt = pair.decoder(pair.post_quant_conv(f_hat)).float()
            judged = _judge(pair, x, rebuilt.detach())
            distance = F.l1_loss(rebuilt, x)
            realism = _realism(pair, x, rebuilt, recipe.matching)
        share = recipe.adversarial * _size(distance, rebuilt) / (_size(realism, rebuilt) + TINY)
        return distance + share * realism + judged

    return Stage(NAME, pair, recipe.schedule, loss, identity)


def _judge(pair: Pair, real: Tensor, fake: Tensor) -> Tensor:
    """The hinge loss of the discriminator."""
    scores, _ = pair.discriminator(torch.cat([real, fake]))
    of_real, of_fake = scores.float().chunk(2)
    return F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean()


def _realism(pair: Pair, real: Tensor, fake: Tensor, matching: float) -> Tensor:
    score, features = pair.fixed(fake)
    with torch.no_grad():
        _, wanted = pair.fixed(real)
    apart = torch.stack(
        [F.l1_loss(a.float(), b.float()) for a, b in zip(features, wanted, strict=True)]
    )
    return matching * apart.mean() - score.float().mean()


def _size(loss: Tensor, at: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, at, retain_graph=True)
    return gradient.norm()
