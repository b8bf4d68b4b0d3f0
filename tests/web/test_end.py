"""The studio as a process that is told to end while it draws."""

from __future__ import annotations

import os
import signal
import subprocess
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")

import httpx

from helpers.holding import PATIENCE, until
from helpers.studio_calls import Caller, drawing
from helpers.studio_pages import STUDIO
from web.conftest import address_in

pytestmark = STUDIO

ENDS = {signal.SIGINT: (130, "error: interrupted"), signal.SIGTERM: (143, "error: terminated")}


def answers_at(address: str) -> bool:
    try:
        return httpx.get(address, timeout=PATIENCE, trust_env=False).is_success
    except httpx.TransportError:
        return False


def draw(address: str) -> None:
    """Eight images; nobody may be there at the end of them."""
    with suppress(httpx.TransportError):
        Caller(address).call("generate", "demo", "nothing", *drawing("0", 8, 0, 4.0, 10, 0.9))


@pytest.mark.parametrize(("told", "times"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_it_ends_in_the_middle_of_an_image(
    told: signal.Signals, times: int, warm: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [warm / "varptq", "serve", "--out", tmp_path / "made", "--port", "0"],
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(tmp_path / "cache")},
        )
    try:
        address = address_in(log, process)
        with ThreadPoolExecutor(6) as people:
            wait([people.submit(draw, address) for _ in range(6)], return_when=FIRST_COMPLETED)
            process.send_signal(told)
            if times > 1:
                until(lambda: not answers_at(address))
                process.send_signal(told)
            code, line = ENDS[told]
            assert process.wait(PATIENCE) == code
        said = log.read_text()
        assert said.splitlines()[-1] == line and "Traceback" not in said, said
    finally:
        process.kill()
        process.wait()
