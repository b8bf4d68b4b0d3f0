"""`varptq quantize`: from a float model to an artifact folder.

Settings, the place for the result and the model are checked before anything is calibrated. The
artifact appears whole at the very end. Until then finished pieces are in a work folder, so the same
command continues after Ctrl-C, a failure or a kill; under torchrun its processes share that folder
and the work.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from varptq import readable
from varptq.cli import common, options
from varptq.cli.asked import Asked
from varptq.cli.model_choice import ModelChoice
from varptq.cli.quantized import next_commands, plan, plan_rows, rows, summary
from varptq.cli.settings import parse_size, read_calibration, read_config
from varptq.errors import InputError, OutputError

if TYPE_CHECKING:
    from varptq.calibrate.config import CalibrationConfig
    from varptq.distributed import Ranks
    from varptq.models.pipeline import Pipeline
    from varptq.quant.config import QuantConfig
    from varptq.quant.pipeline import QuantizedPipeline
    from varptq.work import Work

# `save(out, force=force)` of one artifact.
Save = Callable[..., Path]
# The float model; with device and dtype where it is left on its files.
Load = Callable[[], "tuple[Pipeline, dict[str, Any] | None]"]
# Name of the piece in a work folder that marks that the artifact may have been written.
PUBLISHED = "published"
TITLE = "varptq quantize"
DEFAULT_CONFIG = "w4a4"
# The keys of the table of methods.
METHODS = ("rtn", "gptq", "brecq", "sas")
# Name of a work folder inside the artifact's; our hidden names do not count as its content.
WORK_NAME = ".varptq-work"


class Effort(StrEnum):
    """Time against quality (docs/scaling.md)."""

    fast = "fast"
    standard = "standard"
    max = "max"


GroupSize = Annotated[
    int | None, typer.Option(help="Input channels per weight scale; must divide every layer.")
]
CalibrationName = Annotated[
    str | None,
    typer.Option(
        help="default (256 images, rtn 32; up to 2000 steps), released, an effort, or a file."
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        help="{methods}; default: sas for +paper, else gptq, or brecq where steps or an effort ask "
        "for learned rounding."
    ),
]
Budget = Annotated[float | None, typer.Option(help="Share of BOPs that shift-and-sum may add.")]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for recorded activations, e.g. 8GB; a model that does not fit into it goes "
        "block by block with rtn and gptq.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Folder for the artifact; default: MODEL-CONFIG.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done and what it takes; stop there.")
]
WorkFolder = Annotated[
    Path | None, typer.Option(help="Folder for finished pieces; default: OUT.work.")
]


class Command(TyperCommand):
    """The verb, whose help names the methods there are."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        # Importing the table takes seconds, since it needs torch. Whoever adds a method has.
        table = sys.modules.get("varptq.calibrate.methods")
        names = METHODS if table is None else table.METHODS
        for option in self.params:
            if option.name == "method" and isinstance(option, TyperOption) and option.help:
                option.help = option.help.format(methods=", ".join(names))
        super().format_help(ctx, formatter)


