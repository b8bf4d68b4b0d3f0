"""Who may ask the studio, and for what: over HTTP, as somebody without a browser would."""

from __future__ import annotations

import io
import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.cli_calls import run
from varptq.errors import InputError, OutputError

pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")

import httpx
from PIL import Image
from starlette.testclient import TestClient

from helpers.picture_files import png_header
from helpers.studio_calls import Caller, drawing, editing, file_data
from helpers.studio_pages import STUDIO
from varptq.web.files import MAX_BYTES
from varptq.web.server import Options, is_local, make_studio, parse_auth, web_app
from varptq.web.studio import TITLE

pytestmark = STUDIO

SMALL, MADE = "models/small/var.safetensors", "models/w4a4"
SAMPLING = (4.0, 10, 0.9)
BOX = (True, 0.0, 0.0, 0.5, 0.5)


@pytest.fixture
def caller(served: Any) -> Caller:
    return Caller(served.address)


def png(width: int, height: int) -> bytes:
    """A picture whose header says so; only a small one has the pixels too."""
    if width * height < 10_000:
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), (200, 100, 50)).save(buffer, "PNG")
        return buffer.getvalue()
    return png_header(width, height)


def edit(caller: Caller, image: Any, *rest: Any) -> Any:
    """The event of the button Edit, with a box unless `rest` says otherwise."""
    canvas, *rest = rest or (None, "In-paint", "", 1, 0, 4.0, "crop", *BOX)
    return caller.call("edit", MADE, image, canvas, *editing(*rest))


def test_the_policy_is_on_every_answer(served: Any, caller: Caller) -> None:
    for path in ("/", "/config", "/gradio_api/info", "/missing"):
        headers = caller.http.get(served.address + path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_itself_loads_nothing_from_elsewhere(served: Any, caller: Caller) -> None:
    page = caller.http.get(served.address).text
    loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"([^\"]+)\"", page)
    assert loaded
    assert not [url for url in loaded if "//" in url and not url.startswith(served.address)]
    assert "fonts.googleapis" not in page


ANY_ENCODING = {"Accept-Encoding": "gzip, br"}


def program_of(page: str) -> str:
    """The address of the page's program."""
    (found,) = re.findall(r'src="\./(assets/[^"]+\.js)"', page)
    return found


def test_a_browser_here_keeps_the_program_and_gets_it_as_it_is(served: Any, caller: Caller) -> None:
    page = caller.http.get(served.address, headers=ANY_ENCODING)
    assert "immutable" not in page.headers.get("cache-control", "")
    address = f"{served.address}/{program_of(page.text)}"
    program = caller.http.get(address, headers=ANY_ENCODING)
    assert "immutable" in program.headers["cache-control"]
    assert "content-encoding" not in program.headers
    assert "immutable" not in caller.http.get(address + "x").headers.get("cache-control", "")


def test_nobody_reaches_it_under_another_name(served: Any) -> None:
    answer = httpx.get(served.address, headers={"Host": "studio.example"}, trust_env=False)
    assert answer.status_code == 400


@pytest.mark.parametrize("key", ["../small", "/etc/passwd", "models/../models/w4a4", "", None, 3])
@pytest.mark.parametrize("place", [0, 1])
def test_no_model_outside_the_list_is_opened(caller: Caller, key: Any, place: int) -> None:
    chosen: list[Any] = [SMALL, "nothing"]
    chosen[place] = key
    answer = caller.call("generate", *chosen, *drawing("0", 1, 0, *SAMPLING))
    if place == 1 and not key:
        return  # nothing beside it
    assert not answer.ok and "choose one from the list" in str(answer.error)
    assert not [output for output in answer.outputs if "path" in json.dumps(output)]


def test_files_of_the_machine_are_not_served(served: Any, caller: Caller) -> None:
    config = served.models / "w4a4" / "config.json"
    inside = (config, served.models / "small" / "var.safetensors", Path("/etc/passwd"))
    for path in (*inside, Path("pyproject.toml"), Path("..") / "etc"):
        assert caller.file(str(path)).status_code in (403, 404), path
    uploaded = caller.upload("a.png", png(3, 3))
    assert caller.file(uploaded).status_code == 200
    crooked = f"{Path(uploaded).parent}/../../../../../../../etc/passwd"
    assert caller.file(crooked).status_code in (403, 404)


