"""Files that pages send and receive: opened with limits, and offered from the app's own cache.

A page can name only files that it uploaded or was shown; the app checks that before it calls a
function. Offered files have unguessable names and are deleted after a day.
"""

from __future__ import annotations

import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component
from gradio.components.image_editor import EditorData, EditorValue
from PIL import Image

from varptq import readable
from varptq.editing import read_image
from varptq.errors import InputError, OutputError, VarptqError
from varptq.models.prompt_files import read_prompts
from varptq.models.texts import TextPrompts
from varptq.pictures import slug
from varptq.web.limits import MAX_BYTES, MAX_PIXELS
from varptq.web.studio import toasts
from varptq.web.surroundings import CACHE


def picture(path: str | None) -> Image.Image:
    """The uploaded picture, upright, RGB or RGBA. Raises `InputError` without naming the path."""
    if not path:
        raise InputError("image: none given; upload a JPEG, PNG or WebP")
    file = Path(path)
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise InputError(
            f"image {file.name}: {readable.megabytes(size)}, expected at most "
            f"{readable.megabytes(MAX_BYTES)}"
        )
    return read_image(file.read_bytes(), what=f"image {file.name}", max_pixels=MAX_PIXELS)


def prompts(path: str | None, typed: object) -> list[str] | TextPrompts | None:
    """What a page wants images drawn for: the prompts of an uploaded file, or of a text with one a
    line; None for neither. Raises `InputError` without naming the path, and for both."""
    lines = [line.strip() for line in str(typed or "").splitlines() if line.strip()]
    if not path:
        return lines or None
    file = Path(path)
    if lines:
        raise InputError(f"prompts: both typed and in {file.name}; remove one of them")
    try:
        return read_prompts(file)
    except VarptqError as error:
        raise InputError(str(error).replace(str(file), file.name)) from None


def only_layers(editor: gr.ImageEditor) -> gr.ImageEditor:
    """Make a canvas return {"background": None, "layers": the painted ones, RGBA, "composite":
    None}, read with the limits above; by itself it would decode whatever a page sends.

    Not a subclass, because the app writes a stub beside the file of every subclass.
    """

    def preprocess(payload: EditorData | None) -> EditorValue | None:
        with toasts():
            layers: list[Any] = [picture(file.path) for file in payload.layers] if payload else []
        return EditorValue(background=None, layers=layers, composite=None)

    editor.preprocess = preprocess
    return editor


def only_cached(block: Block) -> None:
    """Let pages name only files in the app's cache, which were uploaded or shown.

    By itself the app would fetch any address, and would check paths only if started by its own
    `launch`.
    """
    move = block.async_move_resource_to_block_cache

    async def move_cached(url_or_file_path: str | Path | None) -> str | None:
        if url_or_file_path is not None:
            real = Path(os.path.realpath(url_or_file_path))
            with toasts():
                if not real.is_relative_to(os.path.realpath(block.GRADIO_CACHE)):
                    raise InputError("file: not uploaded on this page")
        return await move(url_or_file_path)

    block.async_move_resource_to_block_cache = move_cached


def painted(editor: EditorValue | None, size: tuple[int, int]) -> Image.Image | None:
    """What was painted on any layer as "L" of `size`, 255 there; None if nothing was."""
    mask = Image.new("L", size)
    for layer in editor["layers"] if editor else []:
        assert isinstance(layer, Image.Image)
        strokes = layer.convert("RGBA").getchannel("A").resize(size, Image.Resampling.NEAREST)
        mask.paste(255, mask=strokes.point([255 * (alpha > 0) for alpha in range(256)]))
    return mask if mask.getbbox() else None


def offer(component: Component, path: Path) -> str:
    """A copy of a file, or a zip of a folder, for a page to download. Raises `OutputError`."""
    if path.is_file():
        with _placed(component, path.name) as copy:
            copy.write_bytes(path.read_bytes())
        return str(copy)
    # Stored, as packed codes do not compress.
    with (
        _placed(component, f"{path.name}.zip") as archive,
        zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out,
    ):
        for file in sorted(path.iterdir()):
            if file.is_file():
                out.write(file, f"{path.name}/{file.name}")
    return str(archive)


def stem(word: str, seed: int) -> str:
    """First part of the file names of images from a seed; a number and ".png" follow."""
    return f"{slug(word)}-seed{seed}"


def offer_picture(component: Component, image: Image.Image, name: str) -> str:
    """A PNG file of that name for a page to show and download. Raises `OutputError`."""
    with _placed(component, name) as path:
        image.save(path, format="PNG", compress_level=3)
    return str(path)


@contextmanager
def _placed(component: Component, name: str) -> Iterator[Path]:
    """Where to write a file for pages; it is deleted if it cannot be written whole."""
    folder = Path(component.GRADIO_CACHE) / secrets.token_hex(16)
    path = folder / name
    try:
        folder.mkdir(parents=True)
        yield path
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OutputError(
            f"{name}: cannot be stored for the page ({error.strerror}); free some space or set "
            f"{CACHE} to another folder"
        ) from None
    component.temp_files.add(str(path))  # what the app removes after a day
