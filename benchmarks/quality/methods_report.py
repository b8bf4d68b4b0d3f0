"""Tables and pictures of docs/tables/methods.md and methods_text.md, from their results (.jsonl).

    python -m benchmarks.quality.methods_report

Token measures of further calibration seeds of the first demo come from results/proof.jsonl, whose
calibrations are the same. The paper's numbers stand beside ours as changes against BRECQ at the
same width, since levels of another model, data set and feature network say nothing here. Writes the
text between the "methods" markers and docs/images/methods.png and methods_text.png.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev

import matplotlib
import numpy as np

from benchmarks.common.judges import RESNET56
from benchmarks.common.methods_rows import (
    ABLATION,
    BARE,
    BARE_METHOD,
    FLOAT,
    NEAREST,
    OURS,
    PAPER,
    STUDIES,
    VQVAE,
    Cells,
    Study,
    standard_error,
)
from benchmarks.common.pages import DOCS, replace, save, table
from benchmarks.common.proof_rows import NAMES as PROOFS
from benchmarks.common.results import Line, read_lines

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator

BASE = "brecq"


class Results:
    """The lines of one image count, and the token measures of more seeds."""

    def __init__(self, study: Study, lines: list[Line], proof: list[Line], count: int) -> None:
        self.study, self.count = study, count
        own = [line for line in lines if line["network"] == RESNET56]
        # Real images through the VQVAE are the same ones at every count.
        self.lines = [x for x in own if x["count"] == self.count or x["width"] == VQVAE]
        samples = max((line["calibration"]["num_samples"] for line in proof), default=0)
        self.proof = [x for x in proof if x["calibration"]["num_samples"] == samples]
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
        proven = (width + OURS, BARE_METHOD) if method == BARE else (width + PAPER, method)
        by_seed = {line["seed"]: line["fidelity"][name] for line in self.of(width, method)}
        for line in self.proof:
            if (line["width"], line["method"]) == proven:
                by_seed.setdefault(line["seed"], line["fidelity"][name])
        return list(by_seed.values())

    def widths(self) -> list[str]:
        return [width for width in self.study.widths if self.methods(width)]

    def methods(self, width: str) -> list[str]:
        asked = (*self.study.methods, *ABLATION)
        return [
            method
            for method in asked
            if self.study.has(width, method) and self.tokens(width, method, "kl_filtered")
        ]

    def rows(self) -> list[tuple[str, str]]:
        """Those with images."""
        return [(w, m) for w in self.widths() for m in self.methods(w) if self.of(w, m)]

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
    if not values:
        return "-"
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
            str(len(results.of(width, method) or results.tokens(width, method, "kl_filtered"))),
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

    tokens = means(results.tokens, "kl_filtered")
    if not (results.of(width, method) and results.of(width, BASE)):
        return [tokens, "-", "-"]
    return [tokens, means(results.images, "lpips"), excess_change(results, width, method)]


def relative(
    results: Results, rows: Iterable[tuple[str, str]], columns: Sequence[str], paper: Cells
) -> list[str]:
    """Changes against BRECQ, ours and those of the paper's columns."""
    lines = []
    for width, method in rows:
        if {method, BASE} <= set(results.methods(width)):
            ours, found = our_changes(results, width, method), paper.get(width, {})
            pairs = zip(found.get(method, ()), found.get(BASE, ()), strict=method in found)
            theirs = [change(value, base) for value, base in pairs] or ["-"] * len(columns)
            lines.append([width.upper(), f"`{method}`", *ours, *theirs])
    papers = [f"paper, {column}" for column in columns]
    return table(["width", "method", "KL", "LPIPS", "FD2FP above chance", *papers], lines)


def rank_correlation(first: list[float], second: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def ticks(axis: Axis) -> None:
    """A logarithmic axis with plain numbers, at 1, 2 and 5."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def picture(results: Results) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(3, 2))
    # Those with images, of which some have none.
    widths, shown = list(dict(results.rows())), list(results.study.methods)
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
        ticks(axis.yaxis)
    left.set_xlim(-0.5, len(widths) - 0.5)
    left.set_xticks(range(len(widths)), [width.upper() for width in widths])
    left.set_ylabel("FD2FP, ResNet-56 features")
    left.legend(fontsize=7)
    ticks(right.xaxis)
    right.set_xlabel("KL to float, nats per token")
    save(figure, f"{results.study.name}.png")


def intro(results: Results) -> list[str]:
    rows = results.rows()
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
    study = results.study
    others = [method for method in study.methods if method not in (BASE, NEAREST)]
    compared = [(w, m) for w in results.widths() for m in others]
    ablated = [(w, m) for w in study.ablated_widths for m in (*ABLATION, "sas")]
    return [
        "**Changes against `brecq`, beside the paper's:**",
        "",
        *relative(results, compared, study.columns, study.paper),
        "**The ablation, against `brecq`:**",
        "",
        *relative(results, ablated, study.ablation_columns, study.ablation),
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


def presets(proof: list[Line]) -> list[str]:
    """Our presets by their own names, in tokens alone."""
    found: dict[str, list[Line]] = {}
    for line in proof:
        if "+" not in line["width"] and line["method"] == BARE_METHOD:
            found.setdefault(line["width"], []).append(line["fidelity"])
    rows = [
        [
            f"`{name}`",
            str(len(lines)),
            *(over_seeds([x[key] for x in lines], 3) for key in ("kl_filtered", "top1")),
        ]
        for name, lines in found.items()
    ]
    if not rows:
        return []
    return [
        "**The presets as they are now**, weights rounded by GPTQ:",
        "",
        *table(["preset", "seeds", "KL", "top-1"], rows),
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


def write(study: Study, lines: list[Line], proof: list[Line]) -> None:
    """The page and the picture of one model."""
    own = [line for line in lines if line["network"] == RESNET56 and line["width"] in study.widths]
    there = {(line["count"], line["width"], line["method"]) for line in own}
    rows = Counter(count for count, *_ in there)
    # The count that most rows have makes the tables, the larger of equals; others follow.
    usual = max(rows, key=lambda count: (rows[count], count))
    results, *others_of = (
        Results(study, lines, proof, n) for n in (usual, *sorted(rows.keys() - {usual}))
    )
    picture(results)
    text = [
        *intro(results),
        "**What chance and the autoencoder alone give:**",
        "",
        *anchors(results),
        *(line for width in results.widths() for line in levels(results, width)),
        f"![methods by width, and KL against FD2FP](../images/{study.name}.png)",
        "",
        *changes(results),
        *presets(proof),
        *(line for one in others_of for line in beside(one)),
        *others([line for line in lines if line["network"] != RESNET56]),
    ]
    replace(DOCS / f"tables/{study.name}.md", "methods", text)


def main() -> None:
    for model, study in STUDIES.items():
        lines = read_lines(study.name)
        if lines:
            write(study, lines, read_lines(PROOFS[model]))


if __name__ == "__main__":
    main()
