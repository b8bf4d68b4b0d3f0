"""The table of README.md: what a preset weighs, computes, costs in quality and takes on a CPU.

    python -m benchmarks.quality.readme_table

Sizes and bit operations follow from the architecture of VAR-d16. KL is from
results/quality4bit.jsonl (quality4bit.py, the demo model, mean over calibration seeds), seconds
from results/runtime_cpu.json (runtime_cpu.py, random weights of VAR-d16). Writes between the
"presets" markers.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

import torch

from benchmarks.common.pages import DOCS
from benchmarks.common.pages import replace as replace_section
from benchmarks.common.quality4bit_rows import NAME
from benchmarks.common.results import read_document, read_lines
from varptq.artifact.sizes import VAE, sizes, total
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS
from varptq.models.var import VAR
from varptq.models.vqvae import VQVAE
from varptq.quant.config import QuantConfig
from varptq.quant.convert import bops_account, convert

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
HEAD = ("preset", "weights, MB", "bit operations", "KL", "image, s", "over bf16")
FLOAT = "eager bf16 autocast"


def shapes() -> Pipeline:
    preset = PRESETS[MODEL]
    with torch.device("meta"):
        return Pipeline(VAR(preset.var_arch), VQVAE(preset.vae_arch, preset.var_arch.scales), MODEL)


def stored(pipe: Pipeline, config: QuantConfig) -> int:
    """Bytes of the transformer in an artifact."""
    parts = sizes(replace(pipe, var=convert(pipe.var, config)))
    return total({kind: size for kind, size in parts.items() if kind != VAE}).bytes


def kl(label: str) -> str:
    found = [x["kl"] for x in read_lines(NAME) if (x["model"], x["label"]) == ("demo", label)]
    return f"{mean(found):.3f}" if found else "-"


def seconds() -> dict[str, float]:
    """Of one image on one thread, by variant."""
    cases = read_document("runtime_cpu")["cases"]
    case: dict[str, Any] = next(x for x in cases if (x["batch"], x["threads"]) == (1, 1))
    return {name: sum(parts.values()) for name, parts in case["seconds"].items()}


def table() -> list[str]:
    pipe, taken = shapes(), seconds()
    base = bops_account(pipe.var, QuantConfig.preset("w4a4+paper")).total
    floats = sum(p.numel() for p in pipe.var.parameters()) * 2 / 1e6
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    lines.append(f"| float, bf16 | {floats:.0f} | 16x | 0 | {taken[FLOAT]:.1f} | 1x |")
    for name, label in ROWS.items():
        config = QuantConfig.preset(name)
        cells = [f"`{name}`", f"{stored(pipe, config) / 1e6:.0f}"]
        cells += [f"{bops_account(pipe.var, config).total / base:.2f}x", kl(label)]
        if name in taken:
            cells += [f"{taken[name]:.1f}", f"{taken[FLOAT] / taken[name]:.1f}x"]
        else:
            cells += ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    replace_section(DOCS.parent / "README.md", "presets", table())
