"""A running API: uvicorn on a free port, in a thread of this process, and clients of it."""

from __future__ import annotations

import base64
import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from helpers.holding import PATIENCE, until
from varptq.models.pipeline import Pipeline
from varptq.web.address import listen, server_of, url
from varptq.web.api.served import Served
from varptq.web.api.server import Options, api

# One worker for all tests of a running API.
API = pytest.mark.xdist_group("api")


@dataclass(frozen=True)
class Running:
    """A server that answers, and the uvicorn that it is."""

    address: str
    uvicorn: Any
    token: str

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**self._options(options))

    def many(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._options(options))

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        address = {"base_url": f"{self.address}/v1", "api_key": self.token}
        return {**address, "max_retries": 0, "timeout": PATIENCE, **options}

    def post(self, path: str, **content: Any) -> httpx.Response:
        return httpx.post(self.address + path, timeout=PATIENCE, trust_env=False, **content)

    def measured(self, name: str) -> float:
        """Of /metrics, summed over labels."""
        headers = {"authorization": f"Bearer {self.token}"}
        text = httpx.get(f"{self.address}/metrics", headers=headers, trust_env=False).text
        rows = re.findall(rf"^varptq_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert rows, name
        return sum(map(float, rows))


@contextmanager
def running(
    models: dict[str, Pipeline], stopping: Callable[[], bool] | None = None, **options: Any
) -> Iterator[Running]:
    """stopping: in place of what uvicorn says of itself."""
    served = [Served.of(name, pipe) for name, pipe in models.items()]
    wanted = Options(port=0, **options)
    wanted.check()
    listening = listen(wanted.host, wanted.port)
    app = api(served, wanted, stopping or (lambda: server.should_exit))
    server = server_of(app, grace=60)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(url(wanted.host, listening), server, wanted.token or "none")
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def pixels(file: str | None) -> np.ndarray:
    """(H, W, channels) of a file in base 64."""
    assert file is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))


def files(answer: Any) -> Sequence[str]:
    return [image.b64_json for image in answer.data]


def png(picture: Image.Image) -> io.BytesIO:
    """As an upload with a name."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    buffer.name = "picture.png"
    buffer.seek(0)
    return buffer
