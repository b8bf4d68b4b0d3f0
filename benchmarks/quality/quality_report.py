"""Tables and pictures of docs/tables/quality4bit.md from results/quality4bit.jsonl.

    python -m benchmarks.quality.quality_report

Prints the targets and writes docs/images/quality_{attribution,frontier,scales}.png, the text
between the "targets" and "runs" markers of docs/tables/quality4bit.md, and the table of presets in
docs/quality.md, what they cost on other models, and their images from
results/preset_images.jsonl. Ratios are to the released
quantizers at the same nominal bits: nearest rounding, theta from the 1% budget. KL is the mean over
calibration seeds, behind +- half of what lies between the smallest and the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from statistics import mean
from typing import NamedTuple

import matplotlib

import varptq
from benchmarks.common import orbitquant
from benchmarks.common.judges import RESNET56
from benchmarks.common.methods_rows import FLOAT, PRESET, PRESET_IMAGES, STUDIES
from benchmarks.common.pages import DOCS, replace, save, table
from benchmarks.common.quality4bit_rows import (
    FINER,
    GROUP_NAMES,
    GROUPED,
    HEAD_4,
    LAST,
    MODELS,
    NAME,
    OFFERED,
    PARTS_LAST,
    TUNABLE,
    TUNED_LAST,
    config_of,
)
from benchmarks.common.results import Line, read_lines
from varptq.analyze.suggest import Prices
from varptq.models.families import family
from varptq.models.meta import on_meta
from varptq.models.pipeline import Pipeline
from varptq.models.presets import preset
from varptq.quant.config import QuantConfig
from varptq.quant.describe import bops_account

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

RUNS = {
    2: "Centring and smoothing, without rotation",
    3: "Rotation",
    4: "The fc2 input of w4a4+groups",
    5: "Smoothing",
    6: "Attention policies of w4a4+groups",
    7: "Other widths within w4a4+groups",
    8: "Rounding of the weights",
    12: "Finals",
    LAST: "The presets, GPTQ, 512 images of their own, on integers",
    TUNED_LAST: "The same, tuned",
    PARTS_LAST: "The same with the paper's parts",
}


PAPER = "w4a4+paper"
# Images of a preset, and of the float model that they are compared with.
SAMPLED = 10_000


class Target(NamedTuple):
    """A preset, the baseline it is held against, and the largest ratio of KL and of BOPs."""

    label: str
    baseline: str
    ratio: float
    bops: float | None = None


TARGETS = (
    Target(f"{HEAD_4}, gptq", "w4a4 released", 0.4, 1.05),
    Target(f"{FINER}, gptq", "w4a4 released", 0.22, 1.15),
    Target(f"{FINER}, gptq", "fpqvar", 0.7, 1.15),
    Target("w4a8+groups, gptq", "w4a8 released", 0.2),
    Target("w6a6, gptq", "w6a6 released", 0.3),
    Target("w8a8, gptq", "w8a8 released", 0.04),
)


def values(lines: list[Line], model: str, label: str, field: str) -> list[float]:
    """What was measured with each seed."""
    return [x[field] for x in lines if (x["model"], x["label"]) == (model, label) and field in x]


def value(lines: list[Line], model: str, label: str, field: str) -> float | None:
    """Mean over seeds of what was measured, None where nothing was."""
    found = values(lines, model, label, field)
    return mean(found) if found else None


def shown(number: float | None, digits: str = ".4f") -> str:
    return "-" if number is None else format(number, digits)


def spread(found: list[float]) -> str:
    """Mean over seeds, and half the range where there are several."""
    if len(found) < 2:
        return shown(found[0] if found else None)
    return f"{mean(found):.4f} ± {(max(found) - min(found)) / 2:.4f}"


def targets(lines: list[Line]) -> list[str]:
    """One row per target and model."""
    final = [x for x in lines if x["run"] in (8, 12)]
    head = ["preset", "model", "BOPs", "KL", "of", "ratio", "wanted", "FD", "baseline's FD"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for target in TARGETS:
        for model in MODELS:
            own, other = (values(final, model, x, "kl") for x in (target.label, target.baseline))
            bops = value(final, model, target.label, "bops")
            if not own or not other or bops is None:
                continue
            ratio = mean(own) / mean(other)
            met = ratio <= target.ratio and bops <= (target.bops or bops)
            wanted = f"{target.ratio:g}x" + (f" at {target.bops:g}x BOPs" if target.bops else "")
            distances = (value(final, model, x, "fd") for x in (target.label, target.baseline))
            cells = [
                f"`{target.label}`",
                model,
                f"{bops:.2f}x",
                spread(own),
                f"{target.baseline} {spread(other)}",
                f"{ratio:.3f}x",
                wanted + (", met" if met else ", missed"),
                *(shown(distance, ".3g") for distance in distances),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""]


def tables(lines: list[Line]) -> list[str]:
    text: list[str] = []
    for run, title in RUNS.items():
        part = [x for x in lines if x["run"] == run]
        if not part:
            continue
        sampled = any("fd" in x for x in part)
        head = ["", "BOPs", "KL, demo", "KL, twin", "top-1, demo", *(["FD, demo"] * sampled)]
        text += [f"**{title}:**", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for label in dict.fromkeys(x["label"] for x in part):
            bops = next(x["bops"] for x in part if x["label"] == label)
            cells = [label, f"{bops:.2f}x"]
            cells += [spread(values(part, model, label, "kl")) for model in MODELS]
            cells.append(shown(value(part, "demo", label, "top1"), ".3f"))
            if sampled:
                cells.append(shown(value(part, "demo", label, "fd"), ".3g"))
            text.append(f"| {' | '.join(cells)} |")
        text.append("")
    return text


class Wanted(NamedTuple):
    """The most bit operations and KL of a preset, calibrated and tuned; None was not said."""

    bops: float | None
    kl: float | None
    tuned: float | None = None


WANTED = {
    "w4a4": Wanted(1.07, 0.130, 0.105),
    "bops1": Wanted(1.00, 0.058, 0.050),
    "best": Wanted(1.15, 0.038, 0.033),
    "w2a8": Wanted(None, 0.058, 0.050),
    "w3a8": Wanted(None, 0.014),
    "w4a8": Wanted(None, 0.0052),
}


def presets(lines: list[Line]) -> list[str]:
    """What users choose from."""
    last = [x for x in lines if x["run"] == LAST]
    tuned = [x for x in lines if x["run"] == TUNED_LAST]
    head = ["preset", "BOPs", "on int8", "KL, demo", "KL, twin", "wanted", "top-1, demo"]
    head += ["tuned: KL, demo", "KL, twin", "wanted"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in OFFERED:
        wanted = WANTED.get(name, Wanted(None, None))
        cells = [f"`{name}`"]
        cells += [shown(value(last, "demo", name, x), ".2f") + "x" for x in ("bops", "bops_int8")]
        cells += [spread(values(last, model, name, "kl")) for model in MODELS]
        cells += [shown(wanted.kl, "g"), shown(value(last, "demo", name, "top1"), ".3f")]
        if name in TUNABLE:
            cells += [spread(values(tuned, model, f"{name}, tuned", "kl")) for model in MODELS]
            cells.append(shown(wanted.tuned, "g"))
        else:
            cells += ["-"] * 3
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""]


def images(presets: list[Line], floats: list[Line]) -> list[str]:
    """Samples of the presets, and of the float model from other seeds."""
    part = [x for x in presets + floats if x["count"] == x.get("float_images") == SAMPLED]
    part = [x for x in part if x["network"] == RESNET56]
    head = ["preset", "FD to float samples", "FD to real images", "LPIPS to float", "right class"]
    rows: list[list[str]] = []
    for width, method in (*((name, PRESET) for name in OFFERED), (FLOAT, FLOAT)):
        found = [x["images"] for x in part if (x["width"], x["method"]) == (width, method)]
        cells = ["float, other seeds" if width == FLOAT else f"`{width}`"]
        for field, digits in (("fd2fp", ".3f"), ("fd", ".2f"), ("lpips", ".4f")):
            cells.append(format(mean(x[field] for x in found), digits))
        cells.append(f"{mean(x['accuracy'] for x in found):.1%}")
        rows.append(cells)
    return table(head, rows)


# Whose bits are counted: the name, and the size where there are several.
COUNTED = ("var-d16", "var-d30", "infinity-2b 0.06M", "infinity-2b 1M", "infinity-8b 1M")
SPREAD = ("w4a4", "bops1", "best", "w2a8", "w3a8", "w4a8")


def bit_operations() -> list[str]:
    """Of the presets on models other than the one they were found on, from shapes."""
    rows: list[list[str]] = []
    for words in COUNTED:
        name, *size = words.split()
        published = preset(name)
        with on_meta():
            networks = family(published.family).build(
                published.transformer_arch, published.autoencoder_arch
            )
        var = Pipeline(*networks, name, family=published.family).sized(*(size or [None])).var
        whole, *found = (
            bops_account(var, QuantConfig.preset(config)).total for config in (PAPER, *SPREAD)
        )
        rows.append([words, *(f"{part / whole:.2f}x" for part in found)])
    return table(["model", *(f"`{name}`" for name in SPREAD)], rows)


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


class Mark(NamedTuple):
    """A final on the frontier, and where its words stand: offset in points and side."""

    label: str
    words: str
    offset: tuple[int, int] = (6, 0)
    side: str = "left"


# By label, None where there is no such number.
Places = Mapping[str, float | None]
# Runs whose rows are finals.
FINAL_RUNS = (8, 12, LAST, TUNED_LAST)
GROUPS = (HEAD_4, GROUPED, FINER, "w4a8+groups", "w6a6")
# By rising bit operations: of those that cost more, those that are no better are left out.
BY_PRICE = ("bops1", "best", "w3a8", "w4a8", "w8a8")
PRESETS = "presets"
CURVES = {
    "released quantizers": ("w4a4 released", "w4a8 released", "w6a6 released", "w8a8 released"),
    "in groups, GPTQ": tuple(f"{name}, gptq" for name in GROUPS),
    PRESETS: BY_PRICE,
    "presets, tuned": tuple(f"{name}, tuned" for name in ("bops1", "best")),
    "sas, converged": ("sas",),
    "FPQVAR": ("fpqvar",),
    "LiteVAR": ("litevar",),
    "OrbitQuant": tuple(orbitquant.WIDTHS),
}
MARKS = (
    Mark("w4a4 released", "w4a4"),
    Mark("w4a8 released", "w4a8", (-6, -3), "right"),
    Mark("w6a6 released", "w6a6", (6, -3)),
    Mark("w8a8 released", "w8a8", (0, 7)),
    Mark(f"{GROUPED}, gptq", "w4a4 in groups"),
    Mark("w4a8+groups, gptq", "w4a8 in groups"),
    *(Mark(name, name, (-6, -4), "right") for name in OFFERED),
    Mark("fpqvar", "FPQVAR", (6, -6)),
    Mark("litevar", "LiteVAR", (-6, 5), "right"),
    *(Mark(name, name.split()[1], (-6, 4), "right") for name in orbitquant.WIDTHS),
)


def megabytes(labels: Iterable[str]) -> dict[str, float]:
    """What the transformer of the demo model takes as an artifact stores it, by label."""
    prices = Prices(varptq.load_model("demo"))
    return {label: prices.bytes(config_of(label)) / 1e6 for label in labels}


def plot_frontier(lines: list[Line]) -> None:
    """KL over bit operations and over bytes."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.6))
    final = [x for x in lines if x["run"] in FINAL_RUNS]
    final = [x for x in final if x["run"] != 12 or x["label"] not in OFFERED]
    labels = {*OFFERED, *chain.from_iterable(CURVES.values())}
    stored = megabytes(labels)
    for (above, below), model in zip(axes.T, MODELS, strict=True):
        kl, bops = (
            {label: value(final, model, label, field) for label in labels}
            for field in ("kl", "bops")
        )
        frontier(above, bops, kl, BY_PRICE)
        frontier(below, stored, kl, OFFERED)
        above.set(title=model, xscale="log", xlim=(0.6, 7), xlabel="BOPs, relative to w4a4+paper")
        above.set_xticks([1, 2, 4], ["1x", "2x", "4x"])
        above.minorticks_off()
        below.set(xlim=(1.5, 15.5), xlabel="MB of the transformer, as stored")
    axes[0][0].legend(fontsize=7, loc="lower left")
    for axis in axes[:, 0]:
        axis.set_ylabel("KL, nats per token")
    save(figure, "quality_frontier.png")


