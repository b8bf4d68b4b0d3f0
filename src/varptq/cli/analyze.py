"""`varptq analyze`: what each tensor costs at each width, and which to keep at 8 bits.

Writes a folder, whole or not at all: `analysis.json` with every number, `mixed.json`, a config for
`varptq quantize --config`, and pictures. Nothing is calibrated and no model is written. With
`--frontier` it chooses the bits itself instead (frontier.py).
"""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, Self

import typer
from rich.table import Table

from varptq import readable
from varptq.cli import common, options
from varptq.cli.asked import Asked
from varptq.cli.frontier import Frontier, read_size
from varptq.cli.model_choice import ModelChoice
from varptq.cli.settings import read_config
from varptq.errors import InputError

if TYPE_CHECKING:
    from varptq.analyze.analyze import Analysis, AnalysisConfig
    from varptq.analyze.suggest import Budget
    from varptq.models.pipeline import Pipeline
    from varptq.progress import Progress
    from varptq.quant.config import QuantConfig

ANALYSIS_NAME, MIXED_NAME = "analysis.json", "mixed.json"
DEFAULT_RATIO = 1.1
SHOWN_ROWS = 15
SHOWN_LAYERS = 5
MEGABYTE = 1_000_000


def command(
    out: options.Results,
    source: options.FloatSource = None,
    var: options.VarFile = None,
    vae: options.VaeFile = None,
    random: options.RandomModel = None,
    class_names: options.ClassNames = None,
    config: options.Config = "w4a4",
    prompts: options.PromptFile = None,
    encoder: options.Encoder = None,
    size: options.Size = None,
    widths: Annotated[str, typer.Option(help="Bits at which every tensor is measured.")] = "8,6,4",
    images: Annotated[int, typer.Option(help="Images to measure on, and as many to verify.")] = 8,
    budget_size: Annotated[
        str | None,
        typer.Option(metavar="RATIO|MB", help="Largest size: 1.1 (times the config's) or 4.5MB."),
    ] = None,
    budget_bops: Annotated[
        float | None,
        typer.Option(help=f"Most BOPs, over the config's; {DEFAULT_RATIO} if no budget is given."),
    ] = None,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier",
            help="Choose the bits of every kind of layer; budgets are relative to w4a4+paper.",
        ),
    ] = False,
    seed: options.Seed = 1,
    download: options.Download = False,
    device: options.Device = options.DEVICE,
    dtype: options.Dtype = options.DTYPE,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Find out where a config loses quality, and suggest what to keep at 8 bits."""
    from varptq.analyze.analyze import AnalysisConfig
    from varptq.files import StagedFolder
    from varptq.progress import RichProgress

    settings = AnalysisConfig(images=images, widths=read_widths(widths), seed=seed)
    question = question_of(frontier, config, budget_size, budget_bops)
    choice = ModelChoice(source, var, vae, random, download, device, dtype, class_names)
    choice.check_float()
    asked = Asked.of(prompts=prompts, encoder=encoder, download=download, option=None)
    asked.check(choice)
    with StagedFolder(out, force=force, marker=question.marker) as folder:
        with RichProgress() as progress:
            pipe = asked.drawing(choice.load_float(), size, progress)
            found = question.answer(pipe, settings, progress)
        question.write(folder, found)
    if json:
        common.print_json(found.document)
    else:
        question.show(found, out)


def question_of(frontier: bool, config: str, size: str | None, bops: float | None) -> Question:
    return Frontier.read(size, bops) if frontier else Costs.read(config, size, bops)


class Question(Protocol):
    """What a model is analysed for: how it is answered, and how the answer is written and shown.
    marker: the file that says that a folder holds one."""

    marker: ClassVar[str]

    def answer(self, pipe: Pipeline, settings: AnalysisConfig, progress: Progress) -> Any: ...

    def write(self, folder: Path, found: Any) -> None: ...

    def show(self, found: Any, out: Path) -> None: ...


@dataclass(frozen=True)
class Costs:
    """What each tensor of a config costs, and which to keep at 8 bits."""

    marker: ClassVar[str] = ANALYSIS_NAME
    config: QuantConfig
    budget: Budget

    @classmethod
    def read(cls, config: str, size: str | None, bops: float | None) -> Self:
        return cls(read_config(config, None), read_budget(size, bops))

    def answer(self, pipe: Pipeline, settings: AnalysisConfig, progress: Progress) -> Analysis:
        from varptq.analyze.analyze import analyze

        return analyze(pipe, self.config, budget=self.budget, settings=settings, progress=progress)

    def write(self, folder: Path, found: Analysis) -> None:
        write(folder, found.document, found.mixed.to_dict())

    def show(self, found: Analysis, out: Path) -> None:
        common.print_table(costs_table(found.document))
        common.print_rows("Whole groups put back to float", group_rows(found.document))
        if rows := decoder_rows(found.document):
            common.print_rows("Images of the quantized decoder, PSNR to the float one", rows)
        common.print_rows("Suggestion", suggestion_rows(found.document))
        typer.echo(f"written: {out}/{ANALYSIS_NAME}, {out}/{MIXED_NAME} and pictures")


def read_widths(text: str) -> tuple[int, ...]:
    """ "8,6,4" -> (8, 6, 4)."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise InputError(f"widths {text!r}: expected numbers separated by commas, e.g. 8,6,4")
    return tuple(int(word) for word in words)


