"""Tables and picture of the page docs/tables/methods.md, from results/methods.jsonl.

    python -m benchmarks.quality.methods_report

Token measures of further calibration seeds come from results/proof.jsonl, whose calibrations are
the same. The paper's numbers stand beside ours as changes against BRECQ at the same width, since
levels of another model, data set and feature network say nothing here. Writes the text between the
"methods" markers and docs/images/methods.png.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from statistics import mean, stdev

import matplotlib
import numpy as np

from benchmarks.common.judges import RESNET56
from benchmarks.common.methods_rows import (
    ABLATED_WIDTHS,
    ABLATION,
    FLOAT,
    METHODS,
    NAME,
    NEAREST,
    PAPER,
    VQVAE,
    WIDTHS,
    standard_error,
)
from benchmarks.common.pages import DOCS, replace, save, table
from benchmarks.common.proof_rows import NAME as PROOF
from benchmarks.common.results import Line, read_lines

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axis import Axis

BASE = "brecq"
# FID2FP16 of the paper's table, 50,000 images: VAR-d16 and VAR-d30.
PAPER_FID2FP = {
    "w6a6": {
        "brecq": (4.29, 2.55),
        "litevar": (4.05, 2.48),
        "sas": (3.14, 2.09),
        "sas+litevar": (2.64, 1.85),
    },
    "w4a8": {
        "brecq": (4.76, 1.96),
        "litevar": (3.85, 2.03),
        "sas": (4.05, 1.81),
        "sas+litevar": (3.00, 1.76),
    },
    "w4a6": {
        "brecq": (10.57, 4.17),
        "litevar": (9.09, 4.60),
        "sas": (8.44, 3.74),
        "sas+litevar": (5.28, 3.56),
    },
    "w4a4": {
        "brecq": (32.82, 14.66),
        "litevar": (36.67, 11.11),
        "sas": (24.35, 8.68),
        "sas+litevar": (18.32, 8.48),
    },
}
# Its ablation at W4A6, FID2FP16: VAR-d16 and VAR-d20.
PAPER_ABLATION = {
    "brecq": (10.57, 6.62),
    "brecq+shift": (9.55, 6.03),
    "brecq+resample": (9.74, 5.61),
    "sas": (8.44, 5.09),
}


class Results:
    """The lines of one image count, and the token measures of more seeds."""

    def __init__(self, lines: list[Line], proof: list[Line], count: int) -> None:
        self.count = count
        own = [line for line in lines if line["network"] == RESNET56]
        # Real images through the VQVAE are the same ones at every count.
        self.lines = [x for x in own if x["count"] == self.count or x["width"] == VQVAE]
        samples = {line["calibration"]["num_samples"] for line in proof}
        self.proof = [x for x in proof if x["calibration"]["num_samples"] == max(samples)]
        self.float_images = next(x["float_images"] for x in self.lines if x["width"] != VQVAE)

    def of(self, width: str, method: str) -> list[Line]:
        return [x for x in self.lines if (x["width"], x["method"]) == (width, method)]

    def images(self, width: str, method: str, name: str) -> list[float]:
        return [line["images"][name] for line in self.of(width, method)]

    def without(self, width: str, method: str, name: str) -> np.ndarray:
        """(10,) means over seeds of a distance without one tenth of the images each."""
        return np.mean([line["images"]["without"][name] for line in self.of(width, method)], axis=0)

    def error(self, width: str, method: str, name: str) -> float:
        """Standard error of the mean over seeds that comes from the number of images."""
        return standard_error(self.without(width, method, name).tolist())

    def seed_error(self, width: str, method: str, name: str) -> float:
        """Standard error of the mean over seeds that comes from their number. A single one says
        nothing of it and takes the deviation of the width's other methods, 0 if none has it."""
        values = self.images(width, method, name)
        if len(values) > 1:
            return stdev(values) / len(values) ** 0.5
        several = [self.images(width, other, name) for other in self.methods(width)]
        deviations = [stdev(found) for found in several if len(found) > 1]
        return math.hypot(*deviations) / len(deviations) ** 0.5 if deviations else 0.0

    def tokens(self, width: str, method: str, name: str) -> list[float]:
        by_seed = {line["seed"]: line["fidelity"][name] for line in self.of(width, method)}
        for line in self.proof:
            if (line["width"], line["method"]) == (width + PAPER, method):
                by_seed.setdefault(line["seed"], line["fidelity"][name])
        return list(by_seed.values())

    def widths(self) -> list[str]:
        return [width for width in WIDTHS if any(x["width"] == width for x in self.lines)]

    def methods(self, width: str) -> list[str]:
        asked = (*METHODS, *(ABLATION if width in ABLATED_WIDTHS else ()))
        return [method for method in asked if self.of(width, method)]

    @property
    def chance(self) -> float:
        """FD2FP of the float model with other image seeds."""
        return mean(self.images(FLOAT, FLOAT, "fd2fp"))

    def excess(self, width: str, method: str) -> float:
        """FD2FP above chance."""
        return mean(self.images(width, method, "fd2fp")) - self.chance


