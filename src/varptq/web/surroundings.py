"""Which settings of the machine reach the app that the studio is built on.

By itself the app keeps files in one folder for all users of a machine, and reads proxy settings
though it needs none. Knows no page and, until it is called, no Gradio.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from varptq.errors import OutputError

CACHE = "GRADIO_TEMP_DIR"
PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}
CLAIMED: set[str] = set()


@contextmanager
def without_proxies() -> Iterator[None]:
    """Hide the proxy settings while the app is imported, since the import fails for proxies that
    its client does not know (socks://, an IPv6 range). The studio contacts no other server."""
    hidden = {name: os.environ.pop(name) for name in [*os.environ] if name.lower() in PROXIES}
    try:
        yield
    finally:
        os.environ.update(hidden)


def claim_cache() -> Path:
    """Make a new folder, in which the app keeps uploads and shown pictures from now on; below the
    folder that `CACHE` names, if any. It is deleted when the process ends.

    Raises `OutputError` if none can be made.
    """
    from gradio import routes

    named = os.environ.get(CACHE)
    if named in CLAIMED:
        return Path(named)
    try:
        if named:
            Path(named).mkdir(parents=True, exist_ok=True)
        folder = os.path.abspath(tempfile.mkdtemp(prefix="varptq-studio-", dir=named or None))
    except OSError as error:
        raise OutputError(_refusal(named, error)) from None
    CLAIMED.add(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[CACHE] = folder
    # The app read the variable when it was imported, and would make a folder there.
    routes.__dict__["DEFAULT_TEMP_DIR"] = folder
    return Path(folder)


def _refusal(named: str | None, error: OSError) -> str:
    if named:
        return (
            f"{CACHE} {named!r}: cannot be written ({error.strerror}); set it to a folder of your "
            "own, or unset it"
        )
    return (
        f"temporary folder: cannot be made ({error.strerror}); set {CACHE} to a folder that can be "
        "written"
    )
