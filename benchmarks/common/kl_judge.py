"""How far a quantized model is from the float one on held-out images, and the model as users run it
(for quality4bit.py and means_samples.py)."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import varptq
from benchmarks.common.held_out import HELD_OUT_SEED
from varptq.calibrate.samples import CalibrationSet
from varptq.evaluate.frechet import Gaussian, frechet_distance
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline
from varptq.models.reading import guided_logits, kl_divergence
from varptq.quant.pipeline import QuantizedPipeline

CFG, SAMPLED = 1.5, 60


class Judge:
    """Float answers on held-out images, computed once."""

    def __init__(self, pipe: Pipeline, test: CalibrationSet) -> None:
        self.pipe, self.test = pipe, test
        self.answers = self._logits(pipe)

    @torch.no_grad()
    def _logits(self, pipe: Pipeline) -> list[Tensor]:
        """(images, l, V) of each scale."""
        parts: list[list[Tensor]] = []
        for labels, ids in zip(
            self.test.prompts.split(16), self.test.tokens.split(16), strict=True
        ):
            parts.append([x for _, x in guided_logits(pipe, labels, ids, CFG)])
        return [torch.cat(scale) for scale in zip(*parts, strict=True)]

    def kl(self, pipe: Pipeline) -> dict[str, Any]:
        """Mean KL, KL and top-1 agreement per scale."""
        pairs = list(zip(self.answers, self._logits(pipe), strict=True))
        kls = [kl_divergence(p, q) for p, q in pairs]
        same = torch.cat([(p.argmax(-1) == q.argmax(-1)).flatten() for p, q in pairs])
        return {
            "kl": float(torch.cat([x.flatten() for x in kls]).mean()),
            "kl_per_scale": [float(x.mean()) for x in kls],
            "top1": float(same.double().mean()),
        }

    @cache  # noqa: B019
    def float_features(self) -> Gaussian:
        return Gaussian.of(self.features(self.pipe))

    @torch.no_grad()
    def features(self, pipe: Pipeline) -> Tensor:
        """(SAMPLED, 64) of images sampled from the same seeds by every model."""
        labels = torch.arange(SAMPLED) % self.pipe.var.arch.num_classes
        images = generate(pipe, labels, seed=HELD_OUT_SEED, cfg=CFG, batch_size=20).images
        assert images is not None
        found = [self.pipe.vae.features(part * 2 - 1) for part in images.split(20)]
        return torch.cat([torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1) for x in found])

    def distance(self, pipe: Pipeline) -> float:
        return frechet_distance(self.float_features(), Gaussian.of(self.features(pipe)))


def on_integers(pipe: QuantizedPipeline) -> Pipeline:
    """As users run it, and in a fifteenth of the time."""
    with tempfile.TemporaryDirectory() as folder:
        varptq.save(pipe, Path(folder) / "model")
        return varptq.load(Path(folder) / "model", runtime="cpu")
