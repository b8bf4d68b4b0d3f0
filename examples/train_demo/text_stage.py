"""Second stage of the text demo: the transformer, next-scale prediction of bits from a caption.

    loss = mean over images, tokens and bits of -log p(bit | tokens of coarser scales, caption)
Bits are those of the trained autoencoder, computed batch by batch. Every step writes the captions
of its images anew (captions.py); some are left out, so that one model answers with and without a
text, as guidance asks. Some bits of what is read are flipped, and what is predicted then corrects
them (Infinity's bitwise self-correction): tokens that were drawn are not always right.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from bits_stage import TEST_BATCH, take, test_numbers
from captions import caption, seen
from data import Dataset, Images
from loop import Batches, Stage, generator
from text_recipe import TextRecipe
from torch import Tensor

from varptq.models.infinity.bsqvae import BSQVAE
from varptq.models.infinity.fresh import randomize
from varptq.models.infinity.transformer import BIT, Infinity
from varptq.models.infinity.words import HashedWords
from varptq.models.scales import Scales
from varptq.models.texts import TextPrompts

NAME = "infinity"
# A fresh head says nothing: its logits start at zero but for this share. What a block adds starts
# at this share of what it computes, however little the text says yet.
HEAD_SHARE, BLOCK_SHARE = 0.02, 0.5


def build(
    recipe: TextRecipe, token_bits: int, start: Mapping[str, Tensor], device: torch.device
) -> Infinity:
    """A transformer: fresh, but for what `start` has of it."""
    infinity = Infinity(recipe.infinity.arch(recipe.scales, token_bits))
    randomize(infinity, generator(recipe.seed, NAME, "weights"))
    with torch.no_grad():
        infinity.head.weight.mul_(HEAD_SHARE)
        for name, parameter in infinity.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            if name.endswith("ada_gss"):
                parameter[:, :, :2] = BLOCK_SHARE
    take(infinity, start)
    return infinity.to(device)


def encoder(recipe: TextRecipe) -> HashedWords:
    return HashedWords(recipe.infinity.text_channels, recipe.infinity.text_maxlen)


def stage(
    recipe: TextRecipe,
    infinity: Infinity,
    vae: BSQVAE,
    images: Images,
    device: torch.device,
    identity: dict[str, Any],
) -> Stage:
    """The loop of this stage."""
    settings, schedule = recipe.infinity, recipe.infinity.schedule
    batches = Batches(len(images.labels), schedule.batch, recipe.seed, NAME)
    labels, words = images.labels.tolist(), encoder(recipe)
    # What all images show takes a minute to see, which a finished stage is spared.
    pictures = cache(lambda: seen(images.pixels))
    weights_L1 = _weights(recipe.scales, settings.by_side).to(device)

    def loss(step: int) -> Tensor:
        index = batches(step)
        draws = generator(recipe.seed, NAME, "batch", step)
        mirrored, dropped, strength = torch.rand(3, len(index), generator=draws)
        x = images.batch(index, mirrored < 0.5, device)
        texts = [caption(pictures()[i], labels[i], recipe.seed, step) for i in index.tolist()]
        prompts = without(TextPrompts.of(words.features(texts)), dropped < settings.drop_text)
        shape = (len(index), recipe.scales.num_tokens, vae.alphabet.draws)
        chance_B11 = settings.flips * strength.view(-1, 1, 1)
        flips = (torch.rand(shape, generator=draws) < chance_B11).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            losses_BLD = cross_entropy(infinity, vae, prompts, x, flips)
            return (losses_BLD * weights_L1).mean()

    return Stage(NAME, infinity, schedule, loss, identity)


def _weights(scales: Scales, by_side: bool) -> Tensor:
    """(L, 1), of mean 1."""
    sides = [height if by_side else 1 for height, _ in scales.sides]
    weights_L = 1 / torch.tensor(sides, dtype=torch.float32)[scales.scale_of_L()]
    return (weights_L / weights_L.mean()).unsqueeze(1)


def without(prompts: TextPrompts, dropped_B: Tensor) -> TextPrompts:
    """The same prompts, some of them nothing."""
    pairs = zip(prompts.rows, prompts.nothing().rows, dropped_B.tolist(), strict=True)
    return TextPrompts(tuple(nothing if dropped else row for row, nothing, dropped in pairs))


def cross_entropy(
    infinity: Infinity, vae: BSQVAE, prompts: TextPrompts, x_B3SS: Tensor, flips_BLD: Tensor | None
) -> Tensor:
    """(B, L, D) float32 nats of every bit of images in [-1, 1]."""
    with torch.no_grad():
        features = vae.features(x_B3SS).float()
        bits_BLD = vae.pyramid.encode(features, flips_BLD)
        read_BLD = bits_BLD if flips_BLD is None else bits_BLD ^ flips_BLD.long()
        inputs = vae.teacher_inputs(read_BLD)
    logits_NV = infinity(prompts, inputs).float().reshape(-1, BIT)
    return F.cross_entropy(logits_NV, bits_BLD.flatten(), reduction="none").view(bits_BLD.shape)


@torch.no_grad()
def measure(
    recipe: TextRecipe, infinity: Infinity, vae: BSQVAE, dataset: Dataset, device: torch.device
) -> dict[str, float]:
    """Cross-entropy on those test images, nats per bit, with their captions and without any."""
    images, words = dataset.test, encoder(recipe)
    numbers = test_numbers(images)
    totals = {"test_loss": 0.0, "test_loss_without_text": 0.0}
    for index in numbers.split(TEST_BATCH):
        x = images.batch(index, torch.zeros(len(index), dtype=torch.bool), device)
        prompts = TextPrompts.of(words.features(captions_of(images, index, recipe.seed)))
        for name, rows in zip(totals, (prompts, prompts.nothing()), strict=True):
            losses_BLD = cross_entropy(infinity, vae, rows, x, None)
            totals[name] += float(losses_BLD.mean()) * len(index)
    return {name: total / len(numbers) for name, total in totals.items()}


def captions_of(images: Images, index: Tensor, seed: int) -> list[str]:
    """One of each of these images, the number being the image's."""
    rows = zip(seen(images.pixels[index]), images.labels[index].tolist(), strict=True)
    numbered = zip(rows, index.tolist(), strict=True)
    return [caption(picture, label, seed, number) for (picture, label), number in numbered]