@pytest.mark.parametrize("path", ["/etc/passwd", "{models}/x.png", "../x.png"])
def test_only_uploads_can_be_edited(served: Any, caller: Caller, path: str) -> None:
    hidden = served.models / "x.png"
    hidden.write_bytes(png(3, 3))
    answer = edit(caller, file_data(path.format(models=served.models)))
    hidden.unlink()
    assert not answer.ok and not answer.outputs and "root:" not in str(answer)


def test_an_address_in_place_of_a_file_is_not_fetched(caller: Caller) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        answer = edit(caller, {**file_data(address), "url": address})
        assert not answer.ok and "not uploaded" in str(answer.error)
        assert answer.title == TITLE
        with pytest.raises(TimeoutError):
            listener.accept()


def test_large_uploads_are_refused(served: Any, caller: Caller) -> None:
    files = {"files": ("big.png", b"\0" * (MAX_BYTES + 1000))}
    assert caller.http.post(f"{caller.api}/upload", files=files).status_code == 413


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("bomb.png", png(30_000, 30_000), "25 megapixels"),
        ("wide.png", png(6000, 5000), "6000 x 5000 pixels"),
        ("cut.png", png(30, 30)[:60], "cannot be read"),
        ("text.png", b"this is no picture", "not a JPEG, PNG or WebP"),
        ("empty.png", b"", "not a JPEG, PNG or WebP"),
        ("one.png", png(1, 1), None),
    ],
    ids=["bomb", "wide", "cut", "text", "empty", "one"],
)
def test_hostile_pictures_get_one_line(
    caller: Caller, name: str, content: bytes, says: str | None
) -> None:
    box = (True, 0.0, 0.0, 1.0, 0.5)
    image = file_data(caller.upload(name, content))
    answer = edit(caller, image, None, "In-paint", "", 1, 0, 4.0, "crop", *box)
    if says is None:
        assert answer.ok or "nothing would be regenerated" in str(answer.error)
        return
    assert not answer.ok and says in str(answer.error)
    assert "\n" not in str(answer.error) and "/gradio" not in str(answer.error)


def painted(caller: Caller, box: tuple[int, int, int, int], size: int = 30) -> dict[str, Any]:
    """A canvas with one layer of `size`, painted inside `box`."""
    layer, buffer = Image.new("RGBA", (size, size)), io.BytesIO()
    layer.paste((224, 112, 42, 208), box)
    layer.save(buffer, "PNG")
    return {
        "background": None,
        "layers": [file_data(caller.upload("layer.png", buffer.getvalue()))],
        "composite": None,
    }


