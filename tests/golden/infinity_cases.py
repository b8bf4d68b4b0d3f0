"""A golden case of Infinity as models, prompts and arrays, and comparisons within a tolerance."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golden.conftest import Golden
from varptq.models.infinity.bsqvae import BSQVAE
from varptq.models.infinity.guidance import with_mixtures
from varptq.models.infinity.transformer import Infinity
from varptq.models.pipeline import Pipeline, load_model
from varptq.models.sampling import LOGITS, at_tau, guided
from varptq.models.scales import Scales
from varptq.models.seams import run_stages, spans_of
from varptq.models.texts import TextPrompts

# The order of float32 sums is all that may differ (README of the golden data, "Tolerances").
TABLE, SUM, HIDDEN, GUIDED, IMAGE, PROBABILITY = 1e-6, 1e-6, 1e-4, 3e-4, 1e-4, 1e-4

Arrays = dict[str, np.ndarray]


def texts(data: Arrays, name: str = "feature") -> list[Tensor]:
    """Features of each prompt; `name` is "feature" or "negative"."""
    joined = torch.from_numpy(data["features" if name == "feature" else "negative_features"])
    return list(joined.split(data[f"{name}_lens"].tolist()))


def close(found: Tensor, expected: np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=tolerance, rtol=0.0)


def mixed_logits(logits_2BlV: Tensor, cfg: float, tau: float, insertion: Sequence[int]) -> Tensor:
    """(2B, l, V) of a pass `with_mixtures` -> (B, l, V) at temperature `tau`."""
    scaled_2BlV = at_tau(logits_2BlV, tau)
    return guided(scaled_2BlV, cfg - 1) if LOGITS in insertion else scaled_2BlV.chunk(2)[0]


@dataclass(frozen=True)
class Case:
    """One file: the pipeline over its schedule, and its prompts."""

    data: Arrays
    pipe: Pipeline
    prompts: TextPrompts

    @property
    def var(self) -> Infinity:
        assert isinstance(self.pipe.var, Infinity)
        return self.pipe.var

    @property
    def vae(self) -> BSQVAE:
        assert isinstance(self.pipe.vae, BSQVAE)
        return self.pipe.vae

    @property
    def bits(self) -> Tensor:
        return torch.from_numpy(self.data["bits"]).long()

    @property
    def both_rows(self) -> Tensor:
        """Input tokens of rows [asked; nothing]."""
        return torch.from_numpy(self.data["inputs"]).repeat(2, 1, 1)

    @classmethod
    def load(cls, golden: Golden, file: str) -> Case:
        data = golden.npz(file)
        files = [golden.path(str(data[name])) for name in ("model_file", "vae_file")]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a tensor that is ignored
            pipe = load_model(var=files[0], vae=files[1])
        rope_last = data["rope_last"].tolist()
        scales = Scales(data["scales"].tolist(), (rope_last[0], rope_last[1]))
        return cls(data, pipe.over(scales), TextPrompts.of(texts(data)))

    def settings(self) -> list[str]:
        return [name.removesuffix(".insertion") for name in self.data if "insertion" in name]

    def asked(self, setting: str) -> TextPrompts:
        """The prompts of a setting, with its negative ones."""
        negative = setting == "negative"
        return (
            self.prompts.instead_of(TextPrompts.of(texts(self.data, "negative")))
            if negative
            else self.prompts
        )


class Steps:
    """The cached pass, scale by scale, with the guidance of a setting."""

    def __init__(self, case: Case, prompts: TextPrompts, cfg: Any, tau: Any, insertion: Any):
        self.case, self.cfg, self.tau = case, cfg, tau
        self.insertion = [int(entry) for entry in insertion]
        rows = prompts.guided()
        self.condition = case.var.condition(rows)
        self.stages = case.var.stages(self.condition)
        self.cache = case.var.new_cache(len(rows))

    def logits(self, scale: int, f_hat: Tensor) -> Tensor:
        """(B, l, 2D) after mixing and temperature."""
        var, cfg = self.case.var, float(self.cfg[scale])
        spans = spans_of(var.scales, scale, scale + 1)
        if scale == 0:
            x_BlC = var.embed_first(self.condition)
        else:
            inputs = self.case.vae.next_input(f_hat, scale - 1)
            x_BlC = var.embed_inputs(inputs, spans).repeat(2, 1, 1)
        strengths = [cfg - 1] * var.scales.num_scales
        stages = with_mixtures(self.stages, strengths, self.insertion)
        logits = run_stages(stages, x_BlC, spans, self.cache)
        return mixed_logits(logits, cfg, float(self.tau[scale]), self.insertion)

    def forced(self, bits: Tensor) -> Iterator[Tensor]:
        """Logits of every scale, given all bits."""
        f_hat = self.case.vae.zeros(len(bits))
        for scale, part in enumerate(self.case.var.scales.slices()):
            yield self.logits(scale, f_hat)
            f_hat = self.case.vae.add_scale(f_hat, self.case.vae.embed(bits[:, part]), scale)
