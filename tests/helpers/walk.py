"""The links of docs/walk.md: each names a symbol and leads to the line that defines it.

    python tests/helpers/walk.py     # rewrites paths and line numbers after files have changed

A link is [`symbol`](../path#Lnumber). In Python a symbol is a function or a class, dotted for a
method; in C++ a function, or else a word, at the first line of code that has it. A file that is
gone is looked for under its old name, then among all files of its language that have the symbol.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "walk.md"
LINK = re.compile(r"\[`(?P<symbol>[\w.]+)`\]\(\.\./(?P<path>[^)#]+)#L(?P<line>\d+)\)")


def line_of(path: Path, symbol: str) -> int | None:
    """Line of the definition of `symbol`, None where the file has none."""
    text = path.read_text()
    if path.suffix == ".py":
        return _in_body(ast.parse(text).body, symbol.split("."))
    lines = [line.partition("//")[0].rstrip() for line in text.splitlines()]
    name = re.escape(symbol)
    defined = re.compile(rf"^\w.*\b{name}\(.*[^;]$")
    for pattern in (defined, re.compile(rf"\b{name}\b")):
        if found := [number for number, line in enumerate(lines, 1) if pattern.search(line)]:
            return found[0]
    return None


def _in_body(body: list[ast.stmt], names: list[str]) -> int | None:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == names[0]:
            return _in_body(node.body, names[1:]) if names[1:] else node.lineno
    return None


def place(path: str, symbol: str) -> tuple[str, int]:
    """File, below the root, and line of a symbol that `path` had. Raises `LookupError` where no
    file has it, or several do."""
    old = ROOT / path
    if old.is_file() and (line := line_of(old, symbol)) is not None:
        return path, line
    suffixes = {".py"} if old.suffix == ".py" else {".cpp", ".h"}
    files = sorted(file for file in (ROOT / "src").rglob("*") if file.suffix in suffixes)
    for candidates in ([file for file in files if file.name == old.name], files):
        found = [(file, line) for file in candidates if (line := line_of(file, symbol))]
        if len(found) == 1:
            return found[0][0].relative_to(ROOT).as_posix(), found[0][1]
    raise LookupError(f"{PAGE.name}: {path} does not define {symbol}, nor does one other file")


def mended(text: str) -> str:
    """`text` with the path and line of every link as they are now."""

    def now(link: re.Match[str]) -> str:
        path, line = place(link["path"], link["symbol"])
        return f"[`{link['symbol']}`](../{path}#L{line})"

    return LINK.sub(now, text)


if __name__ == "__main__":
    PAGE.write_text(mended(PAGE.read_text()))
