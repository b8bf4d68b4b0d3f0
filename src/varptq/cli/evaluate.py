"""`varptq evaluate`: how good a model's images are, compared with those of the float model.

Samples the same seeds with both, computes every metric that is possible, and writes to --out:
`metrics.json`, `report.html` and `samples/`. A run that was stopped continues where it was; a
folder with samples of another model is refused. Everything that can be refused is refused before
sampling.
"""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varptq import readable
from varptq.cli import common, info, options
from varptq.cli.asked import Asked
from varptq.cli.compared import Choices, Models
from varptq.cli.exported import METRICS_NAME, REPORT_NAME, Export, Exported
from varptq.errors import InputError
from varptq.models.sampling_defaults import MAX_IMAGES

if TYPE_CHECKING:
    from varptq.distributed import Ranks
    from varptq.evaluate.evaluate import Subject
    from varptq.evaluate.preflight import Instruments
    from varptq.models.pipeline import Pipeline
    from varptq.models.sampling import SamplingSettings
    from varptq.progress import Progress

SAMPLES_NAME, NO_METRICS = "samples", "none"
# Folder through which processes exchange results while they measure.
WORK_NAME = "work"


Against = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The float model; default: the artifact's own.")
]
Metrics = Annotated[
    str | None,
    typer.Option(
        help="Names separated by commas, or none, to export alone; default: all that are possible."
    ),
]
Network = Annotated[
    str | None, typer.Option(help="Feature network, e.g. inception:FILE or resnet56:FILE.")
]
Reference = Annotated[
    Path | None,
    typer.Option(
        help="Real images: npz with arr_0, or a folder of pictures; or an npz with mu and sigma."
    ),
]
LpipsFile = Annotated[Path | None, typer.Option(help="LPIPS weights, .safetensors.")]
ExportAs = Annotated[Export | None, typer.Option(help="Also write all samples in this format.")]
Clip = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="CLIP model: folder or name on the Hugging Face hub."),
]
Count = Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help="Images per model.")]


