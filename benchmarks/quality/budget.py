"""Is the budget what limits shift-and-sum? The KL against alpha, and with every token copied.

    python -m benchmarks.quality.budget

Nearest rounding, so that calibration hides nothing; KL and held-out images of proof.py. Writes
results/budget.json, the table between the "budget" markers of docs/tables/budget.md and
docs/images/budget.png.
"""

from __future__ import annotations

from typing import Any

import matplotlib
import torch

import varptq
from benchmarks.common.held_out import held_out
from benchmarks.common.pages import DOCS, replace, save, table
from benchmarks.common.results import write_document
from varptq.calibrate.config import CalibrationConfig
from varptq.evaluate.tokens import token_fidelity
from varptq.quant.config import QuantConfig

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# The paper's probabilities (log2), and uniform ones of 8 bits.
PRESETS = ("w6a6+paper", "w4a6+paper", "w4a4+paper", "w4a4+paper+p8")
BUDGETS = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
PAPER_BUDGET = 0.01
Line = dict[str, Any]


def measure() -> list[Line]:
    pipe = varptq.load_model("demo")
    test = held_out(pipe)
    lines = []
    for name in PRESETS:
        config = QuantConfig.preset(name)
        for budget in BUDGETS:
            calibration = CalibrationConfig(num_samples=64, steps=0, budget=budget)
            method = "rtn+shift" if budget else "rtn"
            model = varptq.quantize(pipe, config, method=method, calibration=calibration, seed=0)
            found = token_fidelity(pipe, model, test.prompts, test.tokens)
            line = {"preset": name, "budget": budget, "theta": model.theta}
            lines.append(line | {"kl": found.kl_filtered, "per_scale": found.kl_per_scale})
            print(f"{name} {budget}: kl {found.kl_filtered:.4f}, theta {model.theta}", flush=True)
    return lines


def by_preset(lines: list[Line]) -> dict[str, list[Line]]:
    return {name: [line for line in lines if line["preset"] == name] for name in PRESETS}


def section(lines: list[Line]) -> list[str]:
    rows, columns = [], by_preset(lines)
    for index, budget in enumerate(BUDGETS):
        cells = [f"{100 * budget:g}%" if budget else "no copies"]
        for column in columns.values():
            kl, base = column[index]["kl"], column[0]["kl"]
            cells.append(f"{kl:.4f} ({100 * (kl / base - 1):+.1f}%)")
        rows.append(cells)
    head = ["budget alpha", *(f"`{name}`" for name in PRESETS)]
    return [*table(head, rows), "![KL against the budget](../images/budget.png)", ""]


def picture(lines: list[Line]) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for name, column in by_preset(lines).items():
        shares = [line["kl"] / column[0]["kl"] for line in column]
        axes.plot([100 * line["budget"] for line in column], shares, marker="o", label=name)
    axes.axvline(100 * PAPER_BUDGET, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("symlog", linthresh=0.25)
    axes.set_xlim(-0.05, 130 * BUDGETS[-1])
    axes.set_xlabel("budget alpha, % of bit operations (dashed: the paper's)")
    axes.set_ylabel("KL over KL without copies")
    axes.legend(frameon=False)
    save(figure, "budget.png")


def main() -> None:
    torch.set_num_threads(1)
    lines = measure()
    write_document("budget", lines)
    replace(DOCS / "tables/budget.md", "budget", section(lines))
    picture(lines)


if __name__ == "__main__":
    main()
