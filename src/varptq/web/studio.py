"""State and helpers of all tabs, and how a mistake becomes a toast.

A page may send anything, so every event checks what it gets with these helpers.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from varptq.errors import InputError, VarptqError
from varptq.web import parts
from varptq.web.catalogue import Catalogue, Entry, Kind
from varptq.web.jobs import Jobs
from varptq.web.loaded import About, LoadedModels

# The page of Gradio 6.31 reads a title from a field that it never fills and shows "Error".
TITLE, TOAST_SECONDS = "That did not work", 12.0
MAX_SEED, MAX_TOP_K = 2**32 - 1, 4096
MODELS = (Kind.float, Kind.artifact)


@dataclass(frozen=True)
class Studio:
    """The state that all pages share. `out`: folder for artifacts and reports made here, which is
    one of the catalogue's folders."""

    catalogue: Catalogue
    models: LoadedModels
    jobs: Jobs
    out: Path

    def keys(self, *kinds: Kind) -> list[str]:
        return [entry.key for entry in self.catalogue.entries(*kinds)]

    def model(self, key: object, *kinds: Kind) -> Entry:
        return self.catalogue.find(key, *(kinds or MODELS))

    def about(self, key: object) -> About:
        """What is known of a model; one from files is loaded for it."""
        return self.models.about(self.model(key))


def checked_here(picker: gr.Dropdown) -> gr.Dropdown:
    """A picker whose value goes to `Catalogue.find` unchecked: the app knows the choices at its
    start, the catalogue the present ones."""

    def preprocess(payload: Any) -> Any:
        return payload

    picker.preprocess = preprocess
    return picker


def refilled(keys: list[str], value: str | None, otherwise: str) -> Any:
    """The update that fills a picker with `keys`. `value`, the page's choice when it asked, is not
    sent back if it still exists: the page may have another choice by now, which that would undo."""
    if value in keys:
        return gr.update(choices=keys)
    return gr.update(choices=keys, value=otherwise)


def says(key: str, known: About) -> str:
    """One line about what a model is asked for and the size of its images, shown below its
    picker."""
    height, width = known.size
    asked = "reads texts" if known.texts else f"{known.classes} classes"
    return parts.note(f"{key}: {asked}, {width} x {height} pixels.")


@contextmanager
def toasts() -> Iterator[None]:
    """Show a `VarptqError` as a toast of one line; a bug of ours keeps its traceback."""
    try:
        yield
    except VarptqError as error:
        line = html.escape(" ".join(str(error).split()), quote=False)
        raise gr.Error(line, duration=TOAST_SECONDS, title=TITLE, print_exception=False) from None


def whole(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int in low..high. Raises `InputError` otherwise, as a page may send
    anything."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise InputError(f"{name} {value!r}: expected a whole number")
    if not low <= value <= high:
        raise InputError(f"{name} {int(value)}: expected {low} to {high}")
    return int(value)
