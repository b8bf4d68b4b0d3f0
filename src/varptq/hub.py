"""Files of the Hugging Face hub: into its cache, out of it, and one line for every failure.

huggingface_hub speaks to the hub and keeps the cache; `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE` and
`HF_ENDPOINT` are its own. Here is what it leaves to its callers: a file that was cut off goes on
where it stopped, in another process too, and its SHA-256 is checked; a disk is asked for room
before a file is fetched; each failure is one `HubError`. It is imported where it is needed, since
that takes a moment.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from varptq.errors import HubError, OutputError, VarptqError, is_out_of_memory
from varptq.files import fsync, is_disk_full
from varptq.readable import megabytes

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

REVISION_MARK = "@"
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
# What comes before the mark: one owner and one name. "." and ".." begin paths.
NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
TOKEN = "set HF_TOKEN, or run hf auth login"
ROOM = "free some space, or set HF_HOME to a folder on another disk"
LATER = "check the network, or try again later"
# What the library speaks HTTP with, in one version or another.
CLIENTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
HTTP_REMEDIES = {
    401: f"its token was refused: {TOKEN}",
    403: f"your token does not allow it; take one that does: {TOKEN}",
    429: "too many requests: try again later",
}


class Repo(NamedTuple):
    """A repository, and the branch, tag or commit that is meant; None is its main branch."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """ "org/name" or "org/name@revision"; None for a text that names no repository."""
        name, mark, revision = text.partition(REVISION_MARK)
        if not NAME.fullmatch(name) or (mark and not revision):
            return None
        return cls(name, revision or None)

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}{REVISION_MARK}{self.revision}"


class Remote(NamedTuple):
    """A file as the hub describes it before it is fetched; None is what it does not say. sha256:
    of a large file only."""

    size: int | None
    sha256: str | None


class NoFileError(HubError):
    """The repository is there, and the file is not in it."""


Check = Callable[[Remote], None]


def cached(repo: Repo, file: str, cache_dir: str | Path | None = None) -> Path | None:
    """The file if it is in the cache; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        repo.name, file, cache_dir=cache_dir, revision=repo.revision or "main"
    )
    return Path(found) if isinstance(found, str) else None


def fetch(
    repo: Repo,
    file: str,
    cache_dir: str | Path | None = None,
    *,
    check: Check = lambda remote: None,
) -> Path:
    """The file in the cache, fetched if it is not there, or if a branch has moved on since.

    Where the hub cannot be reached the cache is taken, with a warning; under HF_HUB_OFFLINE it is
    all there is. check: called before anything large is fetched; what it raises passes through.
    Raises `HubError` for a repository, revision or file that cannot be had, and `OutputError` where
    the disk of the cache is full.
    """
    with _one_line(repo, file):
        kept = cached(repo, file, cache_dir)
        if kept is not None and repo.revision and COMMIT.fullmatch(repo.revision):
            return kept
        remote = _described(repo, file, kept)
        if kept is not None and (remote is None or commit_of(kept, file) == remote.commit_hash):
            return kept
        assert remote is not None
        large = SHA256.fullmatch(remote.etag or "")
        check(Remote(remote.size, large and large.group()))
        blob = _blob(repo, remote, cache_dir)
        if large and not blob.exists():
            _download(repo, file, remote, blob)
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo.name, file, revision=repo.revision, cache_dir=cache_dir))


def commit_of(path: Path, file: str) -> str:
    """The commit that a fetched `file` belongs to: the cache keeps snapshots/<commit>/<file>."""
    return path.parents[file.count("/")].name


class Snapshot(NamedTuple):
    """What a folder of the cache is: of which repository, whose contents lie below `storage`."""

    name: str
    storage: Path


def snapshot_at(folder: Path) -> Snapshot | None:
    """The commit that a folder of the cache, models--<org>--<name>/snapshots/<commit>, has; None
    for any other folder."""
    if folder.parent.name != "snapshots" or not COMMIT.fullmatch(folder.name):
        return None
    kind, _, name = folder.parents[1].name.partition("--")
    return Snapshot(name.replace("--", "/"), folder.parents[1]) if kind == "models" else None


