"""The tables of README.md: what a preset weighs, computes, takes on a CPU and costs in quality.

    python -m benchmarks.quality.readme_table

Sizes and bit operations follow from the architecture of VAR-d16. Seconds are from
results/runtime_cpu.json (runtime_cpu.py, random weights of VAR-d16), KL and top-1 agreement from
results/quality4bit.jsonl (quality4bit.py, the demo model, mean over calibration seeds). Writes
between the "size and speed" and "quality" markers.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

from benchmarks.common.pages import DOCS, table
from benchmarks.common.pages import replace as replace_section
from benchmarks.common.quality4bit_rows import LAST, NAME
from benchmarks.common.results import read_document, read_lines
from varptq.artifact.sizes import VAE, sizes, total
from varptq.models.meta import on_meta
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS
from varptq.models.var.transformer import VAR
from varptq.models.var.vqvae import VQVAE
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert, convert_autoencoder
from varptq.quant.describe import bops_account

MODEL = "var-d16"
# Run and label of a row in quality4bit.jsonl.
ROWS = {
    **{n: (LAST, n) for n in ("w8a8", "w6a6", "w4a8", "w3a8", "w2a8", "best", "bops1", "w4a4")},
    "w4a4+paper": (12, "sas"),
}
COSTS = [
    "VAR-d16",
    "transformer, MB",
    "with the VQVAE, MB",
    "bit operations",
    "one image, s",
    "speed over float32",
]
QUALITY = ["demo model", "KL to float, nats per token", "same most likely token"]
FLOAT = "eager fp32"


def shapes() -> Pipeline:
    preset = PRESETS[MODEL]
    with on_meta():
        return Pipeline(
            VAR(preset.transformer_arch),
            VQVAE(preset.autoencoder_arch, preset.transformer_arch.scales),
            MODEL,
        )


def measured(run: int, label: str, what: str) -> float:
    wanted = ("demo", run, label)
    lines = [x for x in read_lines(NAME) if (x["model"], x["run"], x["label"]) == wanted]
    return mean(x[what] for x in lines)


def seconds() -> dict[str, float]:
    """Of one image on one thread, by variant."""
    cases = read_document("runtime_cpu")["cases"]
    case: dict[str, Any] = next(x for x in cases if (x["batch"], x["threads"]) == (1, 1))
    return {name: sum(parts.values()) for name, parts in case["seconds"].items()}


def costs() -> list[str]:
    """Of the transformer alone, and with the VQVAE, float32 in the file of the float model."""
    pipe, taken = shapes(), seconds()
    autoencoder = sizes(pipe)[VAE].bytes
    base = bops_account(pipe.var, QuantConfig.preset("w4a4+paper")).total
    floats = sum(p.numel() for p in pipe.var.parameters()) * 4
    rows = [["float32", *megabytes(floats, autoencoder), "16x", f"{taken[FLOAT]:.1f}", "1x"]]
    for name in ROWS:
        config = QuantConfig.preset(name)
        var, vae = convert(pipe.var, config), convert_autoencoder(pipe.vae, config)
        found = sizes(replace(pipe, var=var, vae=vae))
        stored = found[VAE].bytes
        cells = [f"`{name}`", *megabytes(total(found).bytes - stored, stored)]
        cells.append(f"{bops_account(pipe.var, config).total / base:.2f}x")
        if name in taken:
            cells += [f"{taken[name]:.1f}", f"{taken[FLOAT] / taken[name]:.1f}x"]
        else:
            cells += ["-", "-"]
        rows.append(cells)
    return table(COSTS, rows)[:-1]


def megabytes(transformer: int, autoencoder: int) -> list[str]:
    return [f"{size / 1e6:.0f}" for size in (transformer, transformer + autoencoder)]


def quality() -> list[str]:
    rows = [
        [f"`{name}`", f"{measured(*row, 'kl'):.3f}", f"{100 * measured(*row, 'top1'):.0f}%"]
        for name, row in ROWS.items()
    ]
    return table(QUALITY, rows)[:-1]


if __name__ == "__main__":
    readme = DOCS.parent / "README.md"
    replace_section(readme, "size and speed", costs())
    replace_section(readme, "quality", quality())
