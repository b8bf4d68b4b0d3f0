"""The sections of the page about the model itself: bits and bytes, bit operations, shift-and-sum,
and how all of it came about.

They are made from `document["model"]`, the description that `varptq info` prints; without it only
the provenance appears. What was measured is in sections.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from varptq import readable
from varptq.evaluate.report.charts import heat_map
from varptq.evaluate.report.markup import Markup, element
from varptq.evaluate.report.sections import Document, figure, note, section

ATTENTION = "attention"
SPECIAL = {"float parts": "biases, embeddings", "vae": "VQVAE"}


def table(head: Sequence[str], rows: Sequence[Sequence[object]], style: str) -> Markup:
    """Plain rows under names; a cell that is Markup brings its own <td>."""
    body = [
        element("tr", *(c if isinstance(c, Markup) else element("td", c) for c in cells))
        for cells in rows
    ]
    top = element("thead", element("tr", *(element("th", name, scope="col") for name in head)))
    return element("div", element("table", top, element("tbody", *body), class_=style), class_="x")


def number(value: object) -> Markup:
    return element("td", value, class_="number")


def bar(share: float, says: str, whole: float | None = None) -> Markup:
    """A cell with a bar of that share of its width, inside a pale one of the share `whole`."""
    widths = f"--share:{share:.2%};--whole:{whole or share:.2%}"
    return element("td", element("i", style=widths, title=says), class_="bar")


def bits_and_size(document: Document) -> Markup | None:
    model = document.get("model")
    if not model:
        return None
    kinds, bits = model["sizes"]["kinds"], model["bits"]
    largest = max(size["float32_bytes"] for size in kinds.values())
    total = sum(size["bytes"] for size in kinds.values())
    rows: list[list[object]] = []
    for kind, size in kinds.items():
        operands = bits.get(kind, {})
        stored, full = size["bytes"], size["float32_bytes"]
        says = f"{readable.megabytes(stored)} of {readable.megabytes(full)} in float32"
        rows.append(
            [
                element("th", SPECIAL.get(kind, kind), scope="row"),
                number(f"{8 * stored / size['elements']:.2f}" if size["elements"] else ""),
                number(readable.megabytes(stored)),
                bar(stored / largest, says, full / largest),
                element("td", operands.get("weight", "float"), class_="spec", data_of="weight"),
                element("td", operands.get("input", ""), class_="spec", data_of="input"),
            ]
        )
    head = ("Layers", "Bits each", "Stored", "of float32", "Weight", "Input")
    attention = bits.get(ATTENTION, {})
    products = "; ".join(f"{operand} {text}" for operand, text in attention.items())
    says = (
        f"{readable.megabytes(total)} in all. Bits each include scales and zero points. "
        f"In the attention products: {products}."
    )
    return section("size", "Bits and size", table(head, rows, "kinds"), note(says))


def bit_operations(document: Document) -> Markup | None:
    model = document.get("model")
    if not model:
        return None
    bops = model["bops"]
    parts = sorted(bops["by_kind"].items(), key=lambda item: -item[1])
    rows: list[list[object]] = [
        [
            element("th", kind, scope="row"),
            number(readable.count(value)),
            number(readable.percent(value / bops["total"])),
            bar(value / parts[0][1], readable.percent(value / bops["total"])),
        ]
        for kind, value in parts
    ]
    says = (
        f"{readable.count(bops['total'])} bit operations an image without guidance, "
        f"{readable.count(bops['float_total'])} with every operand in 16 bits "
        f"({readable.ratio(bops['float_total'], bops['total'])}). A product of b- and c-bit "
        "numbers counts b times c."
    )
    head = ("Product", "BOPs", "Share", "")
    return section("bops", "Bit operations", table(head, rows, "bops"), note(says))


class Keys(NamedTuple):
    """What an attention reads, in the words of its chart: a title, the name of the row of their
    numbers, and what they are."""

    title: str
    row: str
    called: str


CACHED = Keys("Tokens duplicated", "cached", "cached tokens")
OF_TEXT = Keys("Tokens of the text duplicated", "text", "tokens of the text")


def shift_and_sum(document: Document) -> Markup | None:
    """theta, and how many cached tokens and tokens of texts it duplicates in every block at every
    scale."""
    model = document.get("model") or {}
    theta = model.get("theta")
    if theta is None:
        return None
    if theta["value"] is None:
        return section("theta", "Shift-and-sum", note("Off: no value token is duplicated."))
    sides, lists = document["per_scale"]["sides"], (("copies", CACHED), ("text_copies", OF_TEXT))
    charts = [_heat(model[name], sides, keys) for name, keys in lists if model.get(name)]
    says = f"Keys with an attention mass above θ = {theta['value']:.4f} are duplicated"
    if "fraction" in theta:
        says += (
            f"; that adds {theta['fraction']:.2%} bit operations of a budget of "
            f"{theta['alpha']:.2%}"
        )
    parts = [note(f"{says}.")]
    if charts:
        style = "charts single" if len(charts) == 1 else "charts"
        parts.append(element("div", *charts, class_=style))
    return section("theta", "Shift-and-sum", *parts)


def _heat(copies: Sequence[Mapping[str, Any]], sides: Sequence[Any], keys: Keys) -> Markup:
    at = {(copy["block"], copy["scale"]): copy for copy in copies}
    blocks = sorted({block for block, _ in at})
    scales = sorted({scale for _, scale in at})
    grid = [[at[block, scale] for scale in scales] for block in blocks]
    counts = [cell["keys"] for cell in grid[0]]
    picture = heat_map(
        [*([cell["duplicated"] for cell in row] for row in grid), counts],
        [
            *([cell["duplicated"] / cell["keys"] for cell in row] for row in grid),
            [0.0] * len(counts),
        ],
        [f"block {blocks[0]}", *map(str, blocks[1:]), keys.row],
        [readable.side(sides[scale]) for scale in scales],
        [
            *([_cell(cell, keys) for cell in row] for row in grid),
            [f"{n} {keys.called}" for n in counts],
        ],
        "side of the token map",
    )
    says = f"Shade: share of the {keys.called} at that scale. Means over heads and images."
    return figure(keys.title, picture, says=says)


def _cell(copy: Mapping[str, Any], keys: Keys) -> str:
    return (
        f"block {copy['block']}: {copy['duplicated']:.1f} of {copy['keys']} {keys.called}, "
        f"{copy['mean_copies']:.2f} copies each on average"
    )


def provenance(document: Document) -> Markup:
    """Settings, versions and checksums: everything needed to reproduce the numbers."""
    settings, model = document["settings"], document.get("model") or {}
    machine = document["machine"]
    rows: list[tuple[str, object]] = [
        ("Model", document["title"]),
        ("Compared with", document["compared_with"] or "nothing"),
        ("Samples", f"{settings['count']}, seed {settings['seed']}"),
        ("Sampling", _listed(settings["sampling"])),
    ]
    if "method" in model:
        rows.append(("Quantization", f"method {model['method']}, seed {model['seed']}"))
    rows += [
        ("Distributions", f"compared on {settings['token_images']} images"),
        ("Features", settings["network"] or "none"),
        ("Machine", f"{machine['device']}, {machine['system']}, threads: {machine['threads']}"),
        ("Arithmetic", f"{machine['dtype']}, {machine['runtime']}"),
        ("Versions", _listed(document["versions"])),
    ]
    checksums = [(name, element("code", value)) for name, value in document["checksums"].items()]
    parts: list[object] = [_definitions(rows), element("h3", "SHA-256")]
    parts.append(_definitions(checksums, class_="long"))
    for name, title in (("config", "Bit-width policy"), ("calibration", "Calibration settings")):
        if model.get(name):
            text = json.dumps(model[name], indent=2, ensure_ascii=False)
            parts.append(element("details", element("summary", title), element("pre", text)))
    return section("provenance", "Settings and provenance", *parts)


def _listed(values: Mapping[str, object]) -> str:
    """ "cfg 4, top-k 100"; settings that are off are not listed."""
    shown = {name: value for name, value in values.items() if value is not False}
    return ", ".join(
        name.replace("_", "-") + ("" if value is True else f" {value}")
        for name, value in shown.items()
    )


def _definitions(rows: Sequence[tuple[str, object]], class_: str | None = None) -> Markup:
    pairs = ((element("dt", name), element("dd", value)) for name, value in rows)
    return element("dl", *(part for pair in pairs for part in pair), class_=class_)
