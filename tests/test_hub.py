"""Files of the hub by its real client from a server here: failures are a line, and a file that was
cut off goes on in another process."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.hub_server import TOKEN, Client
from varptq.hub import Repo, remedy

# The client hands on ten MiB at a time, and what is cut off within them is fetched again.
STEP = 10 * 2**20
LARGE = bytes(range(256)) * (5 * STEP // 512)
FILE = "model.safetensors"
FETCH = f"""
from varptq import hub
print(hub.fetch(hub.Repo("org/name"), {FILE!r}).stat().st_size)
"""
TOLD = """
import os, warnings
from varptq import hub
from varptq.errors import VarptqError
warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\\n"
def told(name, file="config.json", token=None):
    os.environ.pop("HF_TOKEN", None)
    if token: os.environ["HF_TOKEN"] = token
    try:
        print(hub.fetch(hub.Repo.parse(name), file).read_text(), flush=True)
    except VarptqError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


def test_names_of_repositories() -> None:
    parse = Repo.parse
    assert parse("org/name") == Repo("org/name")
    assert parse("org/na.me-1@v2/x") == Repo("org/na.me-1", "v2/x")
    assert str(parse("org/name@main")) == "org/name@main"
    for text in (
        "name",
        "/org/name",
        "./name",
        "../name",
        "a/b/c",
        "org/",
        "~/x",
        "org/name@",
        "é/x",
    ):
        assert parse(text) is None, text


def test_what_is_refused_is_one_line(hub: Client) -> None:
    """The server hides a private repository as the hub does, so its line names both reasons."""
    hub.hub.add("org/name", {"config.json": b"of all"})
    hub.hub.add("org/private", {"config.json": b"of few"}, private=True)
    hub.hub.add("org/gated", {"config.json": b"of some"}, gated=True)
    cases = {
        "'org/none'": "HubError: org/none: no such repository, or a private one; check the name, "
        "or set HF_TOKEN, or run hf auth login",
        f"'org/none', token={TOKEN!r}": "HubError: org/none: no such repository, or one that your "
        "token does not open; check both",
        "'org/private'": "HubError: org/private: no such repository, or a private one",
        f"'org/private', token={TOKEN!r}": "of few",
        "'org/name', token='hf_of_yesterday'": "HubError: org/name: config.json: its token was "
        "refused: set HF_TOKEN",
        "'org/gated'": "HubError: org/gated: gated; ask for access",
        "'org/name@v9'": "HubError: org/name: no revision 'v9'; give a branch, a tag or a commit",
        "'org/name', 'notes.txt'": "NoFileError: org/name: holds no notes.txt",
        "'org/na--me'": "HubError: org/na--me: no name of a repository",
        "'org/name'": "of all",
    }
    found = hub.python(TOLD + "".join(f"told({case})\n" for case in cases))
    assert len(found) == len(cases)
    for line, expected in zip(found, cases.values(), strict=True):
        assert line.startswith(expected), line


def test_a_hub_that_is_away(hub: Client) -> None:
    """What is in the cache is taken, with a warning; offline without one."""
    old = hub.hub.add("org/name", {"config.json": b"old"}).branches["main"]
    hub.hub.add("org/other", {"config.json": b"other"})
    ask = TOLD + "told('org/name')\ntold('org/other')\n"
    assert hub.python(TOLD + "told('org/name')") == ["old"]
    hub.hub.add("org/name", {"config.json": b"new"})
    hub.hub.failing = True
    away = hub.run("python", "-c", ask)
    assert away.err.startswith("warning: org/name: the hub cannot be reached (")
    assert away.err.endswith(f"config.json is that of the cache, of commit {old[:8]}\n")
    assert away.err.count("\n") == 1
    kept, refused = away.out.splitlines()
    assert kept == "old"
    assert refused.startswith("HubError: org/other: config.json: answered 503 (")
    hub.hub.failing = False
    offline = hub.run("python", "-c", ask, HF_HUB_OFFLINE="1")
    assert offline.err == ""
    assert offline.out.splitlines() == [
        "old",
        "HubError: org/other: config.json: not in the cache, and HF_HUB_OFFLINE is set; unset it "
        "to fetch the file",
    ]
    assert hub.python(ask) == ["new", "other"]
    nowhere = hub.python(TOLD + "told('org/third')", HF_ENDPOINT="http://127.0.0.1:9")
    assert nowhere[0].startswith("HubError: org/third: config.json: the hub cannot be reached (")


