"""Where an artifact is: a folder on this machine, or a repository of the hub (varptq/hub.py).

Of a repository only config.json and model.safetensors are fetched, both of one commit. The first is
read, and what it says of the second is compared with what the hub says of it, before that is
fetched.
"""

from __future__ import annotations

from pathlib import Path

from varptq import hub
from varptq.artifact.format import CONFIG_FILE, WEIGHTS_FILE
from varptq.artifact.load import read_config
from varptq.artifact.schema import FileEntry
from varptq.errors import ArtifactError, HubError
from varptq.hub import NoFileError, Remote, Repo


def place_of(source: str | Path) -> Path | Repo:
    """A folder, or a repository for a string such as "org/name" that names nothing on this machine.
    Nothing is looked at but whether there is such a file or folder."""
    repo = Repo.parse(source) if isinstance(source, str) else None
    return Path(source) if repo is None or Path(source).exists() else repo


def artifact_folder(source: str | Path) -> Path:
    """The folder of an artifact, which for a repository is in the hub's cache.

    Raises `HubError`, `OutputError` as `hub.fetch`, and `ArtifactError` for a repository that holds
    no artifact, or a broken one; a folder is not looked into.
    """
    place = place_of(source)
    return place if isinstance(place, Path) else _fetched(place)


def _fetched(repo: Repo) -> Path:
    try:
        config = _config(repo)
        commit = Repo(repo.name, hub.commit_of(config, CONFIG_FILE))
        entry = _entry(repo, config)
        return hub.fetch(commit, WEIGHTS_FILE, check=lambda it: _check(repo, it, entry)).parent
    except NoFileError as error:
        raise ArtifactError(f"{error}; not an artifact of varptq, or not a whole one") from None


def _config(repo: Repo) -> Path:
    try:
        return hub.fetch(repo, CONFIG_FILE)
    except NoFileError:
        raise
    except HubError as error:
        # It may have been meant as a path.
        raise HubError(f"{error} (and no folder here has that name)") from None


def _entry(repo: Repo, config: Path) -> FileEntry:
    try:
        return read_config(config.parent)[0].files[WEIGHTS_FILE]
    except ArtifactError as error:
        told = str(error).replace(str(config), CONFIG_FILE)
        raise ArtifactError(f"{repo}: {told}") from None


def _check(repo: Repo, remote: Remote, entry: FileEntry) -> None:
    if remote.size not in (None, entry.bytes):
        found = f"has {remote.size} bytes, {CONFIG_FILE} says {entry.bytes}"
    elif remote.sha256 not in (None, entry.sha256):
        found = f"is not the file of {CONFIG_FILE}, by its SHA-256"
    else:
        return
    raise ArtifactError(
        f"{repo}: {WEIGHTS_FILE} {found}; it was broken when it was pushed: take another revision, "
        "or ask its owner"
    )
