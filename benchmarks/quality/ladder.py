"""What each modifier of a preset is worth at W4A4, nearest rounding, and what it costs in BOPs.

    python -m benchmarks.quality.ladder

Writes results/ladder.json and, between markers, docs/tables/ladder.md. KL as in
proof.py, on the same held-out images of the demo model; means of centred inputs from 64 others.
"""

from __future__ import annotations

from typing import Any

import torch

import varptq
from benchmarks.common.held_out import held_out
from benchmarks.common.pages import DOCS, replace
from benchmarks.common.results import write_document
from varptq.calibrate.config import CalibrationConfig
from varptq.evaluate.tokens import token_fidelity
from varptq.quant.config import QuantConfig
from varptq.quant.describe import bops_account

BASE = "w4a4+paper+p8"
TRANSFORMED = f"{BASE}+center+rotate"
EDGES = f"{TRANSFORMED}+edges8"
STEPS = (
    ("w4a4+paper", "rtn"),
    ("w4a4+paper+renorm", "rtn"),
    ("w4a4+paper+token+renorm", "rtn"),
    (BASE, "rtn"),
    (BASE, "rtn+shift"),
    (f"{BASE}+center", "rtn"),
    (f"{BASE}+rotate", "rtn"),
    (TRANSFORMED, "rtn"),
    (EDGES, "rtn"),
    (f"{EDGES}+renorm", "rtn"),
    (f"{EDGES}+segment", "rtn"),
    (f"{EDGES}+token", "rtn"),
    (f"{EDGES}+token", "rtn+shift"),
    (f"{EDGES}+qk8", "rtn"),
    (f"{EDGES}+qk8+v8", "rtn"),
    (f"{EDGES}+token+qk8+v8", "rtn"),
)


def measure() -> list[dict[str, Any]]:
    pipe = varptq.load_model("demo")
    test = held_out(pipe)
    base = bops_account(pipe.var, QuantConfig.preset("w4a4+paper")).total
    calibration = CalibrationConfig(num_samples=64, steps=0)
    lines = []
    for name, method in STEPS:
        config = QuantConfig.preset(name)
        model = varptq.quantize(pipe, config, method=method, calibration=calibration, seed=0)
        found = token_fidelity(pipe, model, test.prompts, test.tokens)
        bops = bops_account(pipe.var, config).total / base
        lines.append({"preset": name, "method": method, "bops": bops, "fidelity": found.to_dict()})
        print(f"{name} {method}: kl {found.kl_filtered:.4f}", flush=True)
    return lines


def table(lines: list[dict[str, Any]]) -> list[str]:
    rows = ["| preset | copies | BOPs of w4a4+paper | KL | top-1 |", "|---|---|---|---|---|"]
    for line in lines:
        copies = "1% budget" if "shift" in line["method"] else "-"
        fidelity = line["fidelity"]
        rows.append(
            f"| `{line['preset']}` | {copies} | {line['bops']:.2f}x "
            f"| {fidelity['kl_filtered']:.4f} | {fidelity['top1']:.3f} |"
        )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    lines = measure()
    write_document("ladder", lines)
    replace(DOCS / "tables/ladder.md", "ladder", table(lines))


if __name__ == "__main__":
    main()
