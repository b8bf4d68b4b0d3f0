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

import torch

from benchmarks.common.pages import DOCS, table
from benchmarks.common.pages import replace as replace_section
from benchmarks.common.quality4bit_rows import NAME
from benchmarks.common.results import read_document, read_lines
from varptq.artifact.sizes import VAE, sizes, total
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS
from varptq.models.var.transformer import VAR
from varptq.models.var.vqvae import VQVAE
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.quant.describe import bops_account

MODEL = "var-d16"
# What a row is called in quality4bit.jsonl.
ROWS = {
    "w8a8": "w8a8, gptq",
    "w6a6": "w6a6, gptq",
    "w4a8": "w4a8, gptq",
    "best": "best, gptq",
    "w4a4": "w4a4, gptq",
    "w4a4+paper": "sas",
}
COSTS = [
    "VAR-d16",
    "transformer, MB",
    "with the VQVAE, MB",
    "bit operations",
    "one image, s",
    "speed over bf16",
]
QUALITY = ["demo model", "KL to float, nats per token", "same most likely token"]
FLOAT = "eager bf16 autocast"


def shapes() -> Pipeline:
    preset = PRESETS[MODEL]
    with torch.device("meta"):
        return Pipeline(
            VAR(preset.transformer_arch),
            VQVAE(preset.autoencoder_arch, preset.transformer_arch.scales),
            MODEL,
        )


def measured(label: str, what: str) -> float:
    lines = read_lines(NAME)
    return mean(x[what] for x in lines if (x["model"], x["label"]) == ("demo", label))


def seconds() -> dict[str, float]:
    """Of one image on one thread, by variant."""
    cases = read_document("runtime_cpu")["cases"]
    case: dict[str, Any] = next(x for x in cases if (x["batch"], x["threads"]) == (1, 1))
    return {name: sum(parts.values()) for name, parts in case["seconds"].items()}


def costs() -> list[str]:
    """Of the transformer alone, and with the VQVAE, which stays in float32 on disk."""
    pipe, taken = shapes(), seconds()
    decoder = sizes(pipe)[VAE].bytes
    base = bops_account(pipe.var, QuantConfig.preset("w4a4+paper")).total
    floats = sum(p.numel() for p in pipe.var.parameters()) * 2
    rows = [["float, bf16", *megabytes(floats, decoder), "16x", f"{taken[FLOAT]:.1f}", "1x"]]
    for name in ROWS:
        config = QuantConfig.preset(name)
        whole = total(sizes(replace(pipe, var=convert(pipe.var, config)))).bytes
        cells = [f"`{name}`", *megabytes(whole - decoder, decoder)]
        cells.append(f"{bops_account(pipe.var, config).total / base:.2f}x")
        if name in taken:
            cells += [f"{taken[name]:.1f}", f"{taken[FLOAT] / taken[name]:.1f}x"]
        else:
            cells += ["-", "-"]
        rows.append(cells)
    return table(COSTS, rows)[:-1]


def megabytes(transformer: int, decoder: int) -> list[str]:
    return [f"{size / 1e6:.0f}" for size in (transformer, transformer + decoder)]


def quality() -> list[str]:
    rows = [
        [f"`{name}`", f"{measured(label, 'kl'):.3f}", f"{100 * measured(label, 'top1'):.0f}%"]
        for name, label in ROWS.items()
    ]
    return table(QUALITY, rows)[:-1]


if __name__ == "__main__":
    readme = DOCS.parent / "README.md"
    replace_section(readme, "size and speed", costs())
    replace_section(readme, "quality", quality())
