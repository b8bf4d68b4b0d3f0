"""The metrics by name: what each says, which direction is better, and what it needs.

One table for the computation (evaluate.py), the command line and the report. No formula is here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from varptq.errors import InputError
from varptq.readable import percent, significant


@dataclass(frozen=True)
class Metric:
    """`sentence` explains it to someone outside the field; `style` is how its number is written:
    "nats", "share", "dB", "score" or "distance". `needs` are keys of `NEEDS`."""

    title: str
    sentence: str
    better: Literal["lower", "higher"]
    style: str
    needs: tuple[str, ...]

    def written(self, value: float | None) -> str:
        """A number of this metric with its unit; None, an infinite PSNR, is "identical"."""
        if value is None:
            return "identical"
        if self.style == "share":
            return percent(value)
        if self.style == "nats":
            return f"{significant(value)} nats"
        if self.style == "dB":
            return f"{value:.2f} dB"
        return f"{value:.3f}" if self.style == "score" else f"{value:.2f}"


# What a metric may need, and how to provide it.
NEEDS = {
    "pair": "the float model beside a quantized one (--against, or --var with --vae)",
    "network": "a feature network (--network, e.g. inception:/path/to/file.pt)",
    "spatial": "a feature network with spatial features, as the FID Inception has",
    "probabilities": "a feature network with class probabilities, as the full FID Inception has",
    "reference": "real images (--reference, an npz with arr_0 or a folder of pictures; statistics "
    "of images are not enough)",
    "moments": "real images or their statistics (--reference: a folder of pictures, or an npz with "
    "arr_0, or with mu and sigma)",
    "spatial moments": "real images or their spatial statistics (--reference: a folder of "
    "pictures, or an npz with arr_0, or with mu_s and sigma_s)",
    "lpips": "the LPIPS weights (--lpips FILE)",
    "side11": "images of at least 11 x 11 pixels",
    "side31": "images of at least 31 x 31 pixels",
    "two": "at least 2 images in each set",
    "four": "at least 4 images in each set: k = 3 neighbours beside the image itself",
    "clip": "transformers with a CLIP model (--clip), and texts, or classes with names",
}

METRICS: dict[str, Metric] = {
    "kl": Metric(
        "KL divergence",
        "How far the quantized model's next-token distribution lies from the float model's when "
        "both read the same tokens.",
        "lower",
        "nats",
        ("pair",),
    ),
    "kl_filtered": Metric(
        "KL divergence, filtered",
        "The same among the candidates that top-k and top-p leave, from which tokens are drawn.",
        "lower",
        "nats",
        ("pair",),
    ),
    "top1": Metric(
        "Top-1 agreement",
        "Share of positions where both models have the same most likely token after the same "
        "context.",
        "higher",
        "share",
        ("pair",),
    ),
    "token_agreement": Metric(
        "Token agreement",
        "Share of equal tokens when both draw whole images from the same noise; one early "
        "difference changes all that follows.",
        "higher",
        "share",
        ("pair",),
    ),
    "psnr": Metric(
        "PSNR",
        "Pixel error between the two images of a seed; low for a different image, even for a good "
        "one.",
        "higher",
        "dB",
        ("pair",),
    ),
    "ssim": Metric(
        "SSIM",
        "Likeness of local structure between the two images of a seed; 1 is identical.",
        "higher",
        "score",
        ("pair", "side11"),
    ),
    "lpips": Metric(
        "LPIPS",
        "Perceptual distance between the two images of a seed, by features of AlexNet.",
        "lower",
        "score",
        ("pair", "lpips", "side31"),
    ),
    "fid2fp": Metric(
        "FID to the float model",
        "Distance between the feature distributions of quantized and float samples: what "
        "quantization alone moves.",
        "lower",
        "distance",
        ("pair", "network", "two"),
    ),
    "fid": Metric(
        "FID",
        "Distance between the feature distributions of samples and real images.",
        "lower",
        "distance",
        ("network", "moments", "two"),
    ),
    "sfid": Metric(
        "sFID",
        "The same on spatial features, which see where things stand.",
        "lower",
        "distance",
        ("network", "spatial", "spatial moments", "two"),
    ),
    "is": Metric(
        "Inception Score",
        "Whether a classifier is sure of every sample and the classes are all there.",
        "higher",
        "distance",
        ("network", "probabilities"),
    ),
    "precision": Metric(
        "Precision",
        "Share of samples that lie among real images, in features with k = 3 neighbours.",
        "higher",
        "share",
        ("network", "reference", "four"),
    ),
    "recall": Metric(
        "Recall",
        "Share of real images that lie among samples: variety.",
        "higher",
        "share",
        ("network", "reference", "four"),
    ),
    "clip": Metric(
        "CLIP score",
        "How well an image fits its text, by CLIP: its prompt, or 'a photo of a <class>'.",
        "higher",
        "distance",
        ("clip",),
    ),
}


def titled(name: str, network: str | None) -> str:
    """The title of a metric, with the feature network if that is not the usual one."""
    metric = METRICS[name]
    foreign = "network" in metric.needs and network not in (None, "inception")
    return f"{metric.title} ({network})" if foreign else metric.title


def sources(document: Mapping[str, Any]) -> str:
    """The images, or statistics of images, that the metrics of a document were computed from: "FID,
    sFID: mu and sigma of x.npz; ..."; "" if it does not say."""
    by_source: dict[str, list[str]] = {}
    for name, source in document.get("taken_from", {}).items():
        by_source.setdefault(source, []).append(METRICS[name].title)
    return "; ".join(f"{', '.join(names)}: {source}" for source, names in by_source.items())


def choose(
    asked: Collection[str] | None, have: Collection[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The metrics to compute, and for each other metric what is missing: name -> reason.

    asked: names from `METRICS`, None for all that are possible. have: keys of `NEEDS` that are
    available. Raises `InputError` for an unknown name, and if a metric in `asked` lacks something.
    """
    if asked is None:
        if not {"pair", "network", "clip"} & set(have):
            raise InputError(
                f"metrics: none can be computed; give {NEEDS['pair']} or {NEEDS['network']}"
            )
        missing = {name: _missing(name, have) for name in METRICS}
        chosen = tuple(name for name, need in missing.items() if need is None)
        return chosen, {name: NEEDS[need] for name, need in missing.items() if need}
    for name in asked:
        if name not in METRICS:
            raise InputError(f"metric {name!r}: unknown; metrics are {', '.join(METRICS)}")
        if need := _missing(name, have):
            raise InputError(f"metric {name!r}: needs {NEEDS[need]}")
    if not asked:
        raise InputError(f"metrics: none given; give some of {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in asked), {}


def _missing(name: str, have: Collection[str]) -> str | None:
    return next((need for need in METRICS[name].needs if need not in have), None)