def read_budget(size: str | None, bops: float | None) -> Budget:
    """The budget given, or the default one in bit operations."""
    from varptq.analyze.suggest import Budget

    if size is None:
        return Budget("bops", DEFAULT_RATIO if bops is None else bops)
    if bops is not None:
        raise InputError("budget: both --budget-size and --budget-bops given; give one")
    value, in_megabytes = read_size(size)
    if not in_megabytes:
        return Budget("bytes", value)
    if not 0 < value < float("inf"):
        raise InputError(f"budget {size!r}: expected a size above 0 MB")
    return Budget("bytes", None, int(value * MEGABYTE))


def write(folder: Path, document: dict[str, Any], mixed: dict[str, Any]) -> None:
    from varptq.analyze.figures import figures
    from varptq.pictures import write_png

    for name, values in ((ANALYSIS_NAME, document), (MIXED_NAME, mixed)):
        (folder / name).write_text(json_module.dumps(values, indent=1) + "\n", encoding="utf-8")
    for name, picture in figures(document).items():
        write_png(folder / name, picture)


def costs_table(document: dict[str, Any]) -> Table:
    """The costliest tensors: KL alone at every width, and cost in the whole config."""
    from varptq.analyze.figures import tensor_name

    widths = [str(bits) for bits in document["settings"]["widths"]]
    name, base = document["config"]["name"], document["base"]["kl"]
    title = f"KL to the float model, nats per token; {name} has {base:.4f}"
    table = Table("tensor", title=title, title_justify="left")
    for heading in (*(f"alone at {bits}" for bits in widths), "cost in config"):
        table.add_column(heading, justify="right")
    for row in document["tensors"][:SHOWN_ROWS]:
        back = row["put_back"]
        cells = [f"{row['alone'][bits]['kl']:.5f}" for bits in widths]
        table.add_row(tensor_name(row), *cells, f"{base - back['kl']:+.5f}" if back else "-")
    return table


def group_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    base = document["base"]["kl"]
    return [
        (group, f"KL {found['kl']:.4f}, {found['kl'] / base:.0%} of {base:.4f}")
        for group, found in document["groups"].items()
    ]


def decoder_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    """The config, and the convolutions that cost most alone; none where the decoder is float."""

    def shown(row: dict[str, Any]) -> str:
        return "exact" if row["psnr"] is None else f"{row['psnr']:.1f} dB"

    found = document["autoencoder"]
    alone = [(f"{row['layer']} alone", shown(row)) for row in found["layers"][:SHOWN_LAYERS]]
    return [(document["config"]["name"], shown(found)), *alone] if alone else []


def suggestion_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    """What is kept at 8 bits, its cost, and its gain on new images."""
    found, base = document["suggestion"], document["base"]
    verified = found["verified"]
    unit = "size" if found["unit"] == "bytes" else "BOPs"
    raised = [f"{pick['layer']} {pick['operand']}" for pick in found["picks"]]
    return [
        ("budget", f"{unit} {found['limit'] / found['price']:.3f}x"),
        ("kept at 8 bits", "\n".join(raised) or "nothing"),
        ("transformer size", compared(base["bytes"], found["bytes"], readable.megabytes)),
        ("BOPs per image", compared(base["bops"], found["bops"], "{:.3e}".format)),
        ("KL, images it was chosen on", f"{base['kl']:.4f} to {last_kl(found):.4f}"),
        (
            "KL, other images",
            f"{verified['base']['kl']:.4f} to {verified['mixed']['kl']:.4f}",
        ),
    ]


def compared(before: float, after: float, text: Any) -> str:
    return f"{text(before)} to {text(after)}, {after / before:.3f}x"


def last_kl(found: dict[str, Any]) -> float:
    return found["picks"][-1]["kl"] if found["picks"] else found["kl"]