def command(
    source: options.Source = None,
    against: Against = None,
    var: options.VarFile = None,
    vae: options.VaeFile = None,
    random: options.RandomModel = None,
    out: options.Results = Path("out/evaluate"),
    count: Count = 100,
    seed: options.Seed = 0,
    prompts: options.PromptFile = None,
    encoder: options.Encoder = None,
    size: options.Size = None,
    cfg: options.Guidance = None,
    tau: options.Tau = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    guided_scales: options.GuidedScales = None,
    metrics: Metrics = None,
    network: Network = None,
    reference: Reference = None,
    lpips: LpipsFile = None,
    clip: Clip = None,
    export: ExportAs = None,
    batch_size: options.BatchSize = options.BATCH_SIZE,
    runtime: options.Runtime = options.RUNTIME,
    download: options.Download = False,
    device: options.Device = options.DEVICE,
    dtype: options.Dtype = options.DTYPE,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Measure a model's images, and an artifact's beside those of its float model."""
    from varptq.distributed import Ranks, local_device
    from varptq.models.sampling import SamplingSettings

    started, ranks, device = time.monotonic(), Ranks.from_environment(), local_device(device)
    guidance: dict[str, Any] = {"cfg": cfg, "tau": tau, "guided_scales": guided_scales}
    settings = SamplingSettings(top_k=top_k, top_p=top_p, **guidance)
    asked = Asked.of(prompts=prompts, encoder=encoder, download=download, option=None)
    places: dict[str, Any] = {"download": download, "device": device, "dtype": dtype}
    choices = Choices.of(source, against, (var, vae, random), **places)
    asked.check(choices.subject)
    names = metric_names(metrics, export)
    models = choices.load(runtime).drawing(asked, size)
    tools = load_instruments(network, reference, lpips, clip, models.pipe)
    exported = Exported.of(export, out, models, asked, count)
    check(models, tools, names, count, exported)
    drawn = (out / SAMPLES_NAME, count, seed, settings, batch_size, force)
    files, said = file_checksums(network, reference, lpips), warn_of_reference(tools, ranks)
    document = run(models, tools, names, files, drawn, exported, ranks)
    if document is None:
        return
    if names == []:
        typer.echo(f"written: {out}/{SAMPLES_NAME}/, {' and '.join(exported.places(models))}")
        return
    tell([text for text in document["warnings"] if text != said])
    if json:
        common.print_json(document)
    else:
        common.print_rows("varptq evaluate", summary(document, out, time.monotonic() - started))


def metric_names(text: str | None, export: Export | None) -> list[str] | None:
    """None for all that are possible, [] for "none", which wants an export."""
    if text is None:
        return None
    if text == NO_METRICS and export is None:
        raise InputError("metrics none: nothing would be written; give --export too")
    return [] if text == NO_METRICS else [name.strip() for name in text.split(",")]


def run(
    models: Models,
    tools: Instruments,
    names: list[str] | None,
    files: Mapping[str, str],
    sampling: tuple[Path, int, int, SamplingSettings, int, bool],
    exported: Exported,
    ranks: Ranks,
) -> dict[str, Any] | None:
    """Sample, measure and write; the document, for the first of several processes. With no metrics
    at all the samples are only exported."""
    from varptq.progress import RichProgress, silent

    with RichProgress() as progress:
        sampler = Sampler(*sampling, progress if ranks.first else silent, ranks)
        subject = sampler.sample(models.pipe)
        beside = sampler.sample(models.float_pipe) if models.float_pipe else None
        if names == []:
            return exported.write_all(subject, beside) if ranks.first else None
        document = measure(subject, beside, tools, names, files, sampler)
    if not ranks.first:
        return None
    document["warnings"][:0] = [models.warning] if models.warning else []
    write(document, subject, beside, exported)
    return document


def tell(warnings: Iterable[str]) -> None:
    for warning in warnings:
        common.warn(warning)


def warn_of_reference(tools: Instruments, ranks: Ranks) -> str | None:
    """Print the warning about the real images before anything is sampled; also returned."""
    said = tools.reference.warning if tools.reference else None
    tell([said] if said and ranks.first else [])
    return said


def load_instruments(
    network: str | None,
    reference: Path | None,
    lpips: Path | None,
    clip: str | None,
    pipe: Pipeline,
) -> Instruments:
    """What was given on the command line, on the device of the model."""
    from varptq.evaluate.features import load_network
    from varptq.evaluate.image_files import ImageFiles
    from varptq.evaluate.networks.clip import TransformersClip
    from varptq.evaluate.networks.lpips import Lpips
    from varptq.evaluate.preflight import Instruments

    return Instruments(
        load_network(network, pipe.device) if network else None,
        ImageFiles.open(reference) if reference else None,
        Lpips.load(lpips, pipe.device) if lpips else None,
        TransformersClip.load(clip, pipe.device) if clip else None,
    )


def file_checksums(
    network: str | None, reference: Path | None, lpips: Path | None
) -> dict[str, str]:
    """SHA-256 of the files that were used."""
    from varptq.models.state_file import file_sha256

    network_file = Path(network.partition(":")[2]) if network else None
    files = {"feature network": network_file, "real images": reference, "LPIPS": lpips}
    return {name: file_sha256(path) for name, path in files.items() if path and path.is_file()}


@dataclass(frozen=True)
class Sampler:
    """How both models sample, and into which folder: "quantized" or "float" below `folder`."""

    folder: Path
    count: int
    seed: int
    settings: SamplingSettings
    batch: int
    force: bool
    progress: Progress
    ranks: Ranks

    def sample(self, pipe: Pipeline) -> Subject:
        """The samples of a model, made where they are missing."""
        from varptq.evaluate.evaluate import Subject, kind
        from varptq.evaluate.sampling import sample_set

        samples = sample_set(
            pipe,
            self.folder / kind(pipe),
            count=self.count,
            seed=self.seed,
            settings=self.settings,
            batch=self.batch,
            force=self.force,
            progress=self.progress,
            ranks=self.ranks,
        )
        return Subject(pipe, samples)


def identity(
    subject: Subject,
    beside: Subject | None,
    tools: Instruments,
    names: list[str] | None,
    files: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that determines the parts that processes measure."""
    from varptq.evaluate.evaluate import machine, versions

    sets = [one.samples for one in (subject, beside) if one is not None]
    return {
        "samples": [[samples.fingerprint, len(samples)] for samples in sets],
        "metrics": names,
        "network": tools.network.name if tools.network else None,
        "reference": str(tools.reference.path) if tools.reference else None,
        "files": dict(files),
        "versions": versions(),
        "machine": machine(subject.pipe),
    }


def measure(
    subject: Subject,
    beside: Subject | None,
    tools: Instruments,
    names: list[str] | None,
    files: Mapping[str, str],
    sampler: Sampler,
) -> dict[str, Any]:
    """The document of `evaluate` with the model's own description, by all processes that
    sampled; `files` are checksums."""
    from varptq.evaluate.evaluate import evaluate
    from varptq.work import Work

    ranks, progress = sampler.ranks, sampler.progress
    # A single process has nothing to exchange, and measuring is short compared with sampling.
    folder = sampler.folder.with_name(WORK_NAME) if ranks.size > 1 else None
    with Work(folder, ranks) as work:
        work.begin(identity(subject, beside, tools, names, files), progress)
        document = evaluate(
            subject, beside, instruments=tools, metrics=names, progress=progress, work=work
        )
        work.remove()
    document["checksums"] |= files
    return {**document, "model": describe(subject.pipe)}


def check(
    models: Models,
    tools: Instruments,
    names: list[str] | None,
    count: int,
    exported: Exported,
) -> None:
    """Refuse before sampling what would be refused after it."""
    from varptq.evaluate.preflight import plan

    if names != []:
        plan(models.pipe, models.float_pipe, tools, names, count)
    exported.check(models)


def write(
    document: Mapping[str, Any],
    subject: Subject,
    beside: Subject | None,
    exported: Exported,
) -> None:
    """Write metrics.json, report.html, and the samples in another format if asked."""
    from varptq.evaluate.report import choose_pairs, write_report
    from varptq.files import write_atomic

    out = exported.out
    exported.write_all(subject, beside)
    text = jsonlib.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    # Bytes of a path that are not UTF-8 become JSON escapes.
    write_atomic(out / METRICS_NAME, text.encode(errors="backslashreplace") + b"\n")
    above = beside.samples if beside else None
    pairs = choose_pairs(subject.samples, above, subject.pipe.pool().titles())
    write_report(out / REPORT_NAME, document, pairs)


def describe(pipe: Pipeline) -> dict[str, Any]:
    """The description of `varptq info`, and what the report draws of calibration."""
    from varptq.quant.pipeline import QuantizedPipeline

    document = info.describe(pipe)
    if isinstance(pipe, QuantizedPipeline):
        theta = pipe.report.get("theta") or {}
        document |= {key: list(theta.get(key, ())) for key in ("copies", "text_copies")}
        document["resampling"] = pipe.report.get("resampling")
    return document


def summary(document: dict[str, Any], out: Path, duration: float) -> list[tuple[str, str]]:
    """The table for people."""
    from varptq.evaluate.catalogue import METRICS, sources, titled

    of_float = document["float_metrics"]
    rows = [
        ("model", document["title"]),
        ("compared with", document["compared_with"] or "nothing"),
        ("samples", f"{document['settings']['count']}, seed {document['settings']['seed']}"),
    ]
    for name, value in document["metrics"].items():
        if name in METRICS:
            text = METRICS[name].written(value)
            if name in of_float:
                text += f", float {METRICS[name].written(of_float[name])}"
            rows.append((titled(name, document["settings"]["network"]), text))
    if text := sources(document):
        rows.append(("computed from", text))
    written = f"{out}/{REPORT_NAME}, {out}/{METRICS_NAME}, {out}/{SAMPLES_NAME}/"
    return [*rows, ("time", readable.seconds(duration)), ("written", written)]
