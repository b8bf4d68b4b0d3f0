"""Tables and pictures of docs/quality.md from results/quality4bit.jsonl.

    python benchmarks/quality_report.py

Prints the targets and writes docs/images/quality_{attribution,frontier,scales}.png and the text
between the "targets" and "runs" markers of docs/quality.md. Ratios are to the released quantizers
at the same nominal bits: nearest rounding, theta from the 1% budget.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any, NamedTuple

import matplotlib
from proof_report import DOCS, replace, save
from quality4bit import GROUP_NAMES, read

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Line = dict[str, Any]
MODELS = ("demo", "twin")
WIDTHS = ("w4a4", "w4a8", "w6a6", "w8a8")
RUNS = {
    2: "Centring and smoothing, without rotation",
    3: "Rotation",
    4: "The fc2 input of w4a4",
    5: "Smoothing",
    6: "Attention policies of w4a4",
    7: "Other widths within w4a4",
    8: "Rounding of the weights",
    12: "Finals",
}


class Target(NamedTuple):
    """A preset, the baseline it is held against, and the largest ratio of KL and of BOPs."""

    label: str
    baseline: str
    ratio: float
    bops: float | None = None


TARGETS = (
    Target("w4a4, head 4 bits", "w4a4 released", 0.4, 1.05),
    Target("best", "w4a4 released", 0.22, 1.15),
    Target("best, gptq", "w4a4 released", 0.22, 1.15),
    Target("best", "fpqvar", 0.7, 1.15),
    Target("w4a8", "w4a8 released", 0.2),
    Target("w6a6", "w6a6 released", 0.3),
    Target("w8a8", "w8a8 released", 0.04),
)


def value(lines: list[Line], model: str, label: str, field: str) -> float | None:
    """Mean over seeds of what was measured, None where nothing was."""
    found = [x[field] for x in lines if (x["model"], x["label"]) == (model, label) and field in x]
    return mean(found) if found else None


def shown(number: float | None, digits: str = ".4f") -> str:
    return "-" if number is None else format(number, digits)


def targets(lines: list[Line]) -> list[str]:
    """One row per target and model."""
    final = [x for x in lines if x["run"] in (8, 12)]
    head = ["preset", "model", "BOPs", "KL", "of", "ratio", "wanted", "FD", "baseline's FD"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for target in TARGETS:
        for model in MODELS:
            kl, other, bops, fd, fd_other = (
                value(final, model, label, field)
                for label, field in (
                    (target.label, "kl"),
                    (target.baseline, "kl"),
                    (target.label, "bops"),
                    (target.label, "fd"),
                    (target.baseline, "fd"),
                )
            )
            if kl is None or other is None or bops is None:
                continue
            met = kl / other <= target.ratio and bops <= (target.bops or bops)
            wanted = f"{target.ratio:g}x" + (f" at {target.bops:g}x BOPs" if target.bops else "")
            cells = [
                f"`{target.label}`",
                model,
                f"{bops:.2f}x",
                f"{kl:.4f}",
                f"{target.baseline} {other:.4f}",
                f"{kl / other:.3f}x",
                wanted + (", met" if met else ", missed"),
                shown(fd, ".3g"),
                shown(fd_other, ".3g"),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""]


def tables(lines: list[Line]) -> list[str]:
    text: list[str] = []
    for run, title in RUNS.items():
        part = [x for x in lines if x["run"] == run]
        if not part:
            continue
        text += [f"**{title}:**", "", "| | BOPs | KL, demo | KL, twin | top-1, demo |"]
        text.append("|---" * 5 + "|")
        for label in dict.fromkeys(x["label"] for x in part):
            kls = [shown(value(part, model, label, "kl")) for model in MODELS]
            bops = next(x["bops"] for x in part if x["label"] == label)
            top1 = shown(value(part, "demo", label, "top1"), ".3f")
            text.append(f"| {label} | {bops:.2f}x | {' | '.join(kls)} | {top1} |")
        text.append("")
    return text


def plot_attribution(lines: list[Line]) -> None:
    """KL that goes away when a group of tensors is put back to float."""
    part = [x for x in lines if x["run"] == 1]
    figure, axis = plt.subplots(figsize=(7, 3.2))
    for index, line in enumerate(part):
        heights = [line["kl"] - line["put_back"].get(name, line["kl"]) for name in GROUP_NAMES]
        places = [k + 0.4 * index for k in range(len(GROUP_NAMES))]
        axis.bar(places, heights, width=0.38, label=f"{line['label']}, KL {line['kl']:.3f}")
    axis.set_xticks([k + 0.2 for k in range(len(GROUP_NAMES))], GROUP_NAMES, fontsize=8)
    axis.set_ylabel("KL gone when put back")
    axis.legend(fontsize=8)
    save(figure, "quality_attribution.png")


def plot_frontier(lines: list[Line]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, model in zip(axes, MODELS, strict=True):
        part = [x for x in lines if x["model"] == model and "bops" in x and x["bops"] < 2.5]
        for finals, color in ((False, "0.7"), (True, "C0")):
            some = [x for x in part if (x["run"] == 12) == finals]
            axis.scatter([x["bops"] for x in some], [x["kl"] for x in some], s=16, color=color)
            for x in some if finals else []:
                axis.annotate(x["label"], (x["bops"], x["kl"]), fontsize=7, xytext=(3, 3),
                              textcoords="offset points")  # fmt: skip
        axis.set(title=model, yscale="log", xlabel="BOPs, relative to w4a4+paper")
    axes[0].set_ylabel("KL, nats per token")
    save(figure, "quality_frontier.png")


def plot_scales(lines: list[Line]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, model in zip(axes, MODELS, strict=True):
        for label in ("w4a4 released", "fpqvar", "w4a4", "best"):
            found = [x for x in lines if (x["run"], x["model"], x["label"]) == (12, model, label)]
            if found:
                curve = found[0]["kl_per_scale"]
                axis.plot(range(1, len(curve) + 1), curve, marker="o", ms=3, label=label)
        axis.set(title=model, yscale="log", xlabel="scale")
    axes[0].set_ylabel("KL, nats per token")
    axes[0].legend(fontsize=8)
    save(figure, "quality_scales.png")


def main(say: Callable[[str], None] = print) -> None:
    lines = read()
    for plot in (plot_attribution, plot_frontier, plot_scales):
        plot(lines)
    rows = targets(lines)
    say("\n".join(rows))
    pictures = [
        "![where the error comes from](images/quality_attribution.png)",
        "",
        "![KL over bit operations](images/quality_frontier.png)",
        "",
        "![KL per scale](images/quality_scales.png)",
        "",
    ]
    replace(DOCS / "quality.md", "targets", rows)
    replace(DOCS / "quality.md", "runs", [*tables(lines), *pictures])


if __name__ == "__main__":
    main()
