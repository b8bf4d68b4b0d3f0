"""Published models by name: what they are and where their files lie.

`resolve` turns a name into two files: the demo models come with the package, the others from the
Hugging Face cache and, only when asked to, over the network into that cache. No tensor is read
here; `checkpoint.py` does that and checks what it finds.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from varptq.errors import CheckpointError, InputError
from varptq.models.families import FAMILIES
from varptq.models.family import ModelPreset
from varptq.models.shards import INDEX_SUFFIX, files_of
from varptq.models.state_file import file_sha256
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
    # Slow to import, and only these presets need it.
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(chosen.repo, file, cache_dir=cache_dir)
    if isinstance(cached, str):
        return Path(cached)
    if not download:
        raise CheckpointError(
            f"{chosen.name}: {file} of {chosen.repo} is not in the Hugging Face cache, "
            "run again with download=True (--download)"
        )
    path = _download(chosen.repo, file, cache_dir)
    _verify(path, chosen.repo, file)
    return path


def _download(repo: str, file: str, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{file} of {repo} cannot be downloaded: HF_HUB_OFFLINE is set, unset it"
        )
    try:
        return Path(hf_hub_download(repo, file, cache_dir=cache_dir))
    except Exception as error:
        # The library's errors come from several HTTP clients and differ between its versions.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file} of {repo} cannot be downloaded ({reason}): check the network, or give files"
        ) from None


def _verify(path: Path, repo: str, file: str) -> None:
    """Compare a fresh download with the hub's SHA-256; a file that differs leaves the cache."""
    expected = _hub_sha256(path, repo, file)
    if expected is None or file_sha256(path) == expected:
        return
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    raise CheckpointError(
        f"{file} of {repo} arrived damaged (SHA-256 is not {expected}) and was removed: run again"
    )


def _hub_sha256(path: Path, repo: str, file: str) -> str | None:
    """SHA-256 in the hub's large-file metadata, None where it is not known."""
    if path.is_symlink():
        # The cache names a blob by its etag; one step only, a blob may itself be a link elsewhere.
        etag = Path(os.readlink(path)).name
    else:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        try:
            etag = get_hf_file_metadata(hf_hub_url(repo, file)).etag or ""
        except Exception:
            # As in `_download`; the file is here, and strict loading still checks what it holds.
            return None
    return etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None
