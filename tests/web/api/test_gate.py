"""Who is let in, and what becomes of a request that is refused, too late or given up."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the API's client is openai: varptq[dev]")

import httpx
import openai

from helpers.api_server import API, Running, files, png, running
from helpers.holding import PATIENCE, Held, held, until
from helpers.picture_files import png_header
from helpers.studio_pages import photo
from varptq.models.pipeline import Pipeline
from varptq.reading import read_image
from varptq.web.api import gate

pytestmark = API

TOKEN = "a token of some length"
GIGABYTE = 10**9
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture
def waiting(on_integers: Pipeline) -> Iterator[tuple[Pipeline, Held]]:
    """A model that draws nothing before it is told, which it is in the end."""
    pipe, sampler = held(on_integers)
    yield pipe, sampler
    sampler.free.set()


@pytest.fixture(scope="module")
def people() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def ask(people: ThreadPoolExecutor, server: Running, **wish: Any) -> Future[Any]:
    return people.submit(server.client().images.generate, **{"prompt": "cat", **wish})


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, in OpenAI's shape and one line."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return error


def test_a_token_is_asked_for_everywhere_but_for_health(on_integers: Pipeline) -> None:
    with running({"tiny": on_integers}, token=TOKEN) as server:
        wrong = ("Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN)
        for given in (*wrong, "Bearer ä"):
            headers = {"authorization": given.encode()}
            for path in ("/v1/models", "/metrics", "/nothing", GENERATIONS):
                answer = httpx.get(server.address + path, headers=headers, trust_env=False)
                assert refused(answer, 401)["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError, match="Bearer TOKEN"):
            server.client(api_key=TOKEN.upper()).images.generate(prompt="cat")
        assert httpx.get(f"{server.address}/health", trust_env=False).json() == {"status": "ok"}
        assert files(server.client().images.generate(prompt="cat"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"content": b""}, "not valid JSON"),
        ({"content": b"{"}, "not valid JSON"),
        ({"content": b"[" * 100_000}, "not valid JSON"),
        ({"content": b"\xff\xfe"}, "not valid JSON"),
        ({"json": ["cat"]}, "expected a mapping"),
        ({"json": {}}, "prompt"),
        ({"json": {"prompt": 7}}, "prompt is 7"),
        ({"json": {"prompt": "kat"}}, "did you mean cat"),
        ({"json": {"prompt": "cat", "n": 0}}, "n is 0"),
        ({"json": {"prompt": "cat", "n": 10**9}}, "less than or equal to 10"),
        ({"json": {"prompt": "cat", "n": True}}, "n is True: expected a number"),
        ({"json": {"prompt": "cat", "seed": True}}, "seed is True: expected a number"),
        ({"json": {"prompt": "cat", "tau": [True]}}, "tau is [True]: expected a number"),
        ({"json": {"prompt": "cat", "sed": 1}}, "unknown field 'sed'"),
        ({"json": {"prompt": "cat", "seed": -1}}, "seed is -1"),
        ({"json": {"prompt": "cat", "size": "7x7"}}, "size '7x7': model 'tiny' draws auto, "),
        ({"json": {"prompt": "cat", "response_format": "url"}}, "response_format is 'url'"),
        ({"json": {"prompt": "cat", "background": "transparent"}}, "background"),
        ({"json": {"prompt": "cat", "cfg": [1.0, 2.0]}}, "cfg"),
        ({"json": {"prompt": "cat", "cfg": 1e308}}, "cfg is 1e+308: expected numbers that are"),
        ({"json": {"prompt": "cat", "tau": 1e-45}}, "tau is 1e-45: expected numbers that are"),
        ({"json": {"prompt": "cat", "top_p": 7}}, "top_p is 7"),
        ({"content": b'{"prompt": "cat", "cfg": NaN}'}, "cfg"),
        ({"json": {"prompt": "cat", "negative_prompt": "dog"}}, "negative"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_request_is_one_line(
    server: Running, content: dict[str, Any], says: str
) -> None:
    error = refused(server.post(GENERATIONS, **content), 400)
    assert says in error["message"]


PNG = ("a.png", png(read_image(photo((24, 24)))).getvalue())


@pytest.mark.parametrize(
    ("uploads", "says"),
    [
        ([], "0 images"),
        ([("image", PNG), ("image[]", PNG)], "2 images"),
        ([("image", PNG)], "mask: none given"),
        ([("image", ("a.png", b"no picture"))], "image"),
        ([("image", PNG), ("mask", ("a.png", png_header(30_000, 30_000)))], "megapixels"),
        ([("image", PNG), ("mask", ("a.png", png(read_image(photo((9, 9)))).getvalue()))], "mask"),
        ([("picture", PNG)], "file 'picture'"),
    ],
)
def test_a_malformed_edit_is_one_line(server: Running, uploads: Any, says: str) -> None:
    error = refused(server.post(EDITS, data={"prompt": "cat"}, files=uploads or None), 400)
    assert says in error["message"]


def test_a_broken_form_is_one_line(server: Running) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    refused(server.post(EDITS, content=b"--x\r\nnonsense", headers=headers), 400)
    refused(server.post(GENERATIONS + "/more", json={}), 404)
    refused(httpx.get(server.address + EDITS, trust_env=False), 405)


def test_a_gigabyte_is_refused_by_its_size_alone(server: Running, tmp_path: Path) -> None:
    huge = tmp_path / "huge.png"
    huge.touch()
    os.truncate(huge, GIGABYTE)  # takes no space
    with huge.open("rb") as file, pytest.raises(openai.APIStatusError, match="MB") as told:
        server.client().images.edit(image=file, prompt="cat")
    assert told.value.status_code == 413 and told.value.code == "body_too_large"


class Endless:
    """A body that is longer than anybody reads; `sent` bytes of it were taken."""

    def __init__(self) -> None:
        self.sent = 0

    def __iter__(self) -> Iterator[bytes]:
        while self.sent < GIGABYTE:
            self.sent += len(CHUNK)
            yield CHUNK


CHUNK = bytes(65_536)
# What the system takes for a server that does not read.
BUFFERED = 20_000_000


@pytest.mark.parametrize("length", [None, GIGABYTE])
def test_no_body_is_read_beyond_the_limit(
    server: Running, monkeypatch: pytest.MonkeyPatch, length: int | None
) -> None:
    """By the length that it says it has, from the beginning; else by what has come."""
    if length is None:
        monkeypatch.setattr(gate, "MAX_BODY", 200_000)
    body, headers = Endless(), {"content-length": str(length)} if length else None
    told = refused(server.post(GENERATIONS, content=body, headers=headers), 413)
    assert told["code"] == "body_too_large"
    assert body.sent < BUFFERED < 50_000_000


def test_beyond_the_queue_comes_429(
    waiting: tuple[Pipeline, Held], people: ThreadPoolExecutor
) -> None:
    pipe, sampler = waiting
    with running({"tiny": pipe}, queue=3) as server:
        asked = [ask(people, server) for _ in range(3)]
        until(lambda: server.measured("requests_under_way") == 3)
        with pytest.raises(openai.RateLimitError, match="3 requests are under way") as told:
            server.client().images.generate(prompt="cat")
        assert 1 <= int(told.value.response.headers["retry-after"]) <= 60
        assert server.client().models.list().data, "only images wait"
        sampler.free.set()
        assert all(files(answer.result(PATIENCE)) for answer in asked)
        assert files(server.client().images.generate(prompt="cat"))


def test_a_body_that_does_not_come_ends_at_the_deadline(on_integers: Pipeline) -> None:
    with running({"tiny": on_integers}, deadline=0.3) as server:
        line = http.client.HTTPConnection(server.address.removeprefix("http://"))
        line.putrequest("POST", GENERATIONS)
        line.putheader("content-length", "100")
        line.endheaders(b"{")
        answer = line.getresponse()
        assert answer.status == 504 and b"deadline_exceeded" in answer.read()
        line.close()


def test_a_request_ends_at_its_deadline_and_so_does_its_work(
    waiting: tuple[Pipeline, Held],
) -> None:
    pipe, sampler = waiting
    with running({"tiny": pipe}, deadline=0.3) as server:
        with pytest.raises(openai.InternalServerError, match=r"within 0\.3 seconds") as told:
            server.client().images.generate(prompt="cat", n=10)
        assert (told.value.status_code, told.value.code) == (504, "deadline_exceeded")
        with pytest.raises(openai.APIError, match=r"within 0\.3 seconds"):
            list(server.client().images.generate(prompt="cat", stream=True))
        until(lambda: server.measured("requests_under_way") == 0)
        asked = sampler.scales
        sampler.free.set()
        until(lambda: server.measured("images_waiting") == 0)
    assert sampler.scales == asked, "what nobody waits for is not drawn"


@pytest.mark.parametrize("stream", [False, True])
def test_the_work_of_a_client_that_hangs_up_stops(
    waiting: tuple[Pipeline, Held], stream: bool
) -> None:
    pipe, sampler = waiting
    wish = {"prompt": "cat", "n": 10, "stream": stream}
    with running({"tiny": pipe}, batch_size=2) as server:
        line = http.client.HTTPConnection(server.address.removeprefix("http://"))
        line.request("POST", GENERATIONS, json.dumps(wish))
        until(lambda: sampler.scales == 1)
        assert server.measured("requests_under_way") == 1
        line.close()
        until(lambda: server.measured("requests_under_way") == 0)
        assert sampler.scales == 1
        sampler.free.set()
        assert files(server.client().images.generate(prompt="cat"))
        assert server.measured("images_total") == 1
    assert sampler.scales == 1 + pipe.scales.num_scales


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_client_that_hangs_up_while_it_sends_is_no_failure_of_ours(
    on_integers: Pipeline, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = GENERATIONS if "json" in kind else EDITS
    with running({"tiny": on_integers}) as server:
        line = http.client.HTTPConnection(server.address.removeprefix("http://"))
        line.putrequest("POST", path)
        for name, value in (("content-type", kind), ("content-length", "1000")):
            line.putheader(name, value)
        line.endheaders(b"{" if "json" in kind else b"--x")
        until(lambda: server.measured("requests_under_way") == 1)
        line.close()
        until(lambda: server.measured("requests_under_way") == 0)
        text = httpx.get(f"{server.address}/metrics", trust_env=False).text
    assert f'varptq_requests_total{{path="{path}",status="499"}} 1.0' in text
    assert not caplog.records


def test_told_to_end_it_finishes_what_it_has(
    waiting: tuple[Pipeline, Held], people: ThreadPoolExecutor
) -> None:
    pipe, sampler = waiting
    with running({"tiny": pipe}, batch_size=2) as server:
        asked = [ask(people, server, n=2) for _ in range(3)]
        until(lambda: server.measured("requests_under_way") == 3)
        server.uvicorn.handle_exit(signal.SIGTERM, None)
        sampler.free.set()
        assert all(len(files(answer.result(PATIENCE))) == 2 for answer in asked)
    with pytest.raises(openai.APIConnectionError):
        server.client().images.generate(prompt="cat")


def test_told_to_end_it_takes_nothing_new(on_integers: Pipeline) -> None:
    """Of those whose connection was open before."""
    with running({"tiny": on_integers}, stopping=lambda: True) as server:
        answer = server.post(GENERATIONS, json={"prompt": "cat"})
        assert refused(answer, 503)["code"] == "stopping" and "retry-after" in answer.headers
        assert httpx.get(f"{server.address}/health", trust_env=False).status_code == 503
        assert server.client().models.list().data