@pytest.mark.parametrize(
    ("box", "task", "says"),
    [
        ((0, 0, 0, 0), "In-paint", "mask: empty. Paint what is to be drawn anew."),
        ((0, 0, 30, 30), "In-paint", "mask: full, so no token of the 3 x 3 grid is kept"),
        ((0, 0, 0, 0), "Out-paint", "mask: empty. Paint what is to be kept"),
        ((0, 0, 30, 30), "Out-paint", "mask: empty, so nothing would be regenerated"),
        ((0, 0, 30, 30), "Change", None),
        ((0, 0, 15, 30), "Change", None),
    ],
)
@pytest.mark.parametrize("size", [30, 300])
def test_masks_of_every_size_are_for_the_whole_image(
    caller: Caller, box: tuple[int, int, int, int], task: str, says: str | None, size: int
) -> None:
    """A canvas has a size of its own: 300 pixels for an image of 30."""
    image = file_data(caller.upload("a.png", png(30, 30)))
    place = tuple(value * size // 30 for value in box)
    canvas = painted(caller, (place[0], place[1], place[2], place[3]), size)
    answer = edit(caller, image, canvas, task, "cat", 1, 0, 4.0, "crop", False, *BOX[1:])
    assert answer.ok is (says is None), answer.error
    assert says is None or says in str(answer.error)


def test_an_unknown_class_of_an_edit_is_answered_with_a_near_one(caller: Caller) -> None:
    image = file_data(caller.upload("a.png", png(30, 30)))
    answer = edit(caller, image, None, "Change", "kat", 1, 0, 4.0, "crop", *BOX)
    assert not answer.ok and "class 'kat': unknown; did you mean cat" in str(answer.error)


@pytest.mark.slow
def test_a_runtime_that_is_missing_is_one_line(without_cuda: Any) -> None:
    """Only an artifact needs it; a float model draws."""
    caller = Caller(without_cuda.address)
    says = "runtime 'cuda': computes on cuda, the device is cpu; use runtime simulated"
    drawn = caller.call("generate", MADE, "nothing", *drawing("cat", 1, 0, *SAMPLING))
    assert not drawn.ok and str(drawn.error) == says
    image = file_data(caller.upload("a.png", png(30, 30)))
    edited = edit(caller, image)
    assert not edited.ok and str(edited.error) == says
    measured = caller.call("measure", MADE, "report", 1)
    assert not measured.ok and str(measured.error) == says
    assert caller.call("generate", SMALL, "nothing", *drawing("0", 1, 0, *SAMPLING)).ok


def test_a_painted_layer_has_the_same_limits(caller: Caller) -> None:
    image = file_data(caller.upload("a.png", png(30, 30)))
    bomb = file_data(caller.upload("layer.png", png(30_000, 30_000)))
    canvas = {"background": image, "layers": [bomb], "composite": None}
    rest = ("In-paint", "", 1, 0, 4.0, "crop", False, 0.0, 0.0, 0.5, 0.5)
    answer = edit(caller, image, canvas, *rest)
    assert not answer.ok and "megapixels" in str(answer.error)
    assert answer.title == TITLE


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (("kat", 1, 0, *SAMPLING), "did you mean cat"),
        (("<img src=x onerror=alert(1)>", 1, 0, *SAMPLING), "&lt;img"),
        (("5", 1, 0, *SAMPLING), "not in 0..4"),
        (("cat", 1, -1, *SAMPLING), "seed -1: expected 0 to"),
        (("cat", 1000, 0, *SAMPLING), "16"),
        (("cat", 1, 0, -3.0, 10, 0.9), "minimum"),
        (("cat", 1, 0, 4.0, 10, 7.0), "maximum"),
    ],
)
def test_bad_values_get_one_line(caller: Caller, values: tuple[Any, ...], says: str) -> None:
    answer = caller.call("generate", MADE, "nothing", *drawing(*values))
    assert not answer.ok and says.lower() in str(answer.error).lower()
    assert "\n" not in str(answer.error)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (("w9000a4", "rtn", "fast", 1, 1, 0, "x", False), "w9000a4"),
        (("/etc/passwd", "rtn", "fast", 1, 1, 0, "x", False), "expected w&lt;bits&gt;a"),
        (("w4a4", "rtn", "fast", 1, 1, 0, "../escaped", False), "name"),
        (("w4a4", "rtn", "fast", 1, 1, 0, "/tmp/escaped", False), "name"),
        (("w4a4", "rtn", "fast", 1, 1, 0, ".hidden", False), "name"),
        (("w4a4", "rtn", "fast", 10**9, 1, 0, "x", False), "samples"),
    ],
)
def test_a_bad_calibration_writes_nothing(
    served: Any, caller: Caller, values: tuple[Any, ...], says: str
) -> None:
    before = sorted(served.out.rglob("*"))
    answer = caller.call("quantize", SMALL, *values)
    assert not answer.ok and says in str(answer.error)
    assert sorted(served.out.rglob("*")) == before