def over_seeds(values: list[float], digits: int) -> str:
    """Mean, and the deviation over seeds where there are several."""
    if not values:
        return "-"
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def distance(results: Results, width: str, method: str, name: str, digits: int) -> str:
    """Mean over seeds, standard error from the number of images, deviation over seeds."""
    values = results.images(width, method, name)
    text = f"{mean(values):.{digits}f} ± {results.error(width, method, name):.{digits}f}"
    return f"{text} / {stdev(values):.{digits}f}" if len(values) > 1 else text


def anchors(results: Results) -> list[str]:
    head = ["", "FD2FP", "FD", "FD, VQVAE", "accuracy", "IS", "LPIPS"]
    names = (("fd2fp", 3), ("fd", 2), ("fd_vqvae", 2), ("accuracy", 3), ("is", 3), ("lpips", 3))
    seeds = len(results.of(FLOAT, FLOAT))
    floats = [
        # A single set has no deviation, so its distances show the error from their images.
        distance(results, FLOAT, FLOAT, n, digits)
        if seeds == 1 and n.startswith("fd")
        else over_seeds(results.images(FLOAT, FLOAT, n), digits)
        for n, digits in names
    ]
    rows = [["float, other image seeds", *floats]]
    for line in results.of(VQVAE, VQVAE):
        real = [f"{line['images'][n]:.{digits}f}" for n, digits in names[:3]]
        rows.append(["real through the VQVAE", *real, "-", "-", "-"])
    return table(head, rows)


def levels(results: Results, width: str) -> list[str]:
    head = ["method", "seeds", "KL", "top-1", "LPIPS", "FD2FP", "FD", "FD, VQVAE", "accuracy", "IS"]
    rows = []
    for method in results.methods(width):
        cells = [
            f"{len(results.of(width, method))}",
            over_seeds(results.tokens(width, method, "kl_filtered"), 3),
            over_seeds(results.tokens(width, method, "top1"), 3),
            over_seeds(results.images(width, method, "lpips"), 4),
            distance(results, width, method, "fd2fp", 3),
            distance(results, width, method, "fd", 2),
            distance(results, width, method, "fd_vqvae", 2),
            over_seeds(results.images(width, method, "accuracy"), 3),
            over_seeds(results.images(width, method, "is"), 3),
        ]
        rows.append([f"`{method}`", *cells])
    return [f"**{width.upper()}:**", "", *table(head, rows)]


def change(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.0f}%"