def remedy(path: Path) -> str | None:
    """What to do about a damaged file that lies in the cache; None for one that does not."""
    if snapshot_at(path.parent) is None:
        return None
    return f"damaged in the hub's cache, delete {os.path.realpath(path)} and run again"


def send(
    repo: Repo, files: Mapping[str, Path | bytes], *, message: str, private: bool = False
) -> str:
    """Make the repository, and the branch that `repo` names, unless they are there, and add the
    files in one commit, by their names in it: all of them appear, or none. Files that the hub has
    already are not sent again. Returns the address of the commit.

    Raises `HubError`; for `private` also where the repository exists and is public.
    """
    with _one_line(repo, None):
        from huggingface_hub import CommitOperationAdd, HfApi, get_token

        if get_token() is None:
            raise HubError(f"{repo}: nothing is sent without a token; {TOKEN}")
        api = HfApi()
        api.create_repo(repo.name, private=private or None, exist_ok=True)
        if private and not api.model_info(repo.name).private:
            raise HubError(
                f"{repo}: exists and is public, and --private was asked for; make it private in "
                "its settings, or choose another name"
            )
        if repo.revision is not None:
            api.create_branch(repo.name, branch=repo.revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        done = api.create_commit(
            repo.name, operations, commit_message=message, revision=repo.revision
        )
        return done.commit_url


def _described(repo: Repo, file: str, kept: Path | None) -> HfFileMetadata | None:
    """What the hub says of the file; None if it cannot be reached and the cache has one."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return get_hf_file_metadata(hf_hub_url(repo.name, file, revision=repo.revision))
    except OfflineModeIsEnabled:
        if kept is None:
            raise
    except Exception as error:
        # Errors of the connection come from several HTTP clients.
        answered = isinstance(error, HfHubHTTPError) and _status(error) < 500
        if kept is None or answered or isinstance(error, ValueError):
            raise
        warnings.warn(
            f"{repo}: the hub cannot be reached ({_reason(error)}); {file} is that of the "
            f"cache, of commit {commit_of(kept, file)[:8]}",
            stacklevel=3,
        )
    return None


def _blob(repo: Repo, remote: HfFileMetadata, cache_dir: str | Path | None) -> Path:
    """Where the cache keeps the content of a file: under its etag."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo.name, repo_type="model")
    return Path(cache_dir or constants.HF_HUB_CACHE, folder, "blobs", remote.etag or "")


def _download(repo: Repo, file: str, remote: HfFileMetadata, blob: Path) -> None:
    """Fetch a large file into the cache, going on after what an earlier process has fetched.

    hf_hub_download starts again from the first byte. The lock is the one it takes, so that both
    may be used at the same time.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import WeakFileLock

    lock = blob.parents[2] / ".locks" / blob.parents[1].name / f"{blob.name}.lock"
    partial = blob.with_name(f"{blob.name}.incomplete")
    for place in (lock, blob):
        place.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        if _bytes(partial) > (remote.size or sys.maxsize):
            partial.unlink()
        if remote.size is not None:
            _check_room(blob, remote.size - _bytes(partial))
        with _space_given_back(partial):
            # The address of the commit: a branch may move on meanwhile.
            _go_on(hf_hub_url(repo.name, file, revision=remote.commit_hash), remote, partial, file)
        if _sha256(partial) != blob.name:
            partial.unlink()
            raise HubError(
                f"{repo}: {file} arrived damaged (SHA-256 is not {blob.name}) and was removed; run "
                "again"
            )
        os.replace(partial, blob)


def _go_on(url: str, remote: HfFileMetadata, partial: Path, file: str) -> None:
    """Fetch what is missing of a file, for as long as something comes."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    while True:
        done = _bytes(partial)
        try:
            with open(partial, "ab") as sink:
                http_get(
                    url,
                    sink,
                    resume_size=done,
                    headers=build_hf_headers(),
                    expected_size=remote.size,
                    displayed_filename=file,
                )
                sink.flush()
                fsync(sink.fileno())
            return
        except Exception as error:
            # Some versions of the library try again by themselves, and some do not.
            came = _bytes(partial)
            if is_disk_full(error) or not done < came < (remote.size or sys.maxsize):
                raise


def _bytes(partial: Path) -> int:
    return partial.stat().st_size if partial.exists() else 0


def _check_room(blob: Path, needed: int) -> None:
    free = shutil.disk_usage(blob.parent).free
    if needed > free:
        raise OutputError(
            f"{blob.parents[2]}: {megabytes(needed)} are to be fetched and {megabytes(free)} are "
            f"free; {ROOM}"
        )


@contextmanager
def _space_given_back(partial: Path) -> Iterator[None]:
    """What fills a disk is removed again."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            partial.unlink(missing_ok=True)
        raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _one_line(repo: Repo, file: str | None) -> Iterator[None]:
    """Turn what the library raises into one `HubError`."""
    try:
        with _quiet():
            yield
    except Exception as error:
        if isinstance(error, VarptqError) or is_out_of_memory(error):
            raise
        if is_disk_full(error):
            raise OutputError(
                f"the hub's cache: cannot be written ({_reason(error)}); {ROOM}"
            ) from None
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of this machine; those of the hub have no number
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # of one upload among several
        kind = NoFileError if _is_no_file(error) else HubError
        raise kind(_told(error, repo, file)) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings, which would stand before our line, and without its bars where
    nobody sees them."""
    from huggingface_hub import constants
    from huggingface_hub import utils as its

    level = its.logging.get_verbosity()
    bars = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not its.are_progress_bars_disabled()
    hidden = bars and not (sys.stderr is not None and sys.stderr.isatty())
    its.logging.set_verbosity_error()
    if hidden:
        its.disable_progress_bars()
    try:
        yield
    finally:
        its.logging.set_verbosity(level)
        if hidden:
            its.enable_progress_bars()


def _is_no_file(error: Exception) -> bool:
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def _told(error: Exception, repo: Repo, file: str | None) -> str:
    """The line for an error of the library or of the HTTP client below it."""
    from huggingface_hub import constants, get_token
    from huggingface_hub import utils as its

    what = f"{repo}: " if file is None else f"{repo}: {file}: "
    if constants.HF_HUB_OFFLINE:
        return f"{what}not in the cache, and HF_HUB_OFFLINE is set; unset it to fetch the file"
    if isinstance(error, its.GatedRepoError):
        return f"{repo}: gated; ask for access on its page, then {TOKEN}"
    if isinstance(error, its.RepositoryNotFoundError):
        # The hub gives one answer for both, so that names of private ones do not leak.
        if get_token() is None:
            return f"{repo}: no such repository, or a private one; check the name, or {TOKEN}"
        return f"{repo}: no such repository, or one that your token does not open; check both"
    if isinstance(error, its.RevisionNotFoundError):
        return f"{repo.name}: no revision {repo.revision!r}; give a branch, a tag or a commit"
    if _is_no_file(error):
        return f"{repo}: holds no {file}; check the name and the revision"
    if isinstance(error, its.HfHubHTTPError) and (status := _status(error)):
        why = HTTP_REMEDIES.get(status, f"answered {status} ({_reason(error)}); {LATER}")
        return f"{what}{why}"
    if isinstance(error, its.HFValidationError):
        return f"{repo.name}: no name of a repository ({_reason(error)})"
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in CLIENTS:
        return f"{what}the hub cannot be reached ({_reason(error)}); {LATER}"
    said = f"{type(error).__name__}: {_reason(error)}"
    return f"{what}its answer cannot be used ({said}); check HF_ENDPOINT, or {LATER}"


def _status(error: Any) -> int:
    return getattr(getattr(error, "response", None), "status_code", 0)


def _reason(error: BaseException) -> str:
    # What the hub said, where it said something, is shorter than what the client makes of it.
    lines = str(getattr(error, "server_message", None) or error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]
