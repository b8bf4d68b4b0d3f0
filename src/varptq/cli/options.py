"""The options that several verbs have, each with one name, one help text and one check.

By block: which model, how an image is drawn, where it computes, what becomes of the results. A verb
lists the aliases it takes; an option that only one verb has stands in the file of that verb. Torch
is not imported here, so that --help stays quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from varptq.models.sampling_defaults import CFG as CFG
from varptq.models.sampling_defaults import TOP_K as TOP_K
from varptq.models.sampling_defaults import TOP_P as TOP_P

MAX_SEED = 2**63 - 1
BATCH_SIZE = 16
DEVICE, DTYPE, RUNTIME = "cpu", "float32", "auto"

# Which model.
Source = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL_OR_ARTIFACT",
        help="Folder of an artifact, or a model: demo, var-d16, var-d20, var-d24, var-d30, "
        "var-d36.",
    ),
]
FloatSource = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="demo, var-d16 .. var-d36.")
]
VarFile = Annotated[
    Path | None, typer.Option("--var", metavar="FILE", help="Transformer: .pth or .safetensors.")
]
VaeFile = Annotated[
    Path | None, typer.Option("--vae", metavar="FILE", help="VQVAE: .pth or .safetensors.")
]
RandomModel = Annotated[
    str | None,
    typer.Option("--random", metavar="NAME", help="Architecture of a model, with random weights."),
]
Download = Annotated[
    bool, typer.Option("--download", help="Download the model if it is not on this machine.")
]
Config = Annotated[str, typer.Option(help="w4a4, w8a8, w4a4+paper, ... or a file.")]

# How an image is drawn.
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of all random numbers.")]
Guidance = Annotated[float, typer.Option(help="Guidance scale; 0 turns guidance off.")]
TopK = Annotated[int, typer.Option(help="Keep this many candidates per token; 0 keeps all.")]
TopP = Annotated[
    float,
    typer.Option(help="Keep the likeliest candidates up to this total probability; 1 keeps all."),
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
