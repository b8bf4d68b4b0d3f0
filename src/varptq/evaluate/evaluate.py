"""`evaluate`: everything that can be measured on two sets of samples, as one plain document.

The subject is usually a quantized pipeline with its samples, compared with the float pipeline and
its samples from the same seeds. Each metric has its formula in a file of its own; what they mean
and need is in catalogue.py, and preflight.py checks that it is available. Sampling, files and pages
are elsewhere.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from varptq.errors import InputError
from varptq.evaluate import statistics
from varptq.evaluate.catalogue import METRICS
from varptq.evaluate.distributions import FeatureSums, collect, cut, measure
from varptq.evaluate.frechet import Gaussian, bias_of_means, frechet_distance
from varptq.evaluate.image_files import ImageFiles
from varptq.evaluate.pairs import PairSums, Tally, codebook_use
from varptq.evaluate.preflight import Instruments, plan
from varptq.evaluate.references import AGAINST_REAL, about_reference, of_statistics, sources_of
from varptq.evaluate.sampling import PROMPTS, SampleSet, title
from varptq.evaluate.tokens import token_fidelity
from varptq.models.bare import bare
from varptq.models.pipeline import Pipeline
from varptq.progress import Progress, silent
from varptq.quant.pipeline import QuantizedPipeline
from varptq.torch_state import plain_torch
from varptq.work import Piece, Work, pack, unpack

FORMAT_VERSION = 1
# Each image gives many tokens, so these means settle long before the image metrics.
DEFAULT_TOKEN_IMAGES = 256
TOKEN_CHUNK, FEATURE_BATCH = 8, 32
TOKEN_METRICS = ("kl", "kl_filtered", "top1")
FEATURE_METRICS = ("fid2fp", "is", *AGAINST_REAL)


@dataclass(frozen=True)
class Subject:
    """A pipeline and the images it sampled."""

    pipe: Pipeline
    samples: SampleSet

    def drawing_for(self, prompts: Any) -> Subject:
        """With the networks themselves, and these prompts where they are not None. Raises
        `InputError` where the samples were drawn for others."""
        pipe = bare(self.pipe).drawing_for(prompts)
        found, expected = self.samples.identity.get(PROMPTS), pipe.chosen and pipe.chosen.sha256()
        if found != expected:
            raise InputError(
                f"prompts: the samples in {self.samples.folder} are not of the {len(pipe.pool())} "
                "prompts given; give those that they were drawn for"
            )
        return replace(self, pipe=pipe)


@plain_torch()
def evaluate(
    subject: Subject,
    against: Subject | None = None,
    *,
    instruments: Instruments | None = None,
    metrics: Collection[str] | None = None,
    prompts: Any = None,
    token_images: int = DEFAULT_TOKEN_IMAGES,
    progress: Progress = silent,
    work: Work | None = None,
) -> dict[str, Any]:
    """Measure `subject`, and compare it with the float model `against` if given.

    metrics: names of `catalogue.METRICS`; None computes all that are possible, and the document
    says what is missing for the others. prompts: those that `sample_set` was given, where the
    pipelines do not have them as their pool. token_images: how many images the token-level metrics
    read. work: begun by the caller; it shares the passes over images between processes, which all
    return the same document, and keeps finished parts. The document holds JSON values only; an
    infinite PSNR is None. Raises `InputError` for sets that do not match and for metrics that
    cannot be computed.
    """
    if token_images < 1:
        raise InputError(f"token_images {token_images}: must be at least 1")
    subject = subject.drawing_for(prompts)
    theirs = None if prompts is None else subject.pipe.chosen
    against = against.drawing_for(theirs) if against else None
    if against is not None:
        _check_pair(subject, against)
    tools = instruments or Instruments()
    float_pipe = against.pipe if against else None
    chosen, left_out = plan(subject.pipe, float_pipe, tools, metrics, len(subject.samples))
    run = _Run(subject, against, tools, chosen, progress, work or Work())
    run.compare_tokens(token_images)
    run.compare_images()
    run.compare_distributions()
    return {
        "format_version": FORMAT_VERSION,
        "title": title(subject.pipe),
        "kind": kind(subject.pipe),
        "compared_with": title(against.pipe) if against else None,
        "metrics": in_order(run.found),
        "float_metrics": in_order(run.of_float),
        "taken_from": run.taken_from,
        "left_out": left_out,
        "warnings": run.warnings,
        "per_scale": run.per_scale,
        "codebook": run.codebook,
        "settings": {
            **subject.samples.identity,
            "count": len(subject.samples),
            "metrics": list(chosen),
            "token_images": min(token_images, len(subject.samples)),
            "network": tools.network.name if tools.network else None,
            "reference_images": (tools.reference.count or None) if tools.reference else None,
        },
        "checksums": run.checksums(),
        "versions": versions(),
        "machine": machine(subject.pipe),
    }


@dataclass
class _Run:
    """The parts of one `evaluate` call and what they found."""

    subject: Subject
    against: Subject | None
    tools: Instruments
    chosen: Sequence[str]
    progress: Progress
    work: Work
    found: dict[str, Any] = field(default_factory=dict)
    of_float: dict[str, Any] = field(default_factory=dict)
    per_scale: dict[str, Any] = field(default_factory=dict)
    codebook: dict[str, Any] = field(default_factory=dict)
    taken_from: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.per_scale["sides"] = self.subject.pipe.scales.plain()

    def compare_tokens(self, num_images: int) -> None:
        """Next-token distributions on tokens the float model drew, a few images at a time."""
        names = [name for name in TOKEN_METRICS if name in self.chosen]
        if not names or self.against is None:
            return
        labels, tokens = self.against.samples.head(num_images)
        pool = self.against.pipe.pool()
        settings = self.subject.samples.sampling
        stage = "compare distributions"
        self.progress(stage, 0, len(labels))
        starts = range(0, len(labels), TOKEN_CHUNK)
        float_pipe = self.against.pipe

        def make(index: int) -> Piece:
            start = starts[index]
            part = slice(start, min(start + TOKEN_CHUNK, len(labels)))
            chunk = token_fidelity(
                float_pipe,
                self.subject.pipe,
                pool[labels[part]],
                tokens[part],
                settings.cfg,
                settings.top_k,
                settings.top_p,
                TOKEN_CHUNK,
                tau=settings.tau,
                guided_scales=settings.guided_scales,
            )
            weight = chunk.num_images / len(labels)
            rows = [(getattr(chunk, n), *getattr(chunk, f"{n}_per_scale")) for n in names]
            self.progress(stage, part.stop, len(labels))
            return Piece({"means": weight * torch.tensor(rows, dtype=torch.float64, device="cpu")})

        pieces = self.work.each([f"tokens-{index}" for index in range(len(starts))], make)
        sums = torch.stack([piece.tensors["means"] for piece in pieces]).sum(0)
        for name, (value, *scales) in zip(names, sums.tolist(), strict=True):
            self.found[name], self.per_scale[name] = value, scales

    def compare_images(self) -> None:
        """The results of one pass over the samples: pairs, CLIP scores and codebook frequencies."""
        pairs, tallies = self._image_sums()
        parts = cut(self.subject.samples.num_shards)
        self.progress("compare images", 0, len(self.subject.samples))
        names = [f"images-{index}" for index in range(len(parts))]
        for piece in self.work.each(names, lambda index: self._compare_part(parts[index])):
            found = unpack(piece)
            pairs.merge(found["pairs"])
            for index, tally in enumerate(tallies):
                tally.merge(found[f"tally{index}"])
        if self.against is not None:
            self.found |= pairs.results()
        if "token_agreement" in self.chosen:
            self.per_scale["token_agreement"] = pairs.agreement_per_scale()
        if "clip" in self.chosen:
            for place, tally in zip((self.found, self.of_float), tallies, strict=False):
                place["clip"] = tally.clip / tally.images
        self.codebook = codebook_use(*(tally.counts_V for tally in tallies))

    def _image_sums(self) -> tuple[PairSums, list[Tally]]:
        """Empty sums: of pairs, and of the images of either model."""
        size = self.subject.pipe.alphabet.size
        models = 1 if self.against is None else 2
        tallies = [Tally(torch.zeros(size, dtype=torch.int64, device="cpu")) for _ in range(models)]
        return PairSums(self.subject.pipe.scales, self.chosen, self.tools.lpips), tallies

    def _compare_part(self, part: range) -> Piece:
        """Sums over the shards of `part`."""
        encoder = self.tools.clip if "clip" in self.chosen else None
        captions = self.subject.pipe.pool().captions() if encoder else ()
        pairs, tallies = self._image_sums()
        subjects = [self.subject, *([self.against] if self.against else [])]
        for shards in zip(*(one.samples.shards(part) for one in subjects), strict=True):
            for tally, shard in zip(tallies, shards, strict=True):
                tally.add(shard, captions, encoder)
            if self.against is not None:
                pairs.add(*shards)
            done = shards[0].first + len(shards[0].images)
            self.progress("compare images", done, len(self.subject.samples))
        packed = {f"tally{index}": tally.pack() for index, tally in enumerate(tallies)}
        return pack({"pairs": pairs.pack(), **packed})

    def compare_distributions(self) -> None:
        """The metrics on the features of a network."""
        network, reference = self.tools.network, self.tools.reference
        wanted = [name for name in FEATURE_METRICS if name in self.chosen]
        if network is None or not wanted:
            return

        def sums_of(images: SampleSet | ImageFiles, what: str, needed: Collection[str]) -> Any:
            stage = f"{network.name} features of {what}"
            return collect(network, images, needed, FEATURE_BATCH, stage, self.progress, self.work)

        ours = sums_of(self.subject.samples, "the samples", wanted)
        of_real = [name for name in AGAINST_REAL if name in wanted]
        widths = {"pooled": ours.pooled.dim, "spatial": ours.spatial.dim}
        published = of_statistics(reference, of_real, widths)
        real = None
        if reference and of_real:
            of_images = [name for name in of_real if name not in published]
            real = FeatureSums(network.name, of_images)
            if of_images:
                real = sums_of(reference, "real images", of_images)
            parts = published.values()
            real.replace({part: statistics.load(reference.path, part) for part in parts})
        if reference:
            self.warnings += about_reference(reference, network.name, of_real, widths)
        self.taken_from = sources_of(wanted, ours.pooled.count, reference, widths)
        self.found |= measure(ours, real, wanted)
        if self.against is not None:
            floats = sums_of(self.against.samples, "the float samples", wanted)
            self.of_float |= measure(floats, real, wanted)
            if "fid2fp" in wanted:
                self.found["fid2fp"] = frechet_distance(ours.pooled, floats.pooled)
        # Published statistics do not say how many images they were computed from.
        others = [] if "fid" in published else [real.pooled if real else ours.pooled]
        self._warn_of_few(ours.pooled, *others)

    def _warn_of_few(self, ours: Gaussian, *others: Gaussian) -> None:
        fewest = min(one.count for one in (ours, *others))
        if 2 <= fewest <= ours.dim:
            bias = bias_of_means(ours, *others)
            self.warnings.append(
                f"Fréchet distances: from {fewest} images with {ours.dim} features each, so they "
                f"are too large, by about {bias:.2g} from the means alone; values worth "
                "quoting need more images than features"
            )

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the models and of the samples."""
        subjects = {"": self.subject, **({"float ": self.against} if self.against else {})}

        def make() -> Piece:
            return Piece(facts={name: one.samples.sha256() for name, one in subjects.items()})

        of_samples, sums = self.work.once("checksums", make).facts, {}
        for name, one in subjects.items():
            sums[f"{name}model"] = one.samples.identity["model_sha256"]
            sums[f"{name}samples"] = of_samples[name]
        return sums