def excess_change(results: Results, width: str, method: str) -> str:
    """Of FD2FP above chance; the difference where BRECQ's is not above it. The part of the error
    that comes from the number of images is that of the ratio, since both sets miss the same images;
    so do both have the same chance, whose error is that over its image seeds; calibrations of both
    are independent."""
    base, value = results.excess(width, BASE), results.excess(width, method)
    parts = [results.without(width, m, "fd2fp") - results.chance for m in (method, BASE)]
    of_seeds = [results.seed_error(width, m, "fd2fp") for m in (method, BASE)]
    if base < 2 * results.error(width, BASE, "fd2fp"):
        error = math.hypot(standard_error((parts[0] - parts[1]).tolist()), *of_seeds)
        return f"within chance ({value - base:+.3f} ± {error:.3f})"
    of_images = standard_error((parts[0] / parts[1]).tolist())
    of_chance = results.seed_error(FLOAT, FLOAT, "fd2fp") * (value / base - 1) / base
    error = math.hypot(of_images, of_chance, of_seeds[0] / base, value / base * of_seeds[1] / base)
    return f"{change(value, base)} ± {100 * error:.0f}"


def our_changes(results: Results, width: str, method: str) -> list[str]:
    def means(get: Callable[..., list[float]], name: str) -> str:
        return change(mean(get(width, method, name)), mean(get(width, BASE, name)))

    return [
        means(results.tokens, "kl_filtered"),
        means(results.images, "lpips"),
        excess_change(results, width, method),
    ]


def relative(
    results: Results,
    rows: Iterable[tuple[str, str]],
    paper: Callable[[str, str], tuple[list[str], str]],
) -> list[str]:
    """Changes against BRECQ; `paper` gives its two cells of a row."""
    lines, labels = [], ""
    for width, method in rows:
        if results.of(width, method) and results.of(width, BASE):
            theirs, labels = paper(width, method)
            ours = our_changes(results, width, method)
            lines.append([width.upper(), f"`{method}`", *ours, *theirs])
    models = [f"paper, FID2FP, {name}" for name in labels.split()]
    return table(["width", "method", "KL", "LPIPS", "FD2FP above chance", *models], lines)


def paper_methods(width: str, method: str) -> tuple[list[str], str]:
    found = PAPER_FID2FP.get(width, {})
    pairs = zip(found.get(method, ()), found.get(BASE, ()), strict=True)
    return [change(value, base) for value, base in pairs] or ["-", "-"], "d16 d30"


def paper_ablation(width: str, method: str) -> tuple[list[str], str]:
    pairs = zip(PAPER_ABLATION[method], PAPER_ABLATION[BASE], strict=True)
    cells = [change(value, base) for value, base in pairs]
    return (cells if width == "w4a6" else ["-", "-"]), "d16 d20"


def rank_correlation(first: list[float], second: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def ticks(axis: Axis, places: tuple[float, ...]) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_ticks(places, labels=[f"{place:g}" for place in places])
    axis.set_minor_formatter("")


def picture(results: Results) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(3, 2))
    widths, shown = results.widths(), list(METHODS)
    for place, method in enumerate(shown):
        there = [i for i, width in enumerate(widths) if results.of(width, method)]
        values = [mean(results.images(widths[i], method, "fd2fp")) for i in there]
        errors = [results.error(widths[i], method, "fd2fp") for i in there]
        offsets = [i + (place - len(shown) / 2 + 0.5) * 0.16 for i in there]
        left.bar(offsets, values, 0.15, yerr=errors, label=method, error_kw={"lw": 0.8})
        kl = [mean(results.tokens(widths[i], method, "kl_filtered")) for i in there]
        right.errorbar(kl, values, errors, fmt="o", ms=4, lw=0.8)
    for axis in (left, right):
        axis.axhline(results.chance, color="0.5", ls="--", lw=1, label="float, other seeds")
        axis.set_yscale("log")
        ticks(axis.yaxis, (0.02, 0.05, 0.1, 0.2, 0.4))
    left.set_xlim(-0.5, len(widths) - 0.5)
    left.set_xticks(range(len(widths)), [width.upper() for width in widths])
    left.set_ylabel("FD2FP, ResNet-56 features")
    left.legend(fontsize=7)
    right.set_xscale("log")
    ticks(right.xaxis, (0.08, 0.1, 0.2, 0.4))
    right.set_xlabel("KL to float, nats per token")
    save(figure, "methods.png")


