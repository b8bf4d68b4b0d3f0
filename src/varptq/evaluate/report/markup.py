"""HTML and SVG elements as strings that are safe to join: text is escaped unless it is `Markup`.

Names of models and classes come from files that others wrote, so nothing is inserted unescaped. The
elements of a page are in the other files.
"""

from __future__ import annotations

import html

# Elements that have no content in HTML, and the shapes of SVG.
EMPTY = {"meta", "img", "path", "line", "rect", "circle"}


class Markup(str):
    """Text that already is HTML."""

    __slots__ = ()


def text(value: object) -> Markup:
    """`value` as HTML, escaped unless it is `Markup`."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(*parts: object) -> Markup:
    """All parts in order; None is left out."""
    return Markup("".join(text(part) for part in parts if part is not None))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """<name ...>children</name>.

    Attributes: `class_` for class, "_" becomes "-" ("stroke_width"), and None leaves one out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in EMPTY and not children:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def _number(value: object) -> str:
    """Coordinates to a hundredth of a pixel, which is precise enough."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
