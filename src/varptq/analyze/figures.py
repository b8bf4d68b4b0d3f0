"""The pictures of an analysis, drawn from its document alone.

sensitivity.png   KL of every tensor quantized alone, by block and width
costs.png         the costliest tensors, sorted
scales.png        KL and error of p v per scale
attention.png     how attention spreads over the keys; text_attention.png, over those of texts
suggestion.png    KL against the budget, and the bits of every tensor
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from varptq.analyze.charts import Bar, Curves, HeatMap, Point, bars, log_share, number, stacked
from varptq.quant.bops import CROSS
from varptq.quant.quantizers import ATTENTION_OPERANDS, types_of

# What a price is called, and its unit.
PRICES = {
    "bops": ("bit operations", "bit operations, over those of {}"),
    "bytes": ("bytes of transformer", "MB of transformer"),
}
Document = dict[str, Any]

TOP_ROWS = 25
FEWER_LABELS_ABOVE = 12
# Values this far below the largest all get the lightest colour.
FAINTEST, TINY = 1e-5, 1e-12
# Size of cells in heat maps over blocks; in shallow models numbers fit in.
WIDE_CELL, NARROW_CELL = (40, 22), (16, 20)


def figures(document: Document) -> dict[str, Image.Image]:
    """File name -> picture."""
    of_texts = document.get("text_attention")
    return {
        "sensitivity.png": sensitivity(document),
        "costs.png": costs(document),
        "scales.png": per_scale(document),
        "attention.png": attention(document["attention"]),
        **({} if of_texts is None else {"text_attention.png": attention(of_texts, "text token")}),
        "suggestion.png": suggestion(document),
    }


def tensor_name(row: Document) -> str:
    """ "blocks.3.ffn.fc1 input", "blocks.3.attn probability (uniform)"."""
    return f"{row['layer']} {row['operand']}{rule(row)}"


def kind_name(row: Document) -> str:
    """The same for any block: "fc1 input", "probability (uniform)"."""
    return row["kind"] + rule(row)


def rule(row: Document) -> str:
    return f" ({row['type']})" if row["operand"] == "probability" else ""


def narrowest(document: Document) -> str:
    return str(min(document["settings"]["widths"]))


def sensitivity(document: Document) -> Image.Image:
    """One heat map per width, kinds of tensors by blocks, all on one logarithmic colour scale."""
    widths = [str(bits) for bits in document["settings"]["widths"]]
    rows = document["tensors"]
    values = [row["alone"][bits]["kl"] for row in rows for bits in widths]
    most = max(*values, TINY)
    least = max(min(values), most * FAINTEST)
    key = f"block; light {number(least)}, dark {number(most)}"
    kinds = [name for kind in document["kinds"] for name in with_rules(kind)]
    maps = [
        over_blocks(
            f"{bits} bits" if index else f"KL with one tensor at {bits} bits",
            kinds,
            {(kind_name(row), row["block"]): row["alone"][bits]["kl"] for row in rows},
            log_share(least, most),
            number,
            "block" if index else key,
            named=index == 0,
        )
        for index, bits in enumerate(widths)
    ]
    return stacked(maps, across=len(maps))


def with_rules(kind: str) -> list[str]:
    """Probabilities have a row for each of their types."""
    operand = kind.removeprefix(CROSS)
    return [f"{kind} ({n})" for n in types_of(operand)] if operand == "probability" else [kind]


def over_blocks(
    title: str,
    kinds: Sequence[str],
    values: dict[tuple[str, int | None], float],
    share: Callable[[float], float],
    text: Callable[[float], str],
    column_title: str = "block",
    *,
    named: bool = True,
) -> Image.Image:
    """Kinds of tensors by blocks; a tensor outside the blocks has one cell, at the bottom."""
    inner = [kind for kind in kinds if any(k == kind and b is not None for k, b in values)]
    outer = [kind for kind in kinds if kind not in inner and (kind, None) in values]
    depth = 1 + max((block for _, block in values if block is not None), default=0)
    cells = [[values.get((kind, block)) for block in range(depth)] for kind in inner]
    cells += [[values.get((kind, None))] for kind in outer]
    wide = depth <= FEWER_LABELS_ABOVE
    columns = [str(block) if wide or block % 5 == 0 else "" for block in range(depth)]
    cell = WIDE_CELL if wide else NARROW_CELL
    names = [*inner, *outer] if named else []
    return HeatMap(title, cells, names, columns, share, text, cell, column_title).draw()


def costs(document: Document) -> Image.Image:
    """The costliest tensors at the narrowest width, as bars."""
    bits = narrowest(document)
    rows = document["tensors"][:TOP_ROWS]
    groups = ["weights", "Linear inputs", "attention operands"]

    def series(row: Document) -> int:
        return 2 if row["operand"] in ATTENTION_OPERANDS else int(row["operand"] == "input")

    shown = [Bar(tensor_name(row), row["alone"][bits]["kl"], series(row)) for row in rows]
    title = f"KL to the float model with one tensor at {bits} bits, nats per token"
    return bars(title, shown, groups)


def per_scale(document: Document) -> Image.Image:
    """KL per scale, with groups of tensors put back to float; and errors of the product p v."""
    name = document["config"]["name"]
    kl = {name: document["base"]["kl_per_scale"]}
    for group, found in document["groups"].items():
        kl[f"{group} in float"] = found["kl_per_scale"]
    charts = [scale_curves("KL per scale", kl, "nats per token")]
    for key, keys in (("product_errors", ""), ("text_product_errors", " over texts")):
        if key not in document:
            continue
        errors = {
            f"{what} quantized": [sum(column) / len(column) for column in zip(*blocks, strict=True)]
            for what, blocks in document[key].items()
        }
        title = f"Error of p v{keys} per scale"
        charts.append(scale_curves(title, errors, "error energy / energy, mean of blocks"))
    return stacked(charts, across=2)


def scale_curves(
    title: str, values: dict[str, list[float]], y_title: str, *, log: bool = True
) -> Image.Image:
    series = {name: by_scale(found) for name, found in values.items()}
    count = max(len(found) for found in values.values())
    ticks = [(float(k), str(k)) for k in range(1, count + 1)]
    return Curves(title, series, ticks, "scale", y_title, log).draw()


def by_scale(values: list[float]) -> list[Point]:
    return [(float(k), value) for k, value in enumerate(values, 1)]


def attention(found: Document, key: str = "key") -> Image.Image:
    """Histograms of probabilities and of mass, mass by key scale where keys have scales, and
    concentration. key: what a key is called."""
    scales = [
        f"scale {k} ({count:.4g} {key}{'s' * (count != 1)})"
        for k, count in enumerate(found["keys"], 1)
    ]
    bins = len(found["histogram"][0])
    octaves = [f"-{j + 1}" if j % 2 else "" for j in range(bins)]
    tables = [
        HeatMap(title, found[key], scales, octaves, lambda v: v**0.5 / 0.6, percent, (27, 22), axis)
        for key, title, axis in (
            ("histogram", "Attention probabilities, % of entries", "log2 of p, lower end of a bin"),
            ("mass", "Where the attention mass lies, % of mass", "log2 of p, lower end of a bin"),
        )
    ]
    concentration = {
        "mass in the top key": found["top_key"],
        "mass in the top tenth of the keys": found["top_tenth"],
        "effective keys / keys": found["effective_share"],
    }
    below = [scale_curves("Concentration", concentration, "share", log=False)]
    if (by_key := found.get("by_key_scale")) is not None:
        below.insert(0, mass_by_key(by_key, scales))
    return stacked([*(table.draw() for table in tables), stacked(below, across=2)])


def mass_by_key(by_key: Sequence[Sequence[float]], scales: Sequence[str]) -> Image.Image:
    """Scales of the queries by scales of the keys, which are none later."""
    count = len(scales)
    cells = [[*row[: k + 1], *[None] * (count - k - 1)] for k, row in enumerate(by_key)]
    columns = [str(k) for k in range(1, count + 1)]
    title, axis = "Mass by key scale, %", "scale of the key"
    return HeatMap(title, cells, scales, columns, float, percent, (40, 22), axis).draw()


def percent(share: float) -> str:
    """Whole percents; "" if they round to 0."""
    return f"{share * 100:.0f}" if share >= 0.005 else ""


def suggestion(document: Document) -> Image.Image:
    """The steps of the greedy choice, and the final bits."""
    found = document["suggestion"]
    steps = [(1.0, found["kl"])]
    steps += [(pick["price"] / found["price"], pick["kl"]) for pick in found["picks"]]
    end = max(found["limit"] / found["price"], steps[-1][0], 1.001)
    unit = "size" if found["unit"] == "bytes" else "bit operations"
    ticks = [(1 + (end - 1) * n / 4, f"{1 + (end - 1) * n / 4:.3f}") for n in range(5)]
    name = document["config"]["name"]
    title = "KL while tensors are raised to 8 bits"
    axis = f"{unit} relative to {name}"
    curve = Curves(title, {f"{name}+mixed": steps}, ticks, axis, "nats per token", log=False).draw()
    return stacked([curve, bits_map(document)], across=2)


def bits_map(document: Document) -> Image.Image:
    """Bits of every tensor the budget goes to, after the last pick."""
    found = document["suggestion"]
    bits = {(row["kind"], row["block"]): row["bits"] for row in found["bits"]}
    title, kinds = "Bits of the suggested config", document["kinds"]
    return over_blocks(title, kinds, bits, lambda b: (b - 2) / 9, lambda b: f"{b:.0f}")


def frontier(document: Document) -> Image.Image:
    """KL over each price that has a budget: predicted, and calibrated where budgets were given."""
    charts = []
    for key in document["units"]:
        factor = 1.0 if key == "bops" else 1e-6
        series = {
            "predicted": envelope([(p[key] * factor, p["kl"]) for p in document["points"]]),
            "calibrated": sorted(
                (p[key] * factor, p["measured"]) for p in document["chosen"].values()
            ),
        }
        places = [x for points in series.values() for x, _ in points]
        low, high = min(places), max(places)
        ticks = [(x, f"{x:.2f}") for x in (low + (high - low) * n / 4 for n in range(5))]
        title, unit = PRICES[key]
        unit = unit.format(document["unit"])
        charts.append(Curves(f"KL over {title}", series, ticks, unit, "nats per token").draw())
    return stacked(charts, across=2)


def envelope(points: Sequence[Point]) -> list[Point]:
    """Those with the least y up to their x, by rising x."""
    found: list[Point] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found
