"""Published models by name: what they are and where their files lie.

`resolve` turns a name into two files: the demo models come with the package, the others from the
Hugging Face cache and, only when asked to, over the network into that cache. No tensor is read
here; `checkpoint.py` does that and checks what it finds.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from varptq import hub
from varptq.errors import CheckpointError, HubError, InputError
from varptq.hub import Repo
from varptq.models.families import FAMILIES
from varptq.models.family import ModelPreset
from varptq.models.shards import INDEX_SUFFIX, files_of
from varptq.models.texts import TextEncoder

ASSETS = Path(__file__).resolve().parents[1] / "assets"

PRESETS: dict[str, ModelPreset] = {
    entry.name: entry for family in FAMILIES.values() for entry in family.presets
}


def preset(name: str) -> ModelPreset:
    """The preset of that name. Raises `InputError` listing the known names and the nearest."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown model {name!r}: expected one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]


def encoder_of(name: str, download: bool = False) -> TextEncoder | None:
    """The text encoder of the model of that name, where there is such a model and it has one;
    nothing is read of it yet."""
    chosen = PRESETS.get(name)
    return chosen.encoder(download) if chosen is not None and chosen.encoder else None


def resolve(
    name: str, download: bool = False, cache_dir: str | Path | None = None
) -> tuple[Path, Path]:
    """Files (transformer, autoencoder) of a preset.

    Files of a repository are looked up in the Hugging Face cache (`cache_dir`, else the one
    of `HF_HOME`); a missing one is fetched into it if `download`, and its SHA-256 is compared with
    the hub's. Raises `InputError` for an unknown name, `CheckpointError` if a file cannot be had.
    """
    chosen = preset(name)
    return (
        _locate_all(chosen, chosen.transformer_file, download, cache_dir),
        _locate_all(chosen, chosen.autoencoder_file, download, cache_dir),
    )


def _locate_all(
    chosen: ModelPreset, file: str, download: bool, cache_dir: str | Path | None
) -> Path:
    """A file, or an index with its shards beside it."""
    path = _locate(chosen, file, download, cache_dir)
    if file.endswith(INDEX_SUFFIX):
        folder = file.rpartition("/")[0]
        for shard in files_of(path)[1:]:
            _locate(chosen, f"{folder}/{shard.name}".lstrip("/"), download, cache_dir)
    return path


def _locate(chosen: ModelPreset, file: str, download: bool, cache_dir: str | Path | None) -> Path:
    if chosen.repo is None:
        return ASSETS / file
    repo = Repo(chosen.repo)
    if (found := hub.cached(repo, file, cache_dir)) is not None:
        return found
    if not download:
        raise CheckpointError(
            f"{chosen.name}: {file} of {chosen.repo} is not in the Hugging Face cache, "
            "run again with download=True (--download)"
        )
    try:
        return hub.fetch(repo, file, cache_dir)
    except HubError as error:
        raise CheckpointError(f"{error}, or give files") from None
