"""A hub on this machine: the endpoints that huggingface_hub calls, with answers as the real one
gives them, for its real client in the tests.

Files of the kinds that are large there (`LARGE`) are here too: their address redirects to another
host name, which takes ranges and refuses a token. A repository keeps its commits; a private one is
hidden from all but `TOKEN`. What goes wrong is set on the server: `cut`, `slow_after`, `failing`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from helpers.cli_calls import Ran

TOKEN = "hf_tests"
LARGE = (".safetensors", ".pth", ".png")
INVALID_TOKEN = "Invalid credentials in Authorization header"


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add files to what the branch has; the new commit."""
        before = self.commits.get(self.branches.get(branch, ""), {})
        whole = {**before, **files}
        parts = (f"{len(self.commits)}{name}".encode() + whole[name] for name in sorted(whole))
        number = hashlib.sha1(b"".join(parts)).hexdigest()
        self.commits[number] = whole
        self.branches[branch] = number
        return number

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """cut: after how many bytes of a large file the connection is closed, once for each entry.
    slow_after: after how many it sends nothing until it is stopped. failing: answers 503 to all.
    damage: what a large file is changed by on its way."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []  # method, path, range
        self.cut: list[int] = []
        self.slow_after: int | None = None
        self.failing = False
        self.damage: Callable[[bytes], bytes] = bytes
        self.sending, self.stopped = threading.Event(), threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what some tests are about."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: Mapping[str, bytes], **kinds: bool) -> Repository:
        repository = self.repositories.setdefault(name, Repository(**kinds))
        repository.commit(files)
        return repository

    def sent(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]

    def ranges(self) -> list[str]:
        """Of the requests for contents of large files."""
        return [which for method, path, which in self.asked if path.startswith("/large/")]


@dataclass
class Client:
    """Processes whose hub is `hub`, with a cache of their own in `home`. `commands`: the folder of
    the fixture `warm`."""

    commands: Path
    hub: Hub
    home: Path

    def environment(self, token: str | None = None, **more: str) -> dict[str, str]:
        """HF_HUB_DISABLE_XET: what is sent goes by the endpoints that are here."""
        ours = {
            "HF_ENDPOINT": self.hub.address,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        return {**kept, **ours, **({} if token is None else {"HF_TOKEN": token}), **more}

    def start(self, *words: object, **settings: Any) -> subprocess.Popen[str]:
        program, *rest = map(str, words)
        return subprocess.Popen(
            [self.commands / program, *rest],
            env=self.environment(**settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: object, **settings: Any) -> Ran:
        process = self.start(*words, **settings)
        out, err = process.communicate(timeout=120)
        return Ran(process.returncode, out, err)

    def varptq(self, *words: object, **settings: Any) -> Ran:
        return self.run("varptq", *words, **settings)

    def python(self, code: str, **settings: Any) -> list[str]:
        """The lines that a program prints, which ends well and writes nothing to stderr."""
        ran = self.run("python", "-c", textwrap.dedent(code), **settings)
        assert (ran.code, ran.err) == (0, ""), ran.err
        return ran.out.splitlines()

    def blobs(self) -> list[Path]:
        return sorted(self.home.glob("hub/models--*/blobs/*"))


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        hub.shutdown()
        hub.server_close()


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def etag_of(path: str, content: bytes) -> str:
    """SHA-256 of a large file; of another the name that git gives it."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """The tests read `asked` instead."""

    def do_HEAD(self) -> None:
        self._dispatch()

    def do_GET(self) -> None:
        self._dispatch()

    def do_POST(self) -> None:
        self._dispatch()

    def do_PUT(self) -> None:
        self._dispatch()

    def _dispatch(self) -> None:
        place = urlsplit(self.path)
        self.path, self.query = unquote(place.path), parse_qs(place.query)
        self.asked_for = self.headers.get("Range") or ""
        self.server.asked.append((self.command, self.path, self.asked_for))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.failing:
            return self._refuse(503, "", "the hub is being repaired")
        for pattern, action in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {self.path}"):
                return action(self, **found.groupdict())
        return self._refuse(404, "", f"no endpoint {self.command} {self.path}")

    # Answers.

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), **headers)

    # Who asks.

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _opened(self, name: str) -> Repository | None:
        """The repository, or None once the request is refused."""
        token, found = self._token(), self.server.repositories.get(name)
        if token not in (None, TOKEN):
            self._refuse(401, "", INVALID_TOKEN)
        elif found is None or (found.private and token is None):
            # One answer for both, and another without a token, as on the hub.
            self._refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
        elif found.gated:
            self._refuse(403, "GatedRepo", "Access to this repository is restricted")
        else:
            return found
        return None

    def _at(self, name: str, revision: str) -> tuple[Repository, str] | None:
        if (found := self._opened(name)) is None:
            return None
        if (commit := found.find(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return found, commit

    # What is asked for.

    def info(self, name: str, revision: str | None = None) -> None:
        if (found := self._at(name, revision or "main")) is not None:
            repository, commit = found
            siblings = [{"rfilename": path} for path in repository.commits[commit]]
            more = {"downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
            self._json({"id": name, "sha": commit, "private": repository.private, **more})

    def resolve(self, name: str, revision: str, file: str) -> None:
        if (found := self._at(name, revision)) is None:
            return
        repository, commit = found
        content = repository.commits[commit].get(file)
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        etag = etag_of(file, content)
        headers = {"X_Repo_Commit": commit, "ETag": f'"{etag}"'}
        if not is_large(file):
            return self._send(200, content, **headers)
        self.server.large[etag] = content
        headers |= {"X_Linked_ETag": f'"{etag}"', "X_Linked_Size": str(len(content))}
        # Another host to the client: a token sent on to it would leave the hub.
        other = self.server.address.replace("127.0.0.1", "localhost")
        return self._send(302, **headers, Location=f"{other}/large/{etag}")

    def content(self, etag: str) -> None:
        if self._token() is not None:
            return self._refuse(400, "", "only one kind of authorization")
        whole = self.server.damage(self.server.large[etag])
        begins = re.fullmatch(r"bytes=(\d+)-", self.asked_for)
        first = int(begins.group(1)) if begins else 0
        self.send_response(206 if begins else 200)
        if begins:
            self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(whole) - first))
        self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command == "HEAD":
            return None
        end = self.server.cut.pop(0) if self.server.cut else self.server.slow_after
        self.wfile.write(whole[first:end])
        self.wfile.flush()
        if end is not None:
            self.server.sending.set()
            if self.server.slow_after is not None:
                self.server.stopped.wait()
            self.close_connection = True
        return None

    # What is sent.

    def whoami(self) -> None:
        if self._token() != TOKEN:
            return self._refuse(401, "", INVALID_TOKEN)
        return self._json({"name": "org", "type": "user", "orgs": []})

    def create(self) -> None:
        if self._token() != TOKEN:
            return self._refuse(401, "", INVALID_TOKEN)
        asked = json.loads(self.body)
        name = f"{asked['organization'] or 'org'}/{asked['name']}"
        if asked["organization"] == "others":
            return self._refuse(403, "", "You don't have the rights to create a model")
        if name in self.server.repositories:
            return self._json({"error": "exists", "url": f"{self.server.address}/{name}"}, 409)
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.server.add(name, {".gitattributes": b""}, private=private)
        return self._json({"url": f"{self.server.address}/{name}", "name": name})

    def branch(self, name: str, branch: str) -> None:
        if (found := self._opened(name)) is not None:
            if branch in found.branches:
                return self._refuse(409, "", "Reference already exists")
            found.branches[branch] = found.branches["main"]
            self._json({})
        return None

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if self._at(name, revision) is not None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._json({"files": files})

    def batch(self, name: str) -> None:
        if self._opened(name) is None:
            return
        objects: list[dict[str, Any]] = []
        for one in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.address}/upload/{one['oid']}"}}
            there = one["oid"] in self.server.large
            objects.append({**one, **({} if there else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, etag: str) -> None:
        self.server.large[etag] = self.body
        self._send(200)

    def commit(self, name: str, revision: str) -> None:
        if (found := self._at(name, revision)) is None:
            return
        files: dict[str, bytes] = {}
        for line in self.body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        number = found[0].commit(files, revision)
        url = f"{self.server.address}/{name}/commit/{number}"
        self._json({"commitUrl": url, "commitOid": number, "pullRequestUrl": None})


REPO = r"(?P<name>[^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{REPO}/branch/(?P<branch>.+)", Handler.branch),
    (rf"POST /api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"POST /api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    (rf"GET /api/models/{REPO}(/revision/(?P<revision>.+))?", Handler.info),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /upload/(?P<etag>\w+)", Handler.upload),
    (r"(GET|HEAD) /large/(?P<etag>\w+)", Handler.content),
    (rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
]