def intro(results: Results) -> list[str]:
    rows = [(w, m) for w in results.widths() for m in results.methods(w)]
    seeds = [len(results.of(*row)) for row in rows if row[1] != NEAREST]
    kl = [mean(results.tokens(*row, "kl_filtered")) for row in rows]
    fd2fp = [mean(results.images(*row, "fd2fp")) for row in rows]
    within = sum(results.excess(*row) < 2 * results.error(*row, "fd2fp") for row in rows)
    return [
        f"{len(rows)} rows, {_span(seeds)} calibration seeds (`{NEAREST}` takes nothing from "
        f"calibration), {results.count} images each; FD2FP against {results.float_images} float "
        "images. Distances: mean ± standard error from the number of images (jackknife over "
        "tenths) / deviation over calibration seeds; all else: mean ± deviation over calibration "
        "seeds.",
        "",
        f"Over all rows the rank correlation of KL and FD2FP is {rank_correlation(kl, fd2fp):.2f}. "
        f"{within} of {len(rows)} rows have an FD2FP within two standard errors of chance, which "
        f"is {results.chance:.3f}.",
        "",
    ]


def _span(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}" if min(values) < max(values) else f"{values[0]}"


def changes(results: Results) -> list[str]:
    """Against BRECQ: the methods, and the parts of the method."""
    compared = [(w, m) for w in results.widths() for m in METHODS if m not in (BASE, NEAREST)]
    ablated = [(w, m) for w in ABLATED_WIDTHS for m in (*ABLATION, "sas")]
    return [
        "**Changes against `brecq`, beside the paper's:**",
        "",
        *relative(results, compared, paper_methods),
        "**The ablation, against `brecq`:**",
        "",
        *relative(results, ablated, paper_ablation),
    ]


def beside(results: Results) -> list[str]:
    """The same with another number of images."""
    return [
        f"**With {results.count} images a row**, and otherwise the same:",
        "",
        *anchors(results),
        *(line for width in results.widths() for line in levels(results, width)),
        *changes(results),
    ]


def others(lines: list[Line]) -> list[str]:
    """The same distances in features of another network, where they were measured; too many
    features for the error, so chance has its deviation over image seeds instead."""
    if not lines:
        return []
    chance = [x["images"]["fd2fp"] for x in lines if x["width"] == FLOAT]
    rows = []
    for line in lines:
        width, found = line["width"], line["images"]
        cells = [f"{found[name]:.2f}" for name in ("fd2fp", "fd", "fd_vqvae")]
        measured = width not in (FLOAT, VQVAE)
        above = f"{found['fd2fp'] - mean(chance):+.2f}" if measured else "-"
        name = width.upper() if measured else f"{width}, seed {line['seed']}"
        rows.append([name, f"`{line['method']}`", *cells, above])
    head = ["width", "method", "FD2FP", "FD", "FD, VQVAE", "FD2FP above chance"]
    counts = _span([line["count"] for line in lines])
    return [
        f"**In the features of {lines[0]['network']}**, {counts} images a row, as many of the "
        f"float model; FD2FP of chance {over_seeds(chance, 2)}:",
        "",
        *table(head, rows),
    ]


def main() -> None:
    lines, proof = read_lines(NAME), read_lines(PROOF)
    own = [line for line in lines if line["network"] == RESNET56 and line["width"] in WIDTHS]
    there = {(line["count"], line["width"], line["method"]) for line in own}
    rows = Counter(count for count, *_ in there)
    # The count that most rows have makes the tables, the larger of equals; others follow.
    usual = max(rows, key=lambda count: (rows[count], count))
    results = Results(lines, proof, usual)
    picture(results)
    widths = results.widths()
    text = [
        *intro(results),
        "**What chance and the VQVAE alone give:**",
        "",
        *anchors(results),
        *(line for width in widths for line in levels(results, width)),
        "![methods by width, and KL against FD2FP](../images/methods.png)",
        "",
        *changes(results),
        *(line for n in sorted(rows) if n != usual for line in beside(Results(lines, proof, n))),
        *others([line for line in lines if line["network"] != RESNET56]),
    ]
    replace(DOCS / "tables/methods.md", "methods", text)


if __name__ == "__main__":
    main()