def command(
    source: options.FloatSource = None,
    model: Annotated[str | None, typer.Option(help="The same as MODEL.")] = None,
    var: options.VarFile = None,
    vae: options.VaeFile = None,
    random: options.RandomModel = None,
    class_names: options.ClassNames = None,
    out: Out = None,
    config: options.Config = DEFAULT_CONFIG,
    prompts: options.PromptFile = None,
    encoder: options.Encoder = None,
    size: options.Size = None,
    group_size: GroupSize = None,
    method: MethodName = None,
    calibration: CalibrationName = None,
    effort: Annotated[Effort | None, typer.Option(help="How much time to spend.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Reconstruction steps per unit.")] = None,
    tune: Annotated[int | None, typer.Option(help="Steps of end-to-end tuning.")] = None,
    budget: Budget = None,
    memory: Memory = None,
    work: WorkFolder = None,
    seed: options.Seed = 0,
    download: options.Download = False,
    device: options.Device = options.DEVICE,
    dtype: options.Dtype = options.DTYPE,
    dry_run: DryRun = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Calibrate and quantize a model, and save it; says first how long it takes, in what memory."""
    from varptq.distributed import Ranks, local_device

    settings = read_calibration(
        calibration, effort, samples=samples, steps=steps, tune=tune, budget=budget, memory=memory
    )
    job = Job.checked(read_config(config, group_size), method, settings, seed)
    named, device = one_name(source, model), local_device(device)
    choice = ModelChoice(named, var, vae, random, download, device, dtype, class_names)
    choice.check_float()
    asked = Asked.of(prompts=prompts, encoder=encoder, download=download, option=None)
    asked.check(choice)
    out = out or Path(readable.name_of(choice.about()[0], job.config.name))
    limit = None if memory is None else parse_size(memory)

    def load() -> tuple[Pipeline, dict[str, Any] | None]:
        pipe, streamed = loaded(choice, job, limit)
        return asked.drawing(pipe, size), streamed

    folder = work or work_folder(out)
    if work is not None:
        check_apart(work, out)
    if not published(folder):
        check_output(out, force)
    if dry_run:
        document, said = job.planned(*load(), Ranks(), briefly=False)
        show(document, f"{TITLE} --dry-run", [*said, ("would be in", str(out))], json)
    elif document := job.carried_out(load, out, folder, force):
        lines = next_commands(out, choice.about()[1], choice.float_words())
        show(document | {"next": lines}, TITLE, [*rows(document), ("next", "\n".join(lines))], json)


def show(document: dict[str, Any], title: str, lines: list[tuple[str, str]], json: bool) -> None:
    if json:
        common.print_json(document)
    else:
        common.print_rows(title, lines)


def one_name(source: str | None, model: str | None) -> str | None:
    if source is not None and model is not None:
        raise InputError(f"model: both {source!r} and --model {model!r} given; give one")
    return source or model


@dataclass(frozen=True)
class Job:
    """The settings of one call of `quantize`."""

    config: QuantConfig
    method: str
    calibration: CalibrationConfig
    seed: int

    @classmethod
    def checked(
        cls, config: QuantConfig, method: str | None, calibration: CalibrationConfig, seed: int
    ) -> Job:
        """With the default method where none is named. Raises `ConfigError` for an unknown one."""
        from varptq.calibrate.methods import Method, default_method

        if method is None:
            method = default_method(config, calibration)
        Method.parse(method)
        return cls(config, method, calibration, seed)

    def carried_out(
        self, load: Load, out: Path, folder: Path, force: bool
    ) -> dict[str, Any] | None:
        """Quantize and save; the summary, in the first process."""
        from varptq.distributed import Ranks
        from varptq.work import Work

        started = time.monotonic()
        with Work(folder, Ranks.from_environment()) as place:
            quantized, save = self.run(*load(), place)
            if place.ranks.first:
                publish(save, out, force, place)
            place.remove()
        return summary(quantized, out, time.monotonic() - started) if place.ranks.first else None

    def planned(
        self, pipe: Pipeline, streamed: dict[str, Any] | None, ranks: Ranks, *, briefly: bool
    ) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """What will be done, what on, and what it takes here: as plain values, and as rows."""
        from varptq.calibrate.forecast import forecast
        from varptq.calibrate.methods import Method
        from varptq.progress import RichProgress
        from varptq.runtime.resolve import foreseen

        choice = foreseen(pipe.var, self.config, shift=Method.parse(self.method).shift)
        with RichProgress() as bars:
            found = forecast(
                pipe,
                self.config,
                method=self.method,
                calibration=self.calibration,
                processes=ranks.size,
                placed=streamed,
                briefly=briefly,
                progress=bars,
            )
        document = plan(pipe, self.config, found, (streamed or {}).get("dtype")) | {
            "runs_on": choice.runs_on
        }
        how = ", block by block" if streamed is not None else ""
        first = ("method", f"{self.method}{how}, runs on: {choice.runs_on}")
        return document, [first, *plan_rows(document, found, DEFAULT_CONFIG)]

    def run(
        self, pipe: Pipeline, streamed: dict[str, Any] | None, work: Work
    ) -> tuple[QuantizedPipeline, Save]:
        """What is made, and how it is saved. streamed: device and dtype of a model that is not in
        memory."""
        from varptq.artifact import save
        from varptq.calibrate.quantize import quantize
        from varptq.progress import RichProgress, silent
        from varptq.streamed import stream

        if work.ranks.first:
            _, said = self.planned(pipe, streamed, work.ranks, briefly=True)
            for name, text in said:
                typer.echo(f"{name} {text}", err=True)
        with RichProgress() as bars:
            settings: dict[str, Any] = {
                "method": self.method,
                "calibration": self.calibration,
                "seed": self.seed,
                "progress": bars if work.ranks.first else silent,
                "work": work,
            }
            if streamed is not None:
                made = stream(pipe, self.config, **settings, **streamed)
                return made.quantized, made.save
            quantized = quantize(pipe, self.config, **settings)
            return quantized, partial(save, quantized)


def loaded(
    choice: ModelChoice, job: Job, limit: int | None
) -> tuple[Pipeline, dict[str, Any] | None]:
    """The float model; it is left on its files where it would not fit into memory while it is
    quantized, and where it is to compute, device and dtype, is given with it. Raises `ConfigError`
    for a method that needs it in memory."""
    from varptq.models.memory import free_bytes
    from varptq.streamed import IN_MEMORY, larger_than_memory

    placement = choice.placement()
    # At most this, as files have two bytes a weight or more; most models are found to fit by it.
    most = IN_MEMORY * choice.file_bytes() * placement["dtype"].itemsize // 2
    rooms = [room for room in (limit, free_bytes(placement["device"])) if room is not None]
    if all(most <= room for room in rooms):
        return choice.load_float(), None
    pipe = choice.load_float(mapped=True)
    if larger_than_memory(pipe, job.method, job.calibration, **placement, limit=limit):
        return pipe, placement
    return choice.load_float(), None


def publish(save: Save, out: Path, force: bool, work: Work) -> None:
    """Save the artifact. A run that is killed after this and before its work folder is removed
    finds its own artifact when it is repeated, and may replace it by the same one."""
    from varptq.work import Piece

    force = force or work.has(PUBLISHED)
    check_output(out, force)
    work.write(PUBLISHED, Piece())
    save(out, force=force)


def published(folder: Path) -> bool:
    """Whether an earlier run came so far that its artifact may exist already."""
    return (folder / f"{PUBLISHED}.safetensors").is_file()


def check_output(out: Path, force: bool) -> None:
    """Raise `OutputError` now for what `save` would refuse after calibration."""
    from varptq.artifact.format import CONFIG_FILE
    from varptq.files import StagedFolder

    StagedFolder(out, force=force, marker=CONFIG_FILE).check()


def check_apart(work: Path, out: Path) -> None:
    """Raise `OutputError` for a work folder in which the artifact would lie, or the other way
    round: one is removed at the end, and the other one appears whole in an empty place."""
    from varptq.files import PREFIX

    pieces, artifact = (Path(os.path.realpath(path)) for path in (work, out))
    if artifact.is_relative_to(pieces):
        found = f"holds --out {out}"
    # Our hidden names do not count as content of the artifact's folder.
    elif pieces.is_relative_to(artifact) and not (
        pieces.relative_to(artifact).parts[0].startswith(PREFIX)
    ):
        found = f"lies in --out {out}"
    else:
        return
    raise OutputError(f"work folder {work}: {found}; give a place beside it (--work)")


def work_folder(out: Path) -> Path:
    """Beside the artifact, or hidden inside its folder if that is filled in place: a folder beside
    a mounted volume would be lost with the container."""
    from varptq.files import StagedFolder

    inside = out / WORK_NAME
    if inside.is_dir() or StagedFolder(out).in_place():
        return inside
    # "a/.." has no name to make one from.
    named = out if out.name != ".." else Path(os.path.realpath(out))
    return named.with_name(f"{named.name}.work")