def frontier(axis: Axes, price: Places, kl: Places, names: Sequence[str]) -> None:
    """The finals by price and KL; names: the presets among them."""
    for index, (name, marker) in enumerate(zip(CURVES, "sov^PDXh", strict=True)):
        labels = names if name == PRESETS else CURVES[name]
        found = [(price[x], kl[x]) for x in labels if price[x] is not None and kl[x] is not None]
        if found:
            axis.plot(*zip(*found, strict=True), marker, ms=5, label=name, c=f"C{index}")
    for mark in MARKS:
        x, y = price[mark.label], kl[mark.label]
        if x is not None and y is not None and mark.label not in set(OFFERED) - set(names):
            axis.annotate(mark.words, (x, y), fontsize=7, xytext=mark.offset, va="center",
                          ha=mark.side, textcoords="offset points")  # fmt: skip
    axis.set_yscale("log")


def plot_scales(lines: list[Line]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, model in zip(axes, MODELS, strict=True):
        part = [x for x in lines if x["run"] in (12, LAST)]
        for label in ("w4a4 released", "fpqvar", "w4a4", "bops1", "best", "w4a8"):
            curves = values(part, model, label, "kl_per_scale")
            if curves:
                curve = [mean(column) for column in zip(*curves, strict=True)]
                axis.plot(range(1, len(curve) + 1), curve, marker="o", ms=3, label=label)
        axis.set(title=model, yscale="log", xlabel="scale")
    axes[0].set_ylabel("KL, nats per token")
    axes[0].legend(fontsize=8)
    save(figure, "quality_scales.png")


def main(say: Callable[[str], None] = print) -> None:
    lines = read_lines(NAME)
    for plot in (plot_attribution, plot_frontier, plot_scales):
        plot(lines)
    rows = targets(lines)
    say("\n".join(rows))
    pictures = [
        "![where the error comes from](../images/quality_attribution.png)",
        "",
        "![KL over bit operations and over bytes](../images/quality_frontier.png)",
        "",
        "![KL per scale](../images/quality_scales.png)",
        "",
    ]
    replace(DOCS / "quality.md", "presets", presets(lines))
    replace(DOCS / "quality.md", "preset bops", bit_operations())
    sampled = images(read_lines(PRESET_IMAGES), read_lines(STUDIES["demo"].name))
    replace(DOCS / "quality.md", "preset images", sampled)
    replace(DOCS / "tables/quality4bit.md", "targets", rows)
    replace(DOCS / "tables/quality4bit.md", "runs", [*tables(lines), *pictures])


if __name__ == "__main__":
    main()