def test_an_artifact_is_made_once_and_replaced_only_on_request(served: Any, caller: Caller) -> None:
    settings = (SMALL, "w4a4", "rtn", "fast", 1, 1, 0, "twice")
    made = caller.call("quantize", *settings, False)
    assert made.ok and (served.out / "twice" / "config.json").is_file()
    # A page sees messages that arrive together as the last of them, so none may build on another.
    between = [edits for output in made.outputs[1:-1] for edits in output]
    assert between and all(edit[:2] == ["replace", []] for edits in between for edit in edits)
    again = caller.call("quantize", *settings, False)
    assert not again.ok and "exists" in str(again.error)
    assert caller.call("quantize", *settings, True).ok
    (served.out / "precious").mkdir(exist_ok=True)
    taken = caller.call("quantize", *settings[:-1], "precious", True)
    assert not taken.ok and (served.out / "precious").is_dir()


def test_edits_of_a_page_come_back_as_files(caller: Caller) -> None:
    image = file_data(caller.upload("a.png", png(31, 30)))
    answer = edit(caller, image, None, "Out-paint", "", 2, 7, 4.0, "crop", *BOX)
    assert answer.ok, answer.error
    paths = set(re.findall(r'"(/[^"]+/edit-seed7-\d\.png)"', json.dumps(answer.outputs)))
    assert len(paths) == 2
    for path in paths:
        content = caller.file(path).content
        assert Image.open(io.BytesIO(content)).size == (31, 30)


def test_a_password_is_asked_for_everywhere(models: Path, tmp_path: Path) -> None:
    options = Options(host="0.0.0.0", auth=("me", "correct horse"))
    options.check()
    app = web_app(make_studio([models], tmp_path / "out"), options)
    with TestClient(app, base_url="http://studio.example") as client:
        for path in ("/config", "/gradio_api/info", "/gradio_api/file=/tmp/x"):
            assert client.get(path).status_code == 401, path
        body = {"data": [], "fn_index": 1, "session_hash": "x"}
        assert client.post("/gradio_api/queue/join", json=body).status_code == 401
        files = {"files": ("a.png", png(3, 3))}
        assert client.post("/gradio_api/upload", files=files).status_code == 401
        wrong = {"username": "me", "password": "correct horsf"}
        assert client.post("/login", data=wrong).status_code == 400
        assert client.post("/login", data={**wrong, "password": "correct horse"}).status_code == 200
        assert client.get("/config").status_code == 200
        # What goes through a network is compressed.
        program = client.get(f"/{program_of(client.get('/').text)}", headers=ANY_ENCODING)
        assert program.headers["content-encoding"] in ("br", "gzip")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "studio.example", ""])
def test_other_machines_need_a_password(host: str) -> None:
    assert not is_local(host)
    with pytest.raises(InputError, match="--auth USER:PASSWORD"):
        Options(host=host).check()
    Options(host=host, auth=("me", "12345678")).check()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.10"])
def test_this_machine_needs_none(host: str) -> None:
    Options(host=host).check()


@pytest.mark.parametrize("text", ["", "me", "me:", ":12345678", "me:short"])
def test_a_password_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^auth: ") as refused:
        parse_auth(text)
    assert "short" not in str(refused.value)
    assert parse_auth("me:with:colons") == ("me", "with:colons")


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        out = ("--out", tmp_path / "out")
        for words, says in (
            (("--host", "0.0.0.0", *out), "--auth"),
            (("--auth", "me", *out), "USER:PASSWORD"),
            (("--port", port, *out), "choose another --port"),
            (("--runtime", "tpu", *out), "runtime 'tpu': unknown"),
            (("--host", "no such host", "--auth", "me:12345678", *out), "cannot be used"),
            ((tmp_path / "missing", *out), "no such folder"),
            (("--out", file), "cannot be made"),
        ):
            ran = run("serve", *words)
            assert ran.code == 2 and says in ran.err, (words, ran.err)
            assert ran.err.count("\n") == 1


def test_a_runtime_that_does_not_exist_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VARPTQ_RUNTIME", "tpu")
    ran = run("serve", "--out", tmp_path / "out")
    assert ran.code == 2 and "VARPTQ_RUNTIME: runtime 'tpu': unknown" in ran.err
    assert not (tmp_path / "out").exists()


def test_without_gradio_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    ran = run("serve", "--out", tmp_path)
    assert ran.code == 2 and "varptq[web]" in ran.err


def test_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="choose another place"):
        make_studio([], tmp_path / "file" / "out")
