"""HTML and SVG elements as strings that are safe to join: text is escaped unless it is `Markup`.

Names of models and classes come from files other people wrote, so nothing is pasted in raw. Which
elements a page has is in the other files.
"""

from __future__ import annotations

import html

# Elements that have no content in HTML, and the shapes of SVG.
EMPTY = {"meta", "img", "path", "line", "rect", "circle"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """`value` as it will stand on the page."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(*parts: object) -> Markup:
    """Parts one behind the other; None is left out."""
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
    """Coordinates to a hundredth of a pixel: more digits only make the file longer."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
