"""The page: head, style, sections in reading order, and the file.

The page loads nothing from elsewhere and runs no script; a content security policy makes the
browser enforce it. Light and dark follow the reader's system.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from varptq.evaluate.report import anatomy, sections
from varptq.evaluate.report.gallery import Pair
from varptq.evaluate.report.markup import Markup, element, join
from varptq.evaluate.report.sections import Document
from varptq.files import write_atomic

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(document: Document, pairs: Sequence[Pair] = ()) -> str:
    """The whole page. document: as `varptq evaluate` writes it to metrics.json; pairs: pictures
    from `gallery.choose_pairs`."""
    body = [
        sections.quality(document),
        sections.images(document, pairs),
        sections.scale_by_scale(document),
        sections.codebook(document),
        anatomy.bits_and_size(document),
        anatomy.bit_operations(document),
        anatomy.shift_and_sum(document),
        anatomy.provenance(document),
    ]
    title = f"{document['title']} - quality report"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        # Browsers do not decode entities in a style sheet, so it is not escaped.
        element("style", Markup(_style())),
    )
    against = document["compared_with"]
    count = document["settings"]["count"]
    method = (document.get("model") or {}).get("method")
    subtitle = f"{count} samples" + (f", compared with {against} in float" if against else "")
    if method:
        subtitle = f"Method {method}; {subtitle}"
    header = element(
        "header",
        element("h1", document["title"]),
        element("p", subtitle, class_="note"),
        sections.lede(document),
    )
    footer = element("footer", element("p", f"Made by varptq {document['versions']['varptq']}."))
    page = element("html", head, element("body", header, element("main", *body), footer), lang="en")
    return f"<!doctype html>\n{join(page)}\n"


def write_report(path: str | Path, document: Document, pairs: Sequence[Pair] = ()) -> None:
    """Write the page, whole or not at all. Raises `OutputError`."""
    # A path that is no UTF-8 is shown with escapes for its bytes.
    write_atomic(path, render(document, pairs).encode(errors="backslashreplace"))


def _style() -> str:
    return files("varptq.evaluate.report").joinpath("page.css").read_text(encoding="utf-8")