def in_order(found: dict[str, Any]) -> dict[str, Any]:
    """The metrics in the order of the catalogue; a deviation ("is_std") follows its metric."""
    order = list(METRICS)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].removesuffix("_std"))))


def versions() -> dict[str, str]:
    """Versions of the software that computed the numbers."""
    try:
        ours = version("varptq")
    except PackageNotFoundError:  # run from the source tree
        ours = "unknown"
    return {
        "varptq": ours,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def machine(pipe: Pipeline) -> dict[str, str]:
    """Where the numbers were computed."""
    device = pipe.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "threads": str(torch.get_num_threads()),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "runtime": pipe.runtime if isinstance(pipe, QuantizedPipeline) else "float",
        "system": platform.system(),
    }


def kind(pipe: Pipeline) -> str:
    """ "quantized" or "float"."""
    return "quantized" if isinstance(pipe, QuantizedPipeline) else "float"


def _check_pair(subject: Subject, against: Subject) -> None:
    """Raise `InputError` unless the two sets pair up image by image."""
    pairs = {
        "count": (len(subject.samples), len(against.samples)),
        "shard_size": (subject.samples.shard_size, against.samples.shard_size),
        "seed": (subject.samples.identity["seed"], against.samples.identity["seed"]),
        "sampling": (subject.samples.sampling, against.samples.sampling),
        "number of prompts": tuple(len(one.pipe.pool()) for one in (subject, against)),
        "prompts_sha256": tuple(one.samples.identity.get(PROMPTS) for one in (subject, against)),
        "scales": (str(subject.pipe.scales), str(against.pipe.scales)),
        "alphabet": tuple(tuple(one.pipe.alphabet) for one in (subject, against)),
        "image size": tuple(one.pipe.vae.image_size for one in (subject, against)),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise InputError(
                f"models {title(subject.pipe)!r} and {title(against.pipe)!r}: {name} is {ours} and "
                f"{theirs}, expected equal values; compare a model with the one it was made from, "
                "sampled with the same settings"
            )
