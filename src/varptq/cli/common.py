"""What the verbs share: threads, printing, and how a model's size and theta are reported.

Tables for people go to stdout, progress to stderr; with --json stdout holds one document and
nothing else. Torch is imported only where it is needed, so that --help stays quick.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from varptq import readable
from varptq.errors import InputError

if TYPE_CHECKING:
    from varptq.models.pipeline import Pipeline
    from varptq.quant.pipeline import QuantizedPipeline

THETA_OFF = {
    "over_budget": ": finding the tokens alone exceeds the budget",
    "off": ": the kernels hold no finer step of these values",
}


def usable_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_threads(asked: int) -> None:
    """Compute with that many threads, at most one per core."""
    import torch

    torch.set_num_threads(min(asked, usable_cores()))


def parse_classes(text: str) -> list[str]:
    """ "cat,3,ship" -> ["cat", "3", "ship"]; names and ids are looked up by the model."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"classes {text!r}: expected names or ids separated by commas, e.g. cat,3")
    return names


def warn(text: str) -> None:
    """One line on stderr; an error in writing it is ignored."""
    with suppress(OSError):
        typer.echo(f"warning: {text}", err=True)


def print_json(document: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path must not be cut off
    for name, value in rows:
        table.add_row(name, value)
    print_table(table)


def print_table(table: Table) -> None:
    Console(markup=False, highlight=False).print(table)


def sizes(pipe: Pipeline) -> dict[str, Any]:
    """Bytes as stored and in float32: by kind of tensor, of both networks, and of the whole."""
    from varptq.artifact.sizes import VAE, quantized_size, sizes, total, transformer_size

    kinds = sizes(pipe)
    packed = quantized_size(pipe)
    return {
        "transformer": transformer_size(pipe).to_dict(),
        "vae": kinds[VAE].to_dict(),
        "whole": total(kinds).to_dict(),
        "bits_per_quantized_weight": packed.bits_per_element or None,
        "kinds": {kind: size.to_dict() for kind, size in kinds.items()},
    }


def size_rows(sizes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The totals of `sizes` for a table."""
    rows = []
    for name, part in (("transformer size", "transformer"), ("autoencoder size", "vae")):
        stored, full = sizes[part]["bytes"], sizes[part]["float32_bytes"]
        compared = f", {full / stored:.2f}x smaller than float32" if stored < full else ", float"
        rows.append((name, readable.megabytes(stored) + compared))
    rows.append(("whole size", whole_text(sizes)))
    if (bits := sizes["bits_per_quantized_weight"]) is not None:
        rows.append(("quantized weights", f"{bits:.2f} bits each, with scales and zero points"))
    return rows


def whole_text(sizes: Mapping[str, Any]) -> str:
    """Both networks as stored, beside both in float32."""
    stored, full = sizes["whole"]["bytes"], sizes["whole"]["float32_bytes"]
    if stored >= full:
        return f"{readable.megabytes(stored)}, float"
    smaller = f"{full / stored:.2f}x smaller"
    return f"{readable.megabytes(stored)}; the float model {readable.megabytes(full)}, {smaller}"


def runs_on(pipe: QuantizedPipeline) -> str:
    """The runtime that `varptq.load` takes on the CPU, with the reason if it is the slow one."""
    from varptq.runtime.resolve import told

    return told(pipe.var).runs_on


def theta_summary(pipe: QuantizedPipeline) -> dict[str, Any]:
    """The threshold in use and what its search found, without the lists of copies."""
    found = pipe.report.get("theta") or {}
    others = {"copies", "text_copies", "theta"}
    kept = {name: value for name, value in found.items() if name not in others}
    return {"value": pipe.theta, **kept}


def theta_text(theta: Mapping[str, Any]) -> str:
    if theta["value"] is None:
        return "off" + THETA_OFF.get(theta.get("status", ""), "")
    text = f"{theta['value']:.4f}"
    if "fraction" in theta:
        text += f", adds {theta['fraction']:.2%} BOPs of a budget of {theta['alpha']:.2%}"
    return text
