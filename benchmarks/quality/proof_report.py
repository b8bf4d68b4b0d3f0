"""Tables and pictures of docs/tables/proof.md from results/proof.jsonl and the demo model.

    python -m benchmarks.quality.proof_report

Writes docs/images/{kl,product_error,resampling}.png and replaces the text between the "proof"
markers of docs/tables/proof.md.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev

import matplotlib
import torch

import varptq
from benchmarks.common.held_out import CALIBRATION, HELD_OUT_IMAGES, held_out
from benchmarks.common.pages import DOCS, replace, save, table
from benchmarks.common.proof_rows import METHODS, NAME, SEEDS, WIDTHS
from benchmarks.common.results import Line, read_lines
from varptq.calibrate.samples import calibration_set
from varptq.evaluate.attention import product_errors
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.quant.describe import bops_account
from varptq.quant.find import quant_mixes, set_theta

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# The bare w4a4 without smoothing, which gains on models with uneven channels (docs/quality.md).
UNSMOOTHED = "w4a4+paper+center+rotate+p8+edges8+token"


def read(samples: int = CALIBRATION.num_samples) -> list[Line]:
    return [x for x in read_lines(NAME) if x["calibration"]["num_samples"] == samples]


def cell(lines: list[Line], width: str, method: str, value: Callable[[Line], float]) -> str:
    values = [value(x) for x in lines if x["width"] == width and x["method"] == method]
    if not values:
        return "-"
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.3f} ± {spread:.3f}"


def by_method(lines: list[Line], value: Callable[[Line], float]) -> list[str]:
    rows = [[f"`{method}`", *(cell(lines, w, method, value) for w in WIDTHS)] for method in METHODS]
    return table(["method", *WIDTHS], rows)


def few_samples() -> list[str]:
    """Resampling where frequencies are far off: a handful of calibration images."""
    head = ["samples", "`brecq`", "`brecq+resample`"]
    rows = [
        [
            str(n),
            *(cell(read(n), "w4a4+paper", m, kl_filtered) for m in ("brecq", "brecq+resample")),
        ]
        for n in (8, CALIBRATION.num_samples)
    ]
    return ["**Resampling with fewer samples, W4A4:**", "", *table(head, rows)]


def beyond(pipe: Pipeline, lines: list[Line]) -> list[str]:
    """Presets that go past the paper at W4A4, with their price in bit operations."""
    base = bops_account(pipe.var, QuantConfig.preset("w4a4+paper")).total
    head = ["preset", "BOPs of w4a4+paper", "`rtn`", "`sas`"]
    rows = []
    for name in ("w4a4+paper", "w4a4+paper+litevar", UNSMOOTHED, f"{UNSMOOTHED}+qk8+v8"):
        ratio = bops_account(pipe.var, QuantConfig.preset(name)).total / base
        cells = [cell(lines, name, method, kl_filtered) for method in ("rtn", "sas")]
        if name == "w4a4+paper+litevar":
            cells = ["-", cell(lines, "w4a4+paper", "sas+litevar", kl_filtered)]
        rows.append([f"`{name}`", f"{ratio:.2f}x", *cells])
    return table(head, rows)


def kl_filtered(line: Line) -> float:
    return line["fidelity"]["kl_filtered"]


def plot_kl(lines: list[Line]) -> None:
    figure, axes = plt.subplots(1, len(WIDTHS), figsize=(12, 3.4), sharex=True)
    for axis, width in zip(axes, WIDTHS, strict=True):
        for method in METHODS:
            runs = [x for x in lines if x["width"] == width and x["method"] == method]
            if runs:
                scales = [x["fidelity"]["kl_filtered_per_scale"] for x in runs]
                curve = torch.tensor(scales).mean(0)
                axis.plot(range(1, len(curve) + 1), curve, marker="o", ms=3, label=method)
        axis.set_title(width.upper())
        axis.set_xlabel("scale")
        axis.set_yscale("log")
    axes[0].set_ylabel("KL to float, nats per token")
    axes[0].legend(fontsize=7)
    save(figure, "kl.png")


def plot_product_error(pipe: Pipeline) -> None:
    """p v of every width, with the released probability rule and 8-bit uniform ones."""
    test = held_out(pipe)
    labels, ids = test.prompts[:20], test.tokens[:20]
    thetas = {x["width"]: x["theta"] for x in read() if x["method"] == "sas"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, extra in zip(axes, ("", "+p8"), strict=True):
        for color, width in zip(("C0", "C3"), ("w6a6+paper", "w4a4+paper"), strict=True):
            model = convert(pipe.var, QuantConfig.preset(width + extra))
            for theta, style in ((None, "--"), (thetas.get(width), "-")):
                set_theta(model, theta)
                errors = product_errors(pipe, list(quant_mixes(model)), labels, ids).mean(0)
                name = f"{width.upper()}, " + ("plain" if theta is None else "shift-and-sum")
                axis.plot(
                    range(1, len(errors) + 1), errors, style, color=color, marker="o", label=name
                )
        axis.set_title("log2 probabilities (paper)" if not extra else "uniform 8-bit probabilities")
        axis.set_xlabel("scale")
        axis.set_yscale("log")
    axes[0].set_ylabel("error energy of p v / energy of p v")
    axes[0].legend(fontsize=7)
    save(figure, "product_error.png")


def plot_resampling(pipe: Pipeline) -> list[str]:
    result = calibration_set(pipe, CALIBRATION, seed=SEEDS[0], resampled=True).resampling
    assert result is not None
    shown = [0, 2, pipe.scales.num_scales - 1]
    figure, axes = plt.subplots(1, len(shown), figsize=(11, 3.6))
    for axis, scale in zip(axes, shown, strict=True):
        report = result.scales[scale]
        target = report.target_count.double()
        for name, count, color in (
            ("sampled", report.count_before, "C1"),
            ("resampled", report.count_after, "C0"),
        ):
            axis.scatter(target, count, s=7, label=name, color=color, alpha=0.6)
        top = float(target.max()) * 1.15 + 1
        axis.plot([0, top], [0, top], color="0.6", lw=0.8)
        axis.set_title(f"scale {scale + 1}")
        axis.set_xlabel("target count of an entry (mean probability)")
    axes[0].set_ylabel("count in the calibration set")
    axes[0].legend(fontsize=8)
    save(figure, "resampling.png")
    rows = [
        f"| {k + 1} | {s.l1_before:.3f} | {s.l1_after:.3f} | {len(s.moves)} |"
        for k, s in enumerate(result.scales)
    ]
    return ["| scale | L1 before | L1 after | tokens moved |", "|---|---|---|---|", *rows, ""]


def main() -> None:
    torch.set_num_threads(2)
    lines = read()
    pipe = varptq.load_model("demo")
    plot_kl(lines)
    plot_product_error(pipe)
    resampling = plot_resampling(pipe)
    headline = by_method(lines, kl_filtered)
    seconds = [x["seconds"] for x in lines if x["method"] != "rtn"]
    count = sum(x["width"] in WIDTHS for x in lines)
    text = [
        f"{count} calibrations, {CALIBRATION.num_samples} samples, {CALIBRATION.steps} steps "
        f"per unit, mean ± standard deviation over up to {len(SEEDS)} calibration seeds; "
        f"{HELD_OUT_IMAGES} held-out images. A calibration took {min(seconds):.0f} to "
        f"{max(seconds):.0f} s on one thread of a shared machine.",
        "",
        "**KL of the guided, filtered distributions, nats per token:**",
        "",
        *headline,
        "**The same without the filter:**",
        "",
        *by_method(lines, lambda x: x["fidelity"]["kl"]),
        "**Top-1 agreement:**",
        "",
        *by_method(lines, lambda x: x["fidelity"]["top1"]),
        "![KL per scale](../images/kl.png)",
        "",
        "![error of the attention-value product per scale](../images/product_error.png)",
        "",
        "![codebook counts before and after resampling](../images/resampling.png)",
        "",
        *resampling,
        *few_samples(),
        "**Beyond the paper, W4A4, KL as in the first table:**",
        "",
        *beyond(pipe, lines),
    ]
    replace(DOCS / "tables/proof.md", "proof", text)


if __name__ == "__main__":
    main()
