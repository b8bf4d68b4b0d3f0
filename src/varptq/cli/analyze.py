"""`varptq analyze`: what each tensor costs at each width, and which to keep at 8 bits.

Writes a folder, whole or not at all: `analysis.json` with every number, `mixed.json`, a config for
`varptq quantize --config`, and pictures. Nothing is calibrated and no model is written.
"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from varptq import readable
from varptq.cli import common, options
from varptq.cli.model_choice import ModelChoice
from varptq.cli.settings import read_config
from varptq.errors import InputError

if TYPE_CHECKING:
    from varptq.analyze.suggest import Budget

ANALYSIS_NAME, MIXED_NAME = "analysis.json", "mixed.json"
DEFAULT_RATIO = 1.1
SHOWN_ROWS = 15
MEGABYTE = 1_000_000


def command(
    out: options.Results,
    source: options.FloatSource = None,
    var: options.VarFile = None,
    vae: options.VaeFile = None,
    random: options.RandomModel = None,
    config: options.Config = "w4a4",
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
    seed: options.Seed = 1,
    download: options.Download = False,
    device: options.Device = options.DEVICE,
    dtype: options.Dtype = options.DTYPE,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Find out where a config loses quality, and suggest what to keep at 8 bits."""
    from varptq.analyze.analyze import AnalysisConfig, analyze
    from varptq.files import StagedFolder
    from varptq.progress import RichProgress

    quant_config = read_config(config, None)
    budget = read_budget(budget_size, budget_bops)
    settings = AnalysisConfig(images=images, widths=read_widths(widths), seed=seed)
    choice = ModelChoice(source, var, vae, random, download, device, dtype)
    choice.check_float()
    with StagedFolder(out, force=force, marker=ANALYSIS_NAME) as folder:
        pipe = choice.load_float()
        with RichProgress() as progress:
            analysis = analyze(
                pipe, quant_config, budget=budget, settings=settings, progress=progress
            )
        write(folder, analysis.document, analysis.mixed.to_dict())
    if json:
        common.print_json(analysis.document)
        return
    common.print_table(costs_table(analysis.document))
    common.print_rows("Whole groups put back to float", group_rows(analysis.document))
    common.print_rows("Suggestion", suggestion_rows(analysis.document))
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
    number = size.lower().removesuffix("mb")
    try:
        value = float(number)
    except ValueError:
        raise InputError(f"budget {size!r}: expected a ratio or a size, 1.1 or 4.5MB") from None
    if number == size.lower():
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
