"""`varptq edit`: regenerate a part of an image with a float model or an artifact.

The folder gets one PNG per candidate, `mask.png` (the weight of the new image at every pixel),
`grid.png` (the input and all candidates, scaled down), `tokens.npz` (tokens (n, L) int64) and
`edit.json` (all arguments and results). It appears whole or not at all.
"""

from __future__ import annotations

import json as json_module
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varptq import readable
from varptq.cli import common, options
from varptq.cli.asked import Asked, read_size
from varptq.cli.generate import GRID_NAME, TOKENS_NAME
from varptq.cli.model_choice import ModelChoice
from varptq.errors import InputError
from varptq.models.sampling_defaults import MAX_IMAGES

if TYPE_CHECKING:
    from PIL import Image

    from varptq.editing import EditResult

MASK_NAME, DOCUMENT_NAME = "mask.png", "edit.json"
# Longest side of an image in the grid, in pixels.
GRID_SIDE = 384
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--artifact",
        metavar="MODEL_OR_ARTIFACT",
        help="Folder of an artifact, or its name on the hub, or a model: demo, var-d16, ...",
    ),
]
Task = Annotated[
    str, typer.Option(help="inpaint, outpaint, class (of --label) or prompt (of --prompt).")
]
Negative = Annotated[str | None, typer.Option(metavar="TEXT", help="What to stay away from.")]
Raw = Annotated[bool, typer.Option("--raw", help="Write the model's own image, not pasted.")]
Candidates = Annotated[
    int, typer.Option(min=1, max=MAX_IMAGES, help="Alternatives to choose from.")
]


def command(
    image: Annotated[Path, typer.Argument(help="JPEG, PNG or WebP of any size.")],
    out: Annotated[Path, typer.Option(help="Folder for all files.")],
    model: Model = None,
    var: options.VarFile = None,
    vae: options.VaeFile = None,
    random: options.RandomModel = None,
    class_names: options.ClassNames = None,
    task: Task = "inpaint",
    mask: Annotated[
        Path | None, typer.Option(help="Picture or .npy file; white is regenerated.")
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(
            help="x0,y0,x1,y1 from 0 to 1: what is regenerated; for outpaint, what is kept."
        ),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Class name or id to draw.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="A text to draw.")] = None,
    negative: Negative = None,
    encoder: options.Encoder = None,
    size: options.Size = None,
    fit: Annotated[str, typer.Option(help="crop (to the model's proportions) or pad.")] = "crop",
    candidates: Candidates = 1,
    seed: options.Seed = 0,
    cfg: options.Guidance = None,
    tau: options.Tau = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    feather: Annotated[
        int | None,
        typer.Option(min=0, help="Pixels over which old and new mix; default: half a token."),
    ] = None,
    raw: Raw = False,
    batch_size: options.BatchSize = options.BATCH_SIZE,
    runtime: options.Runtime = options.RUNTIME,
    download: options.Download = False,
    device: options.Device = options.DEVICE,
    dtype: options.Dtype = options.DTYPE,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Regenerate a part of an image: in-painting, out-painting, another class or text."""
    words = None if prompt is None else [prompt]
    asked = Asked.of(label, words, None, negative, encoder, download=download, option="label")
    choice = ModelChoice(model, var, vae, random, download, device, dtype, class_names)
    asked.check(choice)
    arguments = {
        **{"task": task, "mask": mask, "box": None if box is None else parse_box(box)},
        **{"size": read_size(size), "fit": fit, "candidates": candidates, "seed": seed},
        **{"cfg": cfg, "tau": tau, "top_k": top_k, "top_p": top_p, "feather": feather, "raw": raw},
        "batch_size": batch_size,
    }
    document = run(choice, asked, runtime, image, out, force, arguments)
    if json:
        common.print_json(document)
    else:
        common.print_rows("varptq edit", rows(document, out))


def run(
    choice: ModelChoice,
    asked: Asked,
    runtime: str,
    image: Path,
    out: Path,
    force: bool,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Edit with the arguments of `varptq.edit`, write the folder, and describe its content."""
    from varptq.editing import edit
    from varptq.files import StagedFolder
    from varptq.progress import RichProgress

    with StagedFolder(out, force=force, marker=DOCUMENT_NAME) as folder:
        pipe = asked.prepared(choice.load(runtime))
        towards = {"to": asked.one(), "negative": asked.against()}
        started = time.monotonic()
        with RichProgress() as progress:
            result = edit(pipe, image, progress=progress, **towards, **arguments)
        document = {
            "model": pipe.name,
            "runtime": getattr(pipe, "runtime", "float"),
            "image": str(image),
            "task": arguments["task"],
            "to": result.asked,
            "negative": asked.negative,
            "seed": result.seed,
            "sampling": result.sampling.to_dict(),
            "seconds": time.monotonic() - started,
            **describe(result, out),
        }
        write(result, folder, document)
    return document


def parse_box(text: str) -> list[float]:
    """ "0.25,0.25,0.75,0.75" -> four numbers; `edit` checks that they are a box."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"box {text!r}: expected four numbers x0,y0,x1,y1, e.g. 0.25,0.25,0.75,0.75"
        ) from None


def names(result: EditResult) -> list[str]:
    width = max(4, len(str(len(result.images) - 1)))
    return [f"{i:0{width}}.png" for i in range(len(result.images))]


def describe(result: EditResult, out: Path) -> dict[str, Any]:
    width, height = result.before.size
    changed = 1 - result.mask_used.histogram()[0] / (width * height)
    return {
        "width": width,
        "height": height,
        "share_changed": changed,
        "tokens_drawn": int((~result.keep_L).sum()),
        "tokens_in_all": len(result.keep_L),
        "images": [str(out / name) for name in names(result)],
    }


def write(result: EditResult, folder: Path, document: dict[str, Any]) -> None:
    import numpy as np

    from varptq.pictures import gallery, write_png

    for name, image in zip(names(result), result.images, strict=True):
        write_png(folder / name, image)
    write_png(folder / MASK_NAME, result.mask_used)
    small = np.stack([thumbnail(image) for image in (result.before, *result.images)])
    labels = ["input", *(f"candidate {i}" for i in range(len(result.images)))]
    write_png(folder / GRID_NAME, gallery(small, labels))
    np.savez(folder / TOKENS_NAME, tokens=result.tokens.cpu().numpy())
    (folder / DOCUMENT_NAME).write_text(json_module.dumps(document, indent=2) + "\n")


def thumbnail(image: Image.Image) -> Any:
    """(H, W, 3) uint8, scaled down to at most `GRID_SIDE`; transparency is black."""
    import numpy as np

    small = image.convert("RGB")
    small.thumbnail((GRID_SIDE, GRID_SIDE))
    return np.asarray(small)


def rows(document: dict[str, Any], out: Path) -> list[tuple[str, str]]:
    count, drawn = len(document["images"]), document["tokens_drawn"]
    total = document["tokens_in_all"]
    target = f" to {document['to']}" if document["to"] else ""
    return [
        ("model", f"{document['model']}, {document['runtime']}"),
        ("image", f"{document['image']}, {document['width']} x {document['height']}"),
        ("task", document["task"] + target),
        ("drawn", f"{drawn} of {total} tokens, {document['share_changed']:.0%} of the pixels"),
        ("candidates", f"{count} in {readable.seconds(document['seconds'])}"),
        ("written", str(out)),
    ]
