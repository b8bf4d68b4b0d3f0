"""Second stage: the transformer, next-scale prediction on the tokens of the trained VQVAE.

    loss = mean over images and tokens of -log p(id | tokens of coarser scales, class)
Tokens of every training image and of its mirror image are computed once. Labels are dropped with
some probability, so that one model answers with and without a class, as guidance asks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import Dataset, Images
from loop import Batches, Stage, generator
from recipe import Recipe
from torch import Tensor

from varptq.files import write_atomic
from varptq.models.var.transformer import VAR, randomize
from varptq.models.var.vqvae import VQVAE
from varptq.progress import Progress

NAME = "var"
TOKEN_BATCH = 250
# A fresh head says nothing: its logits start at zero but for this share.
HEAD_SHARE = 0.02


def build(recipe: Recipe, num_classes: int, device: torch.device) -> VAR:
    var = VAR(recipe.var.arch(recipe.scales, num_classes, recipe.vqvae))
    randomize(var, generator(recipe.seed, NAME, "weights"))
    with torch.no_grad():
        var.head.weight.mul_(HEAD_SHARE)
        for name, parameter in var.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return var.to(device)


@torch.no_grad()
def tokens(
    vqvae: VQVAE, images: Images, path: Path, stage: str, device: torch.device, progress: Progress
) -> Tensor:
    """(2, N, L) int64 ids of all images and of their mirror images, kept in `path`."""
    if not path.is_file():
        parts, total = [], 2 * len(images.labels)
        progress(stage, 0, total)
        for flipped in (False, True):
            for index in torch.arange(len(images.labels)).split(TOKEN_BATCH):
                flip = torch.full((len(index),), flipped)
                ids = vqvae.encode(images.batch(index, flip, device))
                parts.append(ids.cpu().numpy().astype(np.uint16))
                progress(stage, sum(map(len, parts)), total)
        whole = np.concatenate(parts).reshape(2, len(images.labels), -1)
        write_atomic(path, lambda file: np.savez(file, ids=whole))
    with np.load(path, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["ids"].astype(np.int64))


def stage(
    recipe: Recipe,
    var: VAR,
    vqvae: VQVAE,
    ids_2NL: Tensor,
    labels_N: Tensor,
    device: torch.device,
    identity: dict[str, Any],
) -> Stage:
    """The loop of this stage."""
    settings, schedule = recipe.var, recipe.var.schedule
    batches = Batches(len(labels_N), schedule.batch, recipe.seed, NAME)

    def loss(step: int) -> Tensor:
        index = batches(step)
        draws = generator(recipe.seed, NAME, "batch", step)
        mirrored, dropped = torch.rand(2, len(index), generator=draws)
        ids = ids_2NL[(mirrored < 0.5).long(), index].to(device)
        labels = labels_N[index].masked_fill(dropped < settings.drop_label, var.arch.num_classes)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            return cross_entropy(var, vqvae, ids, labels.to(device))

    return Stage(NAME, var, schedule, loss, identity)


def cross_entropy(var: VAR, vqvae: VQVAE, ids_BL: Tensor, labels_B: Tensor) -> Tensor:
    """Mean over images and tokens, nats."""
    with torch.no_grad():
        inputs = vqvae.teacher_inputs(ids_BL)
    return F.cross_entropy(var(labels_B, inputs).flatten(0, 1), ids_BL.flatten())


@torch.no_grad()
def measure(var: VAR, vqvae: VQVAE, dataset: Dataset, device: torch.device) -> dict[str, float]:
    """Cross-entropy on the test images with their classes, nats per token."""
    total, images = 0.0, dataset.test
    for index in torch.arange(len(images.labels)).split(TOKEN_BATCH):
        x = images.batch(index, torch.zeros(len(index), dtype=torch.bool), device)
        ids, labels = vqvae.encode(x), images.labels[index].to(device)
        total += float(cross_entropy(var, vqvae, ids, labels)) * len(index)
    return {"test_loss": total / len(images.labels)}
