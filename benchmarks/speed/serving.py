"""What a served model holds: images a second and waiting times under one client and under many.

    python -m benchmarks.speed.serving [--model NAME ...] [--config w8a8] [--threads 2]
                                       [--clients 1,8,50] [--batch-sizes 1,8] [--images 50]
                                       [--json FILE] [--machine TEXT]
    python -m benchmarks.speed.serving --report

For each model an artifact with random weights is made (of `demo` with its own), rounded to nearest,
whose time is that of any rounding, and served by `varptq serve --api` in a process of its own. C
clients, each OpenAI's own, ask for one image after another until --images are drawn (at least one
for each client). Times are of the wall, which other programs make longer; the CPU time of an image
is the server's own. --quick: the demo, few images. --report: only write docs/serving.md, from the
file of results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import torch

import varptq
from benchmarks.common import few_blocks
from benchmarks.common.pages import DOCS, replace, table
from benchmarks.common.results import read_document
from benchmarks.common.runtime_variants import simulated
from varptq.models.presets import preset

NAME, PAGE = "serving", DOCS / "serving.md"
MODELS, CONFIG = ("demo", "var-d16"), "w8a8"
COMMAND = [sys.executable, "-m", "varptq"]
ADDRESS = re.compile(r"varptq api: (http://\S+)/v1$", re.MULTILINE)
COUNTS = ("batch_images_sum", "batch_images_count", "cpu_seconds_total")
COUNTED = re.compile(rf"^(?:varptq|process)_({'|'.join(COUNTS)})(?:{{.*}})? (\S+)$", re.MULTILINE)
START_SECONDS = 300
Level = dict[str, float]


def make(model: str, config: str, folder: Path) -> None:
    """An artifact of a published model's shape."""
    if model == "demo":
        pipe = varptq.load_model(model)
    else:
        depth = preset(model).transformer_arch.depth
        pipe = few_blocks.build(model, depth, torch.float32)
    varptq.save(simulated(pipe, config), folder)


@contextmanager
def serving(folder: Path, threads: int, batch_size: int) -> Iterator[str]:
    """The address of a server that is stopped afterwards."""
    words = ["serve", "--api", str(folder), "--port", "0", "--batch-size", str(batch_size)]
    limits = ["--queue", "256", "--deadline", "3600"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*COMMAND, *words, *limits],
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        try:
            yield _address(process, log)
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Any) -> str:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        log.seek(0)
        if found := ADDRESS.search(log.read()):
            return found[1]
        time.sleep(0.05)
    log.seek(0)
    raise SystemExit(f"the server did not start: {log.read()}")


async def load(address: str, clients: int, images: int) -> list[float]:
    """Seconds of every request; each client asks again as soon as it is answered."""
    each = max(1, images // clients)

    async def ask(person: int) -> list[float]:
        async with openai.AsyncOpenAI(
            base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=3600
        ) as client:
            times = list[float]()
            for turn in range(each):
                seed = {"seed": person * each + turn}
                started = time.perf_counter()
                await client.images.generate(prompt=str(person % 10), extra_body=seed)
                times.append(time.perf_counter() - started)
            return times

    return [value for times in await asyncio.gather(*map(ask, range(clients))) for value in times]


def counted(address: str) -> dict[str, float]:
    """Images and batches so far, and seconds of CPU time."""
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in COUNTED.findall(text)}


def level(address: str, clients: int, images: int) -> Level:
    """What `clients` at a time get."""
    before, started = counted(address), time.perf_counter()
    times = sorted(asyncio.run(load(address, clients, images)))
    spent, after = time.perf_counter() - started, counted(address)
    drawn, batches, busy = (after[name] - before[name] for name in COUNTS)
    return {
        "clients": clients,
        "images": len(times),
        "images a second": len(times) / spent,
        "median": statistics.median(times),
        "95%": times[min(len(times) - 1, int(0.95 * len(times)))],
        "longest": times[-1],
        "images a batch": drawn / batches,
        "CPU an image": busy / drawn,
    }


def measure(
    model: str,
    config: str,
    threads: int,
    clients: Sequence[int],
    batch_sizes: Sequence[int],
    images: int,
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "served"
        make(model, config, folder)
        found: dict[str, Any] = {"model": model, "config": config, "threads": threads}
        for size in batch_sizes:
            with serving(folder, threads, size) as address:
                asyncio.run(load(address, 1, 1))  # what a first image sets up
                levels = [level(address, count, images) for count in clients]
            found.setdefault("served", []).append({"batch size": size, "levels": levels})
    return found


def report(document: dict[str, Any]) -> Iterator[str]:
    """A table for each model."""
    head = ["clients", "batch size", "images a second", "median s", "95% s", "longest s"]
    head += ["CPU s an image"]
    columns = ("images a second", "median", "95%", "longest", "CPU an image")
    for found in document["models"]:
        yield (
            f"**{found['model']}, {found['config']}, {found['threads']} threads**, "
            f"{document['machine']}:"
        )
        yield ""
        rows = [
            [
                f"{one['clients']}",
                f"{served['batch size']}, on average {one['images a batch']:.1f}",
                *(f"{one[name]:.2f}" for name in columns),
            ]
            for served in found["served"]
            for one in served["levels"]
        ]
        yield from table(head, rows)


def write_page() -> None:
    replace(PAGE, "serving", ["", *report(read_document(NAME))])


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="*", default=list(MODELS))
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=numbers, default=[1, 8, 50])
    parser.add_argument("--batch-sizes", type=numbers, default=[1, 8])
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="the demo, few images")
    parser.add_argument("--json", type=Path, help="file for the numbers; other models stay in it")
    parser.add_argument("--machine", default="", help="what CPU this is, for the page")
    parser.add_argument("--report", action="store_true", help="only write docs/serving.md")
    options = parser.parse_args()
    if options.report:
        write_page()
        return
    if options.quick:
        options.model, options.clients, options.images = ["demo"], [1, 8], 8
    loads = (options.threads, options.clients, options.batch_sizes, options.images)
    document: dict[str, Any] = {"machine": options.machine, "models": []}
    if options.json and options.json.exists():
        kept = json.loads(options.json.read_text())["models"]
        document["models"] = [found for found in kept if found["model"] not in options.model]
    for model in options.model:
        document["models"].append(measure(model, options.config, *loads))
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(report(document)))


if __name__ == "__main__":
    main()
