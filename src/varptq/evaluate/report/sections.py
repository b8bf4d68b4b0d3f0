"""The sections of the page about quality, each made from the document of `evaluate`.

A section whose numbers were not measured returns None and does not appear. What the model is made
of is in anatomy.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from varptq import readable
from varptq.evaluate.catalogue import METRICS, sources, titled
from varptq.evaluate.report.charts import Axis, Series, cloud, curves
from varptq.evaluate.report.gallery import Pair, gallery
from varptq.evaluate.report.markup import Markup, element, join

Document = Mapping[str, Any]

# Points of the codebook plot; more would overlap.
MAX_POINTS = 320
ARROWS = {"lower": "↓", "higher": "↑"}


def section(anchor: str, title: str, *parts: object) -> Markup:
    return element("section", element("h2", title), *parts, id=anchor)


def note(*parts: object) -> Markup:
    return element("p", *parts, class_="note")


def figure(title: str, picture: Markup, series: Sequence[Series] = (), says: str = "") -> Markup:
    """A picture with its title above, and a legend if it has more than one series."""
    keys = [element("span", line.name, class_=f"key {line.tone}") for line in series]
    legend = element("div", *keys, class_="legend") if len(keys) > 1 else None
    caption = element("figcaption", element("b", title), legend)
    return element("figure", caption, picture, note(says) if says else None, class_="chart")


def quality(document: Document) -> Markup:
    """The metrics, each with its number and one sentence."""
    found, of_float = document["metrics"], document["float_metrics"]
    head = ["Metric", document["kind"], *(["float"] if of_float else []), "What it says"]
    network = document["settings"]["network"]
    rows = [_metric_row(name, network, found, of_float) for name in METRICS if name in found]
    table = element(
        "table",
        element("thead", element("tr", *(element("th", name, scope="col") for name in head))),
        element("tbody", *rows),
        class_="metrics",
    )
    arrows = note("↓ lower is better, ↑ higher is better.", _left_out(document["left_out"]))
    warnings = [element("p", text, class_="warning") for text in document["warnings"]]
    taken_from = note(f"{text}.") if (text := sources(document)) else None
    return section("quality", "Quality", *warnings, table, arrows, taken_from)


def _metric_row(name: str, network: str | None, found: Document, of_float: Document) -> Markup:
    metric = METRICS[name]
    arrow = element("span", ARROWS[metric.better], title=f"{metric.better} is better")
    cells = [
        element("th", titled(name, network), " ", arrow, scope="row"),
        element("td", _value(name, found), class_="number"),
    ]
    if of_float:
        value = _value(name, of_float) if name in of_float else ""
        cells.append(element("td", value, class_="number float"))
    return element("tr", *cells, element("td", metric.sentence, class_="says"))


def _value(name: str, found: Document) -> str:
    text = METRICS[name].written(found[name])
    spread = found.get(f"{name}_std")
    return text if spread is None else f"{text} ± {spread:.2f}"


def _left_out(reasons: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(METRICS[name].title)
    parts = [f"{', '.join(names)} would need {reason}" for reason, names in by_reason.items()]
    return f" Not computed: {'; '.join(parts)}." if parts else ""


def images(document: Document, pairs: Sequence[Pair]) -> Markup | None:
    if not pairs:
        return None
    says = f"The first of {document['settings']['count']} samples, class by class."
    if pairs[0].above is not None:
        says = (
            f"Float above {document['kind']}, same class and noise; the percentage is the share of "
            "equal tokens. " + says
        )
    return section("images", "Samples", note(says), gallery(pairs))


def scale_by_scale(document: Document) -> Markup | None:
    """Curves over the scales, coarse to fine."""
    found = document["per_scale"]
    charts = [
        chart
        for chart in (
            _curve(
                "KL divergence from the float model, nats",
                found,
                {"kl": ("all entries", "quantized"), "kl_filtered": ("filtered", "second")},
                readable.plain,
            ),
            _curve(
                "Agreement with the float model",
                found,
                {
                    "top1": ("most likely token, same context", "quantized"),
                    "token_agreement": ("drawn token, own context", "second"),
                },
                lambda value: f"{value:.0%}",
            ),
        )
        if chart is not None
    ]
    if not charts:
        return None
    body = element("div", *charts, class_="charts")
    return section("scales", "Scale by scale", body)


def _curve(
    title: str, found: Document, lines: Mapping[str, tuple[str, str]], form: Any
) -> Markup | None:
    series = [Series(name, found[key], tone) for key, (name, tone) in lines.items() if key in found]
    if not series:
        return None
    top = max(value for line in series for value in line.values)
    names = [readable.side(side) for side in found["sides"]]
    picture = curves(series, names, Axis.linear(top), form, "side of the token map")
    return figure(title, picture, series)


def codebook(document: Document) -> Markup:
    """How often each codebook entry was drawn, and how resampling moved the calibration tokens."""
    found = document["codebook"]
    charts = [_frequencies(found, document["kind"])]
    resampling = (document.get("model") or {}).get("resampling")
    if resampling:
        charts.append(_resampling(resampling, document["per_scale"]["sides"]))
    body = element("div", *charts, class_="charts")
    return section("codebook", "Codebook", body)


def _frequencies(found: Document, kind: str) -> Markup:
    counts = found["counts"]
    base = found.get("float_counts") or counts
    order = sorted(range(len(base)), key=lambda entry: -base[entry])
    total = max(sum(counts), 1)
    line = Series("float", _binned([base[i] / total for i in order]), "float")
    points = Series(kind, _binned([counts[i] / total for i in order]), "quantized")
    high = max(*line.values, *points.values)
    axis = Axis.decades(0.5 / total, max(high, 1 / total))
    below = f"{len(base)} entries, frequent ones first"
    picture = cloud(points, line, axis, _power, below)
    used = f"{sum(c > 0 for c in counts)} of {len(counts)} entries were drawn"
    if "float_counts" in found:
        used += (
            f", {sum(c > 0 for c in base)} by the float model; the L1 distance of the two "
            f"distributions is {readable.significant(found['distance'])}"
        )
    if 0 in (*line.values, *points.values):
        used += "; entries never drawn lie on the bottom line"
    title = "Share of the sampled tokens, by codebook entry"
    series = [points, line] if "float_counts" in found else []
    return figure(title, picture, series, f"{used}.")


def _binned(values: Sequence[float]) -> list[float]:
    """Means of neighbours, at most `MAX_POINTS`."""
    size = -(-len(values) // MAX_POINTS)
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(part) / len(part) for part in parts]


def _power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if value < 0.001 else f"{value:g}"


def _resampling(found: Document, sides: Sequence[int]) -> Markup:
    before = Series("as drawn", [scale["l1_before"] for scale in found["scales"]], "second")
    after = Series("resampled", [scale["l1_after"] for scale in found["scales"]], "quantized")
    axis = Axis.linear(max(*before.values, *after.values))
    names = [readable.side(side) for side in sides]
    picture = curves([before, after], names, axis, readable.plain, "side of the token map")
    says = f"L1 distance. {found['moved']} calibration tokens were drawn again."
    title = "Calibration tokens: frequencies against predicted probabilities"
    return figure(title, picture, [before, after], says)


def lede(document: Document) -> Markup:
    """The whole result in two lines."""
    found, model = document["metrics"], document.get("model")
    parts: list[str] = []
    if model:
        size, bops = model["sizes"]["transformer"], model["bops"]
        if size["bytes"] < size["float32_bytes"]:
            parts.append(
                f"Transformer of {readable.megabytes(size['bytes'])} in place of "
                f"{readable.megabytes(size['float32_bytes'])}, "
                f"{readable.ratio(size['float32_bytes'], size['bytes'])} smaller"
            )
        if bops["total"] < bops["float_total"]:
            fewer = readable.ratio(bops["float_total"], bops["total"])
            parts.append(f"{fewer} fewer bit operations than in 16-bit float")
    for name in ("kl", "fid2fp", "fid"):
        if name in found:
            parts.append(f"{titled(name, document['settings']['network'])} {_value(name, found)}")
    return element("p", join("; ".join(parts), "."), class_="lede") if parts else join()
