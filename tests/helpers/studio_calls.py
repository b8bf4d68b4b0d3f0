"""Call the studio as its pages do, over HTTP and without a browser."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from varptq.models.sampling_defaults import TOP_K, TOP_P

SECONDS = 120.0


@dataclass(frozen=True)
class Answer:
    """What one event sent: every output it yielded, and its error with the title of the toast."""

    outputs: list[list[Any]]
    error: str | None
    ok: bool
    title: str | None = None


class Caller:
    """One page: a session of its own."""

    def __init__(self, address: str) -> None:
        self.api = f"{address}/gradio_api"
        self.session = secrets.token_hex(6)
        self.http = httpx.Client(timeout=SECONDS, trust_env=False)
        config = self.http.get(f"{address}/config").json()
        self.events = {event["api_name"]: event["id"] for event in config["dependencies"]}
        self.inputs = {e["api_name"]: len(e["inputs"]) for e in config["dependencies"]}

    def call(self, name: str, *data: Any) -> Answer:
        """Join the queue with the event `name` and listen until it ends."""
        outputs: list[list[Any]] = []
        for message in self.listen(name, *data):
            output = message.get("output") or {}
            if message.get("msg") == "process_generating" and message["success"]:
                outputs.append(output["data"])
            if message.get("msg") == "process_completed":
                outputs += [output["data"]] if output.get("data") else []
                error = (output.get("error"), message["success"], output.get("title"))
                return Answer(outputs, *error)
        raise AssertionError("the stream ended before the event")

    def listen(self, name: str, *data: Any) -> Iterator[dict[str, Any]]:
        """The same, message by message; who stops listening closes the page. What is left out at
        the end is empty."""
        padded = [*data, *[None] * (self.inputs[name] - len(data))]
        body = {"data": padded, "fn_index": self.events[name], "session_hash": self.session}
        self.http.post(f"{self.api}/queue/join", json=body).raise_for_status()
        url = f"{self.api}/queue/data?session_hash={self.session}"
        with self.http.stream("GET", url) as lines:
            for line in lines.iter_lines():
                if line:
                    yield json.loads(line.removeprefix("data: "))

    def upload(self, name: str, content: bytes) -> str:
        """Send a file; where the studio keeps it."""
        answer = self.http.post(f"{self.api}/upload", files={"files": (name, content)})
        answer.raise_for_status()
        return answer.json()[0]

    def file(self, path: str) -> httpx.Response:
        return self.http.get(f"{self.api}/file={path}")


def drawing(
    name: Any,
    count: Any,
    seed: Any,
    cfg: Any,
    top_k: Any,
    top_p: Any,
    tau: Any = 1.0,
    text: tuple[str, str, str] = ("", "", ""),
) -> tuple[Any, ...]:
    """What the event "generate" takes after the models. text: prompt, negative prompt and size."""
    return (name, *text, count, seed, None, cfg, tau, top_k, top_p)


def editing(
    task: Any,
    name: Any,
    candidates: Any,
    seed: Any,
    cfg: Any,
    *rest: Any,
    text: tuple[str, str, str] = ("", "", ""),
) -> tuple[Any, ...]:
    """What the event "edit" takes after picture and canvas."""
    sampling = (cfg, 1.0, TOP_K, TOP_P)
    return (task, name, *text, candidates, seed, *sampling, *rest)


def file_data(path: str) -> dict[str, Any]:
    """An uploaded file as a page names it."""
    return {
        "path": path,
        "orig_name": path.rpartition("/")[2],
        "meta": {"_type": "gradio.FileData"},
    }
