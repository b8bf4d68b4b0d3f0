"""Images a minute with all cores, alone and in batches of 8, and the hours that 50,000 take.

    python -m benchmarks.speed.throughput [--model var-d16] [--threads 2] [--rounds 3]
    python -m benchmarks.speed.throughput --model var-d30   # keeps what is there of the other
    python -m benchmarks.speed.throughput --result throughput_zen_3   # of another class of CPU
    python -m benchmarks.speed.throughput --report

Whole images of models with random weights, the decoder's part included, as runtime_variants.py
makes them: float32 as published, bfloat16 with packed weights where the CPU has it, and presets on
integers. Variants take turns, medians of the clock. VAR-d30 one image at a time, in float32 and at
W8A8, in 24 GB of memory. --report: only write docs/benchmarks.md, from the results.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.common.bfloat16 import has_bfloat16
from benchmarks.common.pages import DOCS, replace, table
from benchmarks.common.results import RESULTS, read_document, write_document
from benchmarks.common.runtime_variants import Variant, eager, integers, prepacked, variant
from varptq.models.pipeline import Pipeline, build_model

PAGE, MARK = DOCS / "benchmarks.md", "throughput"
# One for each class of CPU.
NAMES = ("throughput", "throughput_zen_4", "throughput_zen_3")
EAGER, PACKED = "eager float32", "packed bfloat16"
IMAGES = 50_000


class Study(NamedTuple):
    """What is measured of a model."""

    presets: tuple[str, ...]
    batches: tuple[int, ...]
    packed: bool


STUDIES = {
    "var-d16": Study(("w8a8", "w6a6", "w4a8", "w2a8", "w4a4"), (1, 8), packed=True),
    "var-d30": Study(("w8a8",), (1,), packed=False),
}


def variants(pipe: Pipeline, study: Study) -> dict[str, Variant]:
    found = {EAGER: variant(eager(pipe))}
    if study.packed and has_bfloat16():
        found[PACKED] = variant(prepacked(pipe, torch.bfloat16), autocast=True)
    return found | {preset: variant(integers(pipe, preset)) for preset in study.presets}


def measure(name: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds of an image by variant, for every size of batch."""
    found = variants(build_model(name), STUDIES[name])
    for batch in STUDIES[name].batches:
        times: dict[str, list[float]] = {who: [] for who in found}
        for number in range(rounds + 1):
            for who, run in found.items():
                seconds = sum(run(batch).values())
                if number:
                    times[who].append(seconds / batch)
        line = {who: statistics.median(taken) for who, taken in times.items()}
        print(name, batch, {who: f"{s:.2f} s" for who, s in line.items()}, flush=True)
        yield {"model": name, "batch": batch, "seconds": line}


def report(document: dict[str, Any]) -> Iterator[str]:
    threads, machine, rounds = (document[name] for name in ("threads", "machine", "rounds"))
    yield f"{threads} threads of {machine}, medians of {rounds}. Images a minute (over {EAGER}):"
    yield ""
    cases = document["cases"]
    names = list(cases[0]["seconds"])
    rows = list[list[str]]()
    for case in cases:
        taken = case["seconds"]
        cells = [
            f"{60 / taken[who]:.1f} ({taken[EAGER] / taken[who]:.1f}x)" if who in taken else "-"
            for who in names
        ]
        rows.append([case["model"], str(case["batch"]), *cells])
    yield from table(["model", "batch", *names], rows)
    yield f"Hours for {IMAGES:,} images, at the batch of those measured that is faster:"
    yield ""
    rows = []
    for model in STUDIES:
        best = [case["seconds"] for case in cases if case["model"] == model]
        if best:
            fastest = {who: min(s[who] for s in best) for who in best[0]}
            rows.append([model, *(hours(fastest.get(who)) for who in names)])
    yield from table(["model", *names], rows)


def hours(seconds: float | None) -> str:
    return "-" if seconds is None else f"{IMAGES * seconds / 3600:.0f}"


def write_page() -> None:
    lines = (line for name in NAMES if exists(name) for line in report(read_document(name)))
    replace(PAGE, MARK, ["", *lines])


def exists(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=STUDIES, default="var-d16")
    parser.add_argument("--result", choices=NAMES, default=NAMES[0], help="the file in results/")
    parser.add_argument("--machine", default="", help="what CPU this is, for the page")
    parser.add_argument("--report", action="store_true", help="only write docs/benchmarks.md")
    asked = parser.parse_args()
    if not asked.report:
        torch.set_num_threads(asked.threads)
        settings = {name: getattr(asked, name) for name in ("machine", "threads", "rounds")}
        there = read_document(asked.result)["cases"] if exists(asked.result) else []
        cases = [case for case in there if case["model"] != asked.model]
        for case in measure(asked.model, asked.rounds):
            cases.append(case)
            write_document(asked.result, {**settings, "cases": cases})
    write_page()


if __name__ == "__main__":
    main()
