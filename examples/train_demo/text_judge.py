"""What a classifier and its features say of images that the text demo draws for captions.

accuracy: share of images that the classifier takes for the class their caption names. fd: Fréchet
distance of its features to those of test images. The captions are those of as many test images.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from bits_stage import TEST_BATCH, test_numbers
from data import Images
from text_recipe import TextRecipe
from text_stage import captions_of, encoder

import varptq
from varptq.evaluate.features import FeatureNetwork, part_of
from varptq.evaluate.frechet import Gaussian, frechet_distance
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import spread
from varptq.models.texts import TextPrompts
from varptq.pictures import Pixels, to_pixels
from varptq.progress import Progress


class Drawn(NamedTuple):
    """Images (N, H, W, 3) uint8, their captions, and what they measure."""

    pixels: Pixels
    texts: list[str]
    measures: dict[str, float]


def judged(
    recipe: TextRecipe,
    pipe: Pipeline,
    images: Images,
    network: FeatureNetwork,
    count: int,
    progress: Progress,
) -> Drawn:
    """Of `count` images, drawn as the model draws where nobody says otherwise."""
    numbers = spread(len(images.labels), count)
    texts = captions_of(images, numbers, recipe.seed)
    prompts = TextPrompts.of(encoder(recipe).features(texts), texts)
    output = varptq.generate(
        pipe, prompts, seed=recipe.seed, batch_size=TEST_BATCH, progress=progress
    ).images
    assert output is not None
    pixels = to_pixels(output)
    drawn, hits = Gaussian(), 0
    rows = zip(
        torch.from_numpy(pixels).split(TEST_BATCH),
        images.labels[numbers].split(TEST_BATCH),
        strict=True,
    )
    for part, labels in rows:
        features = network(part)
        drawn.update(features.pooled)
        called = part_of(features, "probabilities", network.name).argmax(-1).cpu()
        hits += int((called == labels).sum())
    real = Gaussian()
    for part in images.pixels[test_numbers(images)].split(TEST_BATCH):
        real.update(network(part.permute(0, 2, 3, 1)).pooled)
    measures = {"accuracy": hits / count, "fd": frechet_distance(drawn, real)}
    return Drawn(pixels, texts, measures)
