"""Names of classes: one entry a class, its name and then its synonyms, separated by commas.

Those of ImageNet are the words of its WordNet synsets (Russakovsky et al., "ImageNet Large Scale
Visual Recognition Challenge", 2015), in the order of the ids; three that two classes share as their
first are told apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from varptq.errors import InputError
from varptq.models.text_files import lines_of, read_text

IMAGENET = "imagenet"
IMAGENET_FILE = Path(__file__).parents[1] / "assets" / "imagenet_classes.txt"
# A line of a file that is no list of names should not become one.
MAX_CHARACTERS = 500
SHOWN = 5
# The name of the class that stands for none.
UNCONDITIONAL = "unconditional"


@cache
def imagenet_classes() -> tuple[str, ...]:
    return read_class_names(IMAGENET_FILE)


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Entries of a UTF-8 file, one a line, in the order of the ids; "imagenet" stands for those of
    ImageNet.

    Raises `InputError` for a file that cannot be read, and naming the line that is empty, longer
    than 500 characters, a number, "unconditional", or has the name of another line.
    """
    if str(path) == IMAGENET:
        return imagenet_classes()
    lines = lines_of(read_text(path, "class names"))
    if not lines:
        raise InputError(f"{path}: empty, expected a class name a line")
    return checked_names(lines, f"{path}: line")


def checked_names(entries: Iterable[str], where: str) -> tuple[str, ...]:
    """The entries, if they can be told apart. `where` is what messages call an entry, before its
    number. Raises as `read_class_names`."""
    checked, seen = tuple(entry.strip() for entry in entries), dict[str, int]()
    for number, entry in enumerate(checked, 1):
        title = title_of(entry)
        if not title or len(entry) > MAX_CHARACTERS:
            wrong = f"{len(entry)} characters" if title else "no name"
            raise InputError(
                f"{where} {number} has {wrong}, expected a name of at most {MAX_CHARACTERS} "
                "characters, and synonyms after commas"
            )
        if title.removeprefix("-").isdecimal() or title == UNCONDITIONAL:
            raise InputError(f"{where} {number} is {title!r}, which means something else already")
        if title in seen:
            raise InputError(f"{where} {number} is {title!r}, and so is {seen[title]}")
        seen[title] = number
    return checked


def title_of(entry: str) -> str:
    """The name of an entry, without its synonyms."""
    return entry.partition(",")[0].strip()


def words_of(entry: str) -> list[str]:
    """The name and its synonyms."""
    return [word.strip() for word in entry.split(",") if word.strip()]


def place_of(name: str, entries: Sequence[str]) -> int:
    """The class that `name` means: its name, else its name or a synonym in any case, else the
    beginning of one. Raises `InputError` for none and for several, naming them."""
    titles = [title_of(entry) for entry in entries]
    if name in titles:
        return titles.index(name)
    asked = name.lower()
    lowered = [[word.lower() for word in words_of(entry)] for entry in entries]
    for fits in (_is_title, _is_word, _begins_word):
        found = [place for place, words in enumerate(lowered) if fits(asked, words)]
        if len(found) == 1:
            return found[0]
        if found:
            several = ", ".join(f"{titles[place]!r} ({place})" for place in found[:SHOWN])
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise InputError(f"class {name!r}: could be {several}{more}; give one of them")
    near = ", ".join(_near(asked, titles, lowered))
    raise InputError(f"class {name!r}: unknown; did you mean {near}?")


def _is_title(asked: str, words: Sequence[str]) -> bool:
    return asked == words[0]


def _is_word(asked: str, words: Sequence[str]) -> bool:
    return asked in words


def _begins_word(asked: str, words: Sequence[str]) -> bool:
    return bool(asked) and any(word.startswith(asked) for word in words)


def _near(asked: str, titles: Sequence[str], lowered: Iterable[Sequence[str]]) -> list[str]:
    """Names with a word like `asked`, the first names where none is."""
    places = {word: place for place, words in enumerate(lowered) for word in words}
    found = Counter(titles[places[match]] for match in get_close_matches(asked, places))
    return list(found) or list(titles[:SHOWN])
