"""`varptq` with one more published model, "tiny-text", that reads texts and draws at several sizes.

A program of its own, as the studio is one. Its files lie where `FOLDER` says."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from helpers.infinity_states import PRESET, Words, pipeline
from varptq.cli.main import app
from varptq.models.family import ModelPreset
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS

FOLDER = "TINY_TEXT"
NAME, SIZE, MAPS = "tiny-text", "0.06M", 7
# More words than any prompt of the package has.
MAXLEN = 60


def model() -> Pipeline:
    return pipeline(MAPS, text_maxlen=MAXLEN)


def preset(folder: Path) -> ModelPreset:
    files = [str(folder / f"{part}.safetensors") for part in ("var", "vae")]
    return replace(
        PRESET,
        name=NAME,
        transformer_arch=model().var.arch,
        transformer_file=files[0],
        autoencoder_file=files[1],
        size=SIZE,
        encoder=lambda _: Words(),
    )


if __name__ == "__main__":
    PRESETS[NAME] = preset(Path(os.environ[FOLDER]))
    app()
