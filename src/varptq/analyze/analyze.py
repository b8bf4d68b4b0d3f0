"""`analyze`: every measurement on one set of images, as one plain document.

The float model generates the images itself, from seeds that calibration does not use by default.
The suggestion is chosen on them and verified on as many others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from varptq.analyze.attention import attention_statistics
from varptq.analyze.autoencoder import decoder_costs
from varptq.analyze.bench import FLOAT, Bench, Divergence, sites, spec_of, with_specs
from varptq.analyze.sensitivity import Sensitivity, put_back_groups, sensitivities
from varptq.analyze.suggest import Budget, Prices, Suggestion, suggest
from varptq.evaluate.attention import product_errors
from varptq.models.bare import bare, check_layers
from varptq.models.cross import Mixes
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import Prompts, spread
from varptq.models.sampling import SamplingSettings
from varptq.models.sampling_defaults import MAX_IMAGES
from varptq.progress import Progress, silent
from varptq.quant.config import QuantConfig
from varptq.quant.quantizers import MAX_BITS, MIN_BITS
from varptq.settings import Settings
from varptq.torch_state import plain_torch

# The errors of the products are means over many tokens; more images would not change the figures.
PRODUCT_IMAGES = 8
# Every convolution of the decoder decodes them once, which takes seconds an image.
DECODED_IMAGES = 2


class AnalysisConfig(Settings):
    """images: how many to measure on, and as many more to verify on. widths: bits at which each
    tensor is measured. seed: of the images; calibration's default is 0, so these are held out.
    """

    images: int = Field(default=8, ge=1, le=MAX_IMAGES)
    widths: tuple[int, ...] = (8, 6, 4)
    seed: int = Field(default=1, ge=0)
    sampling: SamplingSettings = SamplingSettings()

    @field_validator("widths")
    @classmethod
    def _known_widths(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        wrong = [bits for bits in widths if not MIN_BITS <= bits <= MAX_BITS]
        if wrong or not widths:
            raise ValueError(f"expected one or more widths in {MIN_BITS}..{MAX_BITS}")
        return tuple(sorted(set(widths), reverse=True))


@dataclass(frozen=True)
class Analysis:
    """`document`: plain JSON values. `mixed`: the suggested config."""

    document: dict[str, Any]
    mixed: QuantConfig


@plain_torch()
def analyze(
    pipe: Pipeline,
    config: QuantConfig,
    *,
    budget: Budget | None = None,
    settings: AnalysisConfig | None = None,
    prompts: Any = None,
    progress: Progress = silent,
) -> Analysis:
    """Find where `config` loses quality on this float model, and a mixed config within `budget`.

    Weights are rounded to nearest and shift-and-sum is off. budget: 1.1 times the BOPs of `config`
    by default. prompts: to draw images for, as `Pipeline.prompts` takes them; None is the model's
    own pool. Raises `InputError` for a quantized pipeline or a budget below what `config` costs,
    `ConfigError` for settings that contradict the model.
    """
    pipe = bare(pipe).drawing_for(prompts)
    check_layers(pipe, hooks=True)
    settings, budget = settings or AnalysisConfig(), budget or Budget()
    settings = settings.replace(sampling=pipe.filled(settings.sampling))
    started, prices = time.monotonic(), Prices(pipe)
    budget.limit(prices.of(config, budget.unit))
    asked, tokens = images(pipe, settings, progress)
    bench = Bench(pipe, asked, tokens[: settings.images], sampling=settings.sampling)
    base = bench.kl(config)
    groups = put_back_groups(bench, config)
    measured = sensitivities(bench, config, settings.widths, progress)
    suggestion = suggest(bench, config, measured, budget, progress)
    products = errors_of_products(bench, config)
    texts = of_texts(bench, config)
    bench.configure(FLOAT)  # its quantized weights go before the second bench makes its own
    other = Bench(pipe, asked, tokens[settings.images :], sampling=settings.sampling)
    document = {
        "model": pipe.name,
        "sources": pipe.sources,
        "config": config.to_dict(),
        "settings": settings.to_dict(),
        "torch": torch.__version__,
        "kinds": kinds(bench),
        "base": base.to_dict() | {"bytes": prices.bytes(config), "bops": prices.bops(config)},
        "groups": {name: found.to_dict() for name, found in groups.items()},
        "tensors": [row.to_dict() for row in ranked(measured, settings.widths)],
        "product_errors": products,
        "attention": attention_statistics(
            pipe, bench.samples.prompts, bench.samples.tokens
        ).to_dict(),
        **texts,
        "autoencoder": decoder_costs(pipe.vae, config, tokens[:DECODED_IMAGES]),
        "suggestion": {
            **suggestion.to_dict(),
            "bits": bits_of(bench, suggestion),
            "bytes": prices.bytes(suggestion.config),
            "bops": prices.bops(suggestion.config),
            "verified": verify(other, config, suggestion),
        },
        "seconds": time.monotonic() - started,
    }
    return Analysis(document, suggestion.config)


def images(pipe: Pipeline, settings: AnalysisConfig, progress: Progress) -> tuple[Prompts, Tensor]:
    """N prompts, spread evenly over the pool, and tokens of 2N images: N to measure on, then as
    many of the same prompts to verify on."""
    pool = pipe.pool()
    prompts = pool[spread(len(pool), settings.images)]
    tokens = generate(
        pipe,
        prompts.joined(prompts),
        seed=settings.seed,
        **settings.sampling.to_dict(),
        decode=False,
        progress=progress,
    ).tokens
    return prompts, tokens


def kinds(bench: Bench) -> list[str]:
    """Kinds of tensors in model order, each once."""
    return list(dict.fromkeys(site.kind for site in sites(bench.source.var)))


def ranked(measured: list[Sensitivity], widths: tuple[int, ...]) -> list[Sensitivity]:
    """Sorted by the cost at the narrowest width, highest first."""
    return sorted(measured, key=lambda row: -row.alone[min(widths)].kl)


def of_texts(bench: Bench, config: QuantConfig) -> dict[str, Any]:
    """What the document says of attention over texts, nothing where there is none."""
    if not Mixes.of(bench.source.var).text:
        return {}
    prompts, tokens = bench.samples.prompts, bench.samples.tokens
    statistics = attention_statistics(bench.source, prompts, tokens, text=True)
    errors = errors_of_products(bench, config, text=True)
    return {"text_product_errors": errors, "text_attention": statistics.to_dict()}


def errors_of_products(
    bench: Bench, config: QuantConfig, *, text: bool = False
) -> dict[str, list[list[float]]]:
    """(blocks, K) error energy of p v with both operands quantized as in `config`, and with one:
    of attention over tokens, or with `text` over texts."""
    every = sites(bench.source.var)
    without = {
        "both": None,
        "probabilities": "value",
        "values": "probability",
    }
    found: dict[str, list[list[float]]] = {}
    for name, left_out in without.items():
        floats = dict.fromkeys(site for site in every if site.operand == left_out)
        var = bench.configure(with_specs(config, floats))
        both = Mixes.of(var)
        mixes = list((both.text if text else both.tokens).values())
        few = bench.samples.first(PRODUCT_IMAGES)
        errors = product_errors(bench.source, mixes, few.prompts, few.tokens, text=text)
        found[name] = errors.tolist()
    return found


def bits_of(bench: Bench, suggestion: Suggestion) -> list[dict[str, Any]]:
    """Bits of every quantized tensor in the suggested config."""
    specs = [(site, spec_of(suggestion.config, site)) for site in sites(bench.source.var)]
    return [{**site.to_dict(), "bits": spec.num_bits} for site, spec in specs if spec is not None]


def verify(other: Bench, config: QuantConfig, suggestion: Suggestion) -> dict[str, Any]:
    """Both configs measured on images that were not used for the choice."""
    found: dict[str, Divergence] = {"base": other.kl(config), "mixed": other.kl(suggestion.config)}
    return {name: divergence.to_dict() for name, divergence in found.items()}
