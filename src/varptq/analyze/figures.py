"""The pictures of an analysis, drawn from its document alone.

sensitivity.png   KL of every tensor quantized alone, by block and width
costs.png         the costliest tensors, sorted
scales.png        KL and error of p v per scale
attention.png     how attention spreads over the keys
suggestion.png    KL against the budget, and the bits of every tensor
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from varptq.analyze.charts import Bar, Curves, HeatMap, Point, bars, log_share, number, stacked
from varptq.quant.quantizers import ATTENTION_OPERANDS, types_of

Document = dict[str, Any]

TOP_ROWS = 25
FEWER_LABELS_ABOVE = 12
# Values this far below the largest all get the lightest colour.
FAINTEST, TINY = 1e-5, 1e-12
# Size of cells in heat maps over blocks; in shallow models numbers fit in.
WIDE_CELL, NARROW_CELL = (40, 22), (16, 20)


def figures(document: Document) -> dict[str, Image.Image]:
    """File name -> picture."""
    return {
        "sensitivity.png": sensitivity(document),
        "costs.png": costs(document),
        "scales.png": per_scale(document),
        "attention.png": attention(document),
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
    return [f"{kind} ({name})" for name in types_of(kind)] if kind == "probability" else [kind]


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
    errors = {
        f"{what} quantized": [sum(column) / len(column) for column in zip(*blocks, strict=True)]
        for what, blocks in document["product_errors"].items()
    }
    charts = [
        scale_curves("KL per scale", kl, "nats per token"),
        scale_curves("Error of p v per scale", errors, "error energy / energy, mean of blocks"),
    ]
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


def attention(document: Document) -> Image.Image:
    """Histograms of probabilities and of mass, mass by key scale, and concentration."""
    found = document["attention"]
    scales = [
        f"scale {k} ({keys} key{'s' * (keys > 1)})" for k, keys in enumerate(found["keys"], 1)
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
    count = len(scales)
    by_key = [
        row[: k + 1] + [None] * (count - k - 1) for k, row in enumerate(found["by_key_scale"])
    ]
    columns = [str(k) for k in range(1, count + 1)]
    keys = HeatMap(
        "Mass by key scale, %",
        by_key,
        scales,
        columns,
        float,
        percent,
        (40, 22),
        "scale of the key",
    ).draw()
    concentration = {
        "mass in the top key": found["top_key"],
        "mass in the top tenth of the keys": found["top_tenth"],
        "effective keys / keys": found["effective_share"],
    }
    curves = scale_curves("Concentration", concentration, "share", log=False)
    return stacked([*(table.draw() for table in tables), stacked([keys, curves], across=2)])


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
