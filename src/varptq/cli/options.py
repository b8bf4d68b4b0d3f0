"""The options that several verbs have, each with one name, one help text and one check.

By block: which model, how an image is drawn, where it computes, what becomes of the results. A verb
lists the aliases it takes; an option that only one verb has stands in the file of that verb. Torch
is not imported here, so that --help stays quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from varptq.models.sampling_defaults import CFG, TOP_K, TOP_P

MAX_SEED = 2**63 - 1
BATCH_SIZE = 16
DEVICE, DTYPE, RUNTIME = "cpu", "float32", "auto"

# Which model.
Source = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL_OR_ARTIFACT",
        help="Folder of an artifact, or its name on the hub (org/name, org/name@revision), or a "
        "model: demo, var-d16, var-d20, var-d24, var-d30, var-d36, infinity-125m, infinity-2b, "
        "infinity-8b, infinity-8b-512.",
    ),
]
FloatSource = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="demo, var-d16 .. var-d36, infinity-2b ..")
]
VarFile = Annotated[
    Path | None, typer.Option("--var", metavar="FILE", help="Transformer: .pth or .safetensors.")
]
VaeFile = Annotated[
    Path | None, typer.Option("--vae", metavar="FILE", help="Autoencoder: .pth or .safetensors.")
]
RandomModel = Annotated[
    str | None,
    typer.Option("--random", metavar="NAME", help="Architecture of a model, with random weights."),
]
ClassNames = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE|imagenet",
        help="Names of the classes, one a line in the order of ids, synonyms after commas.",
    ),
]
Download = Annotated[
    bool, typer.Option("--download", help="Download the model if it is not on this machine.")
]
Config = Annotated[str, typer.Option(help="w4a4, w8a8, w4a4+paper, ... or a file.")]

# What it is asked for.
PromptFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Prompts: .txt with one a line, .jsonl or .json, or features (.safetensors, .npz).",
    ),
]
Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|NAME",
        help="Text encoder: folder of a T5, or its name on the hub; default: the model's own.",
    ),
]


def numbers(text: str) -> Any:
    """ "3" -> 3.0, "4,4,3" -> (4.0, 4.0, 3.0)."""
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no number, nor one per scale separated by commas"
        ) from None
    return found[0] if len(found) == 1 else found


def places(text: str) -> Any:
    """ "0,-1" -> (0, -1)."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no list of places separated by commas, such as 0,-1"
        ) from None


# How an image is drawn.
Size = Annotated[
    str | None,
    typer.Option(help="Size of the images, for a model that draws at several: 0.06M, or HxW."),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of all random numbers.")]
Guidance = Annotated[
    Any,
    typer.Option(
        parser=numbers,
        metavar="FLOAT",
        help="Guidance scale, or one per scale (4,4,3); default: the model's own, VAR "
        f"{CFG:g} (0 is off).",
    ),
]
Tau = Annotated[
    Any,
    typer.Option(
        parser=numbers,
        metavar="FLOAT",
        help="Divides the logits before guidance, one number or one per scale; default: the "
        "model's own.",
    ),
]
GuidedScales = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="How many scales are guided, from the first on; the others take less time. Without "
        "it, all.",
    ),
]
GuideAt = Annotated[
    Any,
    typer.Option(
        parser=places,
        metavar="PLACES",
        help="Where guidance mixes: 0 the logits, -1 the hidden states after the last block, -2 "
        "after the one before, ...; several with commas.",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(help=f"Candidates per token, 0 for all; default: the model's own, VAR {TOP_K}."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Keep the likeliest candidates up to this total probability, 1 for all; default: the "
        f"model's own, VAR {TOP_P:g}."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images computed at a time.")]

# Where it computes.
Runtime = Annotated[
    str, typer.Option(help="Runtime that executes an artifact: auto, simulated, cpu, ...")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]

# What becomes of the results.
Results = Annotated[Path, typer.Option(help="Folder for the results.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing results.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