def test_a_download_goes_on_in_another_process(hub: Client) -> None:
    hub.hub.add("org/name", {FILE: LARGE})
    hub.hub.slow_after = STEP + STEP // 2
    first = hub.start("python", "-c", FETCH)
    assert hub.hub.sending.wait(60)
    (partial,) = wait_for(lambda: [b for b in hub.blobs() if b.stat().st_size == STEP])
    first.kill()
    first.communicate()
    hub.hub.slow_after = None
    assert hub.python(FETCH) == [str(len(LARGE))]
    assert hub.hub.ranges() == ["", f"bytes={STEP}-"]
    assert [blob.name for blob in hub.blobs()] == [partial.name.removesuffix(".incomplete")]
    assert hashlib.sha256(hub.blobs()[0].read_bytes()).hexdigest() == hub.blobs()[0].name


def wait_for(found: Callable[[], list[Path]]) -> list[Path]:
    import time

    for _ in range(600):
        if result := found():
            return result
        time.sleep(0.02)
    raise AssertionError("nothing came")


def test_cut_connections_and_damage_on_the_way(hub: Client) -> None:
    hub.hub.add("org/name", {FILE: LARGE})
    # Its pauses between two attempts are seconds.
    hurry = "import time\ntime.sleep = lambda seconds: None\n"
    hub.hub.damage = lambda content: content[:-1] + b"x"
    told = hurry + TOLD + f"told('org/name', {FILE!r})"
    (line,) = hub.python(told)
    assert (
        line.startswith("HubError: org/name: model.safetensors arrived damaged") and not hub.blobs()
    )
    hub.hub.damage = bytes
    hub.hub.cut = [STEP] * 99
    (line,) = hub.python(told)
    assert line.startswith("HubError: org/name: model.safetensors: the hub cannot be reached (")
    hub.hub.cut = [2 * STEP]
    assert hub.python(hurry + FETCH) == [str(len(LARGE))]
    assert hub.hub.ranges()[-1] == f"bytes={2 * STEP}-"


FULL = f"""
import os, shutil, subprocess, sys
from collections import namedtuple
home = os.environ["HF_HOME"]
os.mkdir(home)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", home], check=True)
{TOLD}
told("org/name", {FILE!r})
print(sum(files != [] for _, _, files in os.walk(home + "/hub/models--org--name/blobs")))
shutil.disk_usage = lambda path: namedtuple("Usage", "free")(10**12)
told("org/name", {FILE!r})
print(sum(files != [] for _, _, files in os.walk(home + "/hub/models--org--name/blobs")))
"""


def test_a_full_disk_is_seen_before_and_on_the_way(hub: Client) -> None:
    own = ["unshare", "-rm"]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    hub.hub.add("org/name", {FILE: LARGE})
    done = subprocess.run(
        [*own, sys.executable, "-c", FULL],
        env=hub.environment(PYTHONPATH=":".join(sys.path)),
        capture_output=True,
        text=True,
        check=True,
    )
    before, left, on_the_way, left_then = done.stdout.splitlines()
    assert f"{hub.home}/hub: 26.21 MB are to be fetched and 2.1" in before
    assert "set HF_HOME to a folder on another disk" in before
    assert on_the_way.startswith("OutputError: the hub's cache: cannot be written")
    assert left == left_then == "0"


def test_the_remedy_names_what_to_delete(tmp_path: Path) -> None:
    commit = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    assert remedy(tmp_path / "model" / FILE) is None
    assert f"delete {commit / FILE} and run again" in (remedy(commit / FILE) or "")
