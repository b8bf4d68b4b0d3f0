"""What disks, folders, proxies and requests of other people do to the studio, without a browser."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from varptq.errors import InputError, OutputError
from varptq.web.surroundings import CACHE, claim_cache, without_proxies

pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")

from gradio import route_utils, routes
from PIL import Image
from starlette.testclient import TestClient

from varptq.web import files
from varptq.web.catalogue import Kind
from varptq.web.server import Options, make_studio, serve, web_app

UPLOAD = "/gradio_api/upload"
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder where `gradio` belongs to somebody else: it cannot even be a folder."""
    place = tmp_path_factory.mktemp("machine")
    (place / "gradio").write_text("not yours")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(CACHE, raising=False)
        patch.setattr(tempfile, "tempdir", str(place))
        patch.setattr(routes, "DEFAULT_TEMP_DIR", str(place / "gradio"))
        patch.setenv("GRADIO_VIBE_MODE", "1")
        yield place


@pytest.fixture(scope="module")
def client(machine: Path) -> Iterator[Any]:
    """A studio on that machine, asked without a network."""
    app = web_app(make_studio([], machine / "out"), Options())
    with TestClient(app, base_url="http://localhost") as asking:
        yield asking


def cache(machine: Path) -> Path:
    """The one folder that the studio made for its files."""
    (folder,) = machine.glob("varptq-studio-*")
    return folder


def send(client: Any, name: str, content: bytes = b"x") -> Any:
    return client.post(UPLOAD, files={"files": (name, content)})


def test_the_apps_folder_is_somebody_elses(
    client: Any, machine: Path, counted: Callable[[], None]
) -> None:
    counted()
    assert client.get("/config").status_code == 200
    (path,) = send(client, "a.png").json()
    assert Path(path).is_relative_to(cache(machine))
    assert cache(machine).stat().st_mode & 0o077 == 0
    assert (machine / "gradio").read_text() == "not yours"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_for_uploads_that_cannot_be_one(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    counted()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE, str(tmp_path / place))
    with pytest.raises(OutputError, match=f"^{CACHE} '.*file.*: cannot be written") as refused:
        web_app(make_studio([], tmp_path / "out"), Options())
    assert "unset it" in str(refused.value)


def test_a_folder_for_uploads_is_used_and_shared_with_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    counted()
    monkeypatch.setattr(routes, "DEFAULT_TEMP_DIR", "")
    monkeypatch.setenv(CACHE, str(tmp_path / "new" / "cache"))
    first = claim_cache()
    assert first.parent == tmp_path / "new" / "cache" and claim_cache() == first
    monkeypatch.setenv(CACHE, str(first.parent))
    assert claim_cache() != first


def test_no_temporary_folder_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    counted()
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(OutputError, match=f"^temporary folder: cannot be made .* set {CACHE} to"):
        claim_cache()


def test_the_disk_fills_up_during_an_upload(
    client: Any, machine: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    async def full(self: Any, data: bytes) -> None:
        raise FULL

    counted()
    with monkeypatch.context() as patch:
        patch.setattr(route_utils.GradioUploadFile, "write", full)
        answer = send(client, "a.png", b"y")
    assert answer.status_code == 507
    assert answer.text.startswith("upload: cannot be stored (No space left on device)")
    assert "\n" not in answer.text
    assert not [path for path in cache(machine).iterdir() if path.is_file()]
    assert send(client, "a.png", b"y").status_code == 200


def test_an_upload_that_is_too_large_leaves_nothing(
    client: Any, machine: Path, counted: Callable[[], None]
) -> None:
    counted()
    assert send(client, "a.png", b"\0" * (files.MAX_BYTES + 1)).status_code == 413
    assert not [path for path in cache(machine).iterdir() if path.is_file()]


@pytest.mark.parametrize(
    "name",
    [
        *("../../x.png", "/etc/x.png", "a" * 300 + ".png", "'; rm -rf $HOME \".png", ".png"),
        *("\N{CAT}.png", "\N{RIGHT-TO-LEFT OVERRIDE}gnp.exe", "..", "", " ", "x\r\ny.png", "x\0y"),
    ],
)
def test_a_strange_name_of_an_upload(
    client: Any, machine: Path, name: str, counted: Callable[[], None]
) -> None:
    """It is kept inside the folder, or refused."""
    counted()
    answer = send(client, name, name.encode())
    assert answer.status_code in (200, 400)
    for path in answer.json() if answer.status_code == 200 else []:
        assert Path(path).resolve().is_relative_to(cache(machine))
        assert Path(path).read_bytes() == name.encode()


def test_the_disk_is_full_when_a_picture_is_to_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise FULL

    counted()
    monkeypatch.setattr(Image.Image, "save", full)
    shown: Any = SimpleNamespace(GRADIO_CACHE=str(tmp_path), temp_files=set())
    with pytest.raises(OutputError, match=r"^cat\.png: cannot be stored .*No space left"):
        files.offer_picture(shown, Image.new("RGB", (2, 2)), "cat.png")
    assert not list(tmp_path.iterdir()) and not shown.temp_files


@pytest.mark.parametrize(
    "path",
    [
        *("file=http://192.0.2.7/x", "file=https%3A//192.0.2.7/x", "file/http://192.0.2.7/x"),
        *("proxy=http://192.0.2.7/x", "process_recording"),
    ],
)
def test_no_address_is_fetched_for_a_page(
    client: Any, path: str, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        pytest.fail("the studio asked another machine")

    counted()
    monkeypatch.setattr(routes, "secure_url_stream_response", asked)
    assert client.get(f"/gradio_api/{path}").status_code == 403


def test_a_variable_switches_no_more_of_the_app_on(
    client: Any, counted: Callable[[], None]
) -> None:
    counted()
    assert client.get("/config").json()["vibe_mode"] is False


@pytest.mark.parametrize("host", ["a..b", "no such host", "x" * 300, "\xe9..x", "192.0.2.7"])
def test_a_host_that_is_not_here(host: str, tmp_path: Path, counted: Callable[[], None]) -> None:
    counted()
    options = Options(host=host, port=0, auth=("me", "12345678"))
    with pytest.raises(InputError, match=r"choose another --host$"):
        serve(make_studio([], tmp_path), options, print)


def test_two_studios_on_one_folder(machine: Path, counted: Callable[[], None]) -> None:
    """What one makes is in the lists of the other."""
    counted()
    first, second = (make_studio([], machine / "shared") for _ in range(2))
    (first.out / "made").mkdir()
    for name in ("config.json", "model.safetensors"):
        (first.out / "made" / name).write_text("{}")
    assert second.keys(Kind.artifact) == first.keys(Kind.artifact) == ["shared/made"]


def test_proxies_come_back(monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]) -> None:
    counted()
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "::1/128")
    before = dict(os.environ)
    with without_proxies():
        assert not {"ALL_PROXY", "no_proxy"} & set(os.environ)
    assert dict(os.environ) == before


@pytest.mark.slow
def test_proxies_no_home_and_a_port_in_use(tmp_path: Path, counted: Callable[[], None]) -> None:
    """The proxies are of a form that the app cannot read; the port is what is wrong."""
    counted()
    strange = {"ALL_PROXY": "socks://127.0.0.1:9", "NO_PROXY": "::1/128"}
    settings = {name: value for name, value in os.environ.items() if name != "HOME"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "varptq", "serve", "--port", port, "--out", "made"]
        done = subprocess.run(
            command, env={**settings, **strange}, cwd=tmp_path, capture_output=True, timeout=120
        )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(b"\n") == 1 and b"choose another --port" in done.stderr
