"""What the verbs share: which model is meant, options of one meaning, and printing.

Tables for people go to stdout, progress to stderr; with --json stdout holds one document and
nothing else. torch is imported where it is needed only, so that --help stays quick.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from varptq import readable
from varptq.errors import InputError

if TYPE_CHECKING:
    from varptq.models.pipeline import Pipeline
    from varptq.quant.pipeline import QuantizedPipeline

MAX_SEED = 2**63 - 1
CHECKPOINT_SUFFIXES = {".pth", ".pt", ".ckpt", ".bin", ".safetensors"}
THETA_OFF = {
    "over_budget": ", the budget does not even pay for finding the tokens",
    "off": ", kernels hold no finer step of these values",
}

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL_OR_ARTIFACT",
        help="Folder of an artifact, or a model: demo, var-d16, var-d20, var-d24, var-d30, "
        "var-d36.",
    ),
]
VarFile = Annotated[
    Path | None, typer.Option("--var", metavar="FILE", help="Transformer: .pth or .safetensors.")
]
VaeFile = Annotated[
    Path | None, typer.Option("--vae", metavar="FILE", help="VQVAE: .pth or .safetensors.")
]
RandomModel = Annotated[
    str | None,
    typer.Option("--random", metavar="NAME", help="Architecture of a model, random weights."),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch a model that is not here yet.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of everything random in the run.")]
Force = Annotated[bool, typer.Option("--force", help="Replace results that exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


@dataclass(frozen=True)
class ModelChoice:
    """A model as the command line names it: exactly one of `source`, `random` and the two files."""

    source: str | None = None
    var: Path | None = None
    vae: Path | None = None
    random: str | None = None
    download: bool = False
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        files = self.var is not None or self.vae is not None
        if (self.source is not None) + (self.random is not None) + files != 1:
            raise InputError("model: give one of a name or folder, --var with --vae, or --random")

    @property
    def folder(self) -> Path | None:
        """The artifact folder meant, if it is one; names of models win over folders."""
        from varptq.models.presets import PRESETS

        if self.source is None or self.source in PRESETS:
            return None
        folder = Path(self.source)
        if folder.is_file() or folder.suffix.lower() in CHECKPOINT_SUFFIXES:
            raise InputError(
                f"model {self.source!r}: a file, and a model is two: give the transformer and the "
                "VQVAE as --var var.pth --vae vae.pth"
            )
        if not folder.is_dir():
            names = ", ".join(PRESETS)
            raise InputError(
                f"model {self.source!r}: neither an artifact folder nor a model; models: {names}"
            )
        return folder

    def load(self, runtime: str = "auto") -> Pipeline:
        """The float model, or the quantized one on `runtime`."""
        if (folder := self.folder) is None:
            if runtime != "auto":
                raise InputError(f"runtime {runtime!r}: only for artifacts, this model is float")
            return self.load_float()
        from varptq.runtime import load

        return load(folder, runtime=runtime, **self._placement())

    def load_float(self) -> Pipeline:
        from varptq.models.pipeline import build_model, load_model

        if self.random is not None:
            return build_model(self.random, **self._placement())
        return load_model(
            self.source, var=self.var, vae=self.vae, download=self.download, **self._placement()
        )

    def _placement(self) -> dict[str, Any]:
        from varptq.models.placement import checked_device, checked_dtype

        return {"device": checked_device(self.device), "dtype": checked_dtype(self.dtype)}


def usable_cores() -> int:
    """How many cores the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_threads(asked: int) -> None:
    """Compute with that many threads, or with one a core where there are fewer."""
    import torch

    torch.set_num_threads(min(asked, usable_cores()))


def parse_classes(text: str) -> list[str]:
    """ "cat,3,ship" -> ["cat", "3", "ship"]; names and ids are looked up by the model."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"classes {text!r}: expected names or ids with commas between, e.g. cat,3")
    return names


def warn(text: str) -> None:
    """One line on stderr; a log that cannot be written is no reason to end."""
    with suppress(OSError):
        typer.echo(f"warning: {text}", err=True)


def print_json(document: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A table of two columns: what, and its value."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path with its end cut off is of no use
    for name, value in rows:
        table.add_row(name, value)
    print_table(table)


def print_table(table: Table) -> None:
    Console(markup=False, highlight=False).print(table)


def sizes(pipe: Pipeline) -> dict[str, Any]:
    """Bytes as stored and in float32: by kind of tensor, and of both networks."""
    from varptq.artifact.sizes import VAE, quantized_size, sizes, transformer_size

    kinds = sizes(pipe)
    packed = quantized_size(pipe)
    return {
        "transformer": transformer_size(pipe).to_dict(),
        "vae": kinds[VAE].to_dict(),
        "bits_per_quantized_weight": packed.bits_per_element or None,
        "kinds": {kind: size.to_dict() for kind, size in kinds.items()},
    }


def size_rows(sizes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The totals of `sizes` for a table."""
    rows = []
    for name, part in (("transformer size", "transformer"), ("VQVAE size", "vae")):
        stored, full = sizes[part]["bytes"], sizes[part]["float32_bytes"]
        compared = f", {full / stored:.2f}x smaller than float32" if stored < full else ", float"
        rows.append((name, readable.megabytes(stored) + compared))
    if (bits := sizes["bits_per_quantized_weight"]) is not None:
        rows.append(("quantized weights", f"{bits:.2f} bits each, with scales and zero points"))
    return rows


def runs_on(pipe: QuantizedPipeline) -> str:
    """Which runtime `varptq.load` takes for it on the CPU, and why where that is the slow one."""
    from varptq.runtime.resolve import told

    return told(pipe.var).runs_on


def theta_summary(pipe: QuantizedPipeline) -> dict[str, Any]:
    """The threshold in use and what its search found, without the list of copies."""
    found = pipe.report.get("theta") or {}
    kept = {name: value for name, value in found.items() if name not in {"copies", "theta"}}
    return {"value": pipe.theta, **kept}


def theta_text(theta: Mapping[str, Any]) -> str:
    if theta["value"] is None:
        return "off" + THETA_OFF.get(theta.get("status", ""), "")
    text = f"{theta['value']:.4f}"
    if "fraction" in theta:
        text += f", adds {theta['fraction']:.2%} BOPs of a budget of {theta['alpha']:.2%}"
    return text
