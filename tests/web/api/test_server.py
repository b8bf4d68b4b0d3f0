"""`varptq serve --api` as a process: it starts, is told to end, and refuses in one line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="the API's client is openai: varptq[dev]")

import httpx
import openai

from helpers.api_server import API
from helpers.cli_calls import run
from helpers.holding import PATIENCE, until
from varptq.errors import InputError
from varptq.web.api.server import Options

pytestmark = API

INTERRUPTED, TERMINATED = 130, 143
ADDRESS = re.compile(r"varptq api: (http://\S+/v1)$", re.MULTILINE)
TOKEN = "a token of some length"


def test_it_finishes_a_stream_after_sigterm(warm: Path, models: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [warm / "varptq", "serve", "--api", models / "w4a4", "--port", "0"],
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", "VARPTQ_TOKEN": TOKEN},
        )
    try:
        until(lambda: ADDRESS.search(log.read_text()) or process.poll() is not None)
        found = ADDRESS.search(log.read_text())
        assert found is not None, log.read_text()
        client = openai.OpenAI(base_url=found[1], api_key=TOKEN, max_retries=0)
        assert [model.id for model in client.models.list()] == ["w4a4"]
        kinds: list[str] = []
        for event in client.images.generate(prompt="cat", n=10, stream=True, partial_images=3):
            if not kinds:
                process.send_signal(signal.SIGTERM)
            kinds.append(event.type)
        assert kinds.count("image_generation.completed") == 10
        assert process.wait(PATIENCE) == TERMINATED
        assert log.read_text().splitlines()[1:] == ["error: terminated"]
    finally:
        process.kill()
        process.wait()


def answers_at(address: str) -> bool:
    try:
        return httpx.get(f"{address}/models", timeout=PATIENCE, trust_env=False).is_success
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("model", ["demo", "w4a4"])
def test_a_second_ctrl_c_ends_it_in_the_middle_of_a_batch(
    model: str, warm: Path, models: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    place = model if model == "demo" else models / model
    with log.open("w") as errors:
        process = subprocess.Popen(
            [warm / "varptq", "serve", "--api", place, "--port", "0"],
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        until(lambda: ADDRESS.search(log.read_text()) or process.poll() is not None)
        found = ADDRESS.search(log.read_text())
        assert found is not None, log.read_text()
        wish = {"prompt": "cat", "n": 10}
        with ThreadPoolExecutor(9) as people:
            url = f"{found[1]}/images/generations"
            asked = [
                people.submit(httpx.post, url, json=wish, timeout=PATIENCE, trust_env=False)
                for _ in range(8)
            ]
            wait(asked, return_when=FIRST_COMPLETED)
            process.send_signal(signal.SIGINT)
            until(lambda: not answers_at(found[1]))
            process.send_signal(signal.SIGINT)
            answers = [answer.result() for answer in asked]
        assert process.wait(PATIENCE) == INTERRUPTED
        assert log.read_text().splitlines()[1:] == ["error: interrupted"]
        given_up = [answer.json()["error"] for answer in answers if answer.status_code != 200]
        assert given_up and {error["code"] for error in given_up} == {"stopping"}
    finally:
        process.kill()
        process.wait()


def test_the_command_refuses_in_one_line(models: Path, tmp_path: Path) -> None:
    model = models / "w4a4"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, says in (
            ((), "model: none given"),
            ((tmp_path / "missing",), "neither an artifact folder nor a model"),
            ((tmp_path,), "config.json"),
            ((model, f"{model}/"), "two have one name"),
            (("var-d16",), "--download"),
            ((model, "--host", "0.0.0.0"), "give a token too"),
            ((model, "--token", "short"), "token: 5 characters, expected at least 16"),
            ((model, "--token", f" {TOKEN}"), "begins or ends with a space"),
            ((model, "--auth", "me:12345678"), "--auth: only for the studio"),
            ((model, "--out", tmp_path), "--out: only for the studio"),
            ((model, "--port", port), "choose another --port"),
            ((model, "--runtime", "tpu"), "runtime 'tpu': unknown"),
            (("demo", "--runtime", "tpu"), "runtime 'tpu': unknown"),
            ((model, "--queue", 0), "--queue"),
            ((model, "--deadline", "inf"), "deadline inf: expected a number of seconds"),
            ((model, "--deadline", "nan"), "--deadline"),
        ):
            ran = run("serve", "--api", *words)
            assert ran.code == 2 and says in ran.err, (words, ran.err)
            assert ran.err.count("\n") == 1 and TOKEN not in ran.err
    for words, says in ((("--token", TOKEN), "unset VARPTQ_TOKEN"), (("--batch-size", 3), "API")):
        ran = run("serve", "--out", tmp_path, *words)
        assert ran.code == 2 and says in ran.err and TOKEN not in ran.err


def test_without_its_packages_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    ran = run("serve", "--api", "demo")
    assert ran.code == 2 and "varptq[api]" in ran.err


@pytest.mark.parametrize("token", ["", "short", "tokens of sixteen\n", "tökens of sixteen"])
def test_a_token_that_is_none_is_refused(token: str) -> None:
    with pytest.raises(InputError, match=r"^token: \d+ characters"):
        Options(token=token).check()
