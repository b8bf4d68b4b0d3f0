"""A calibration and sampling beside one other program that computes without a pause.

    python -m benchmarks.speed.busy [--threads 2] [--rounds 3] [--machine TEXT]
    python -m benchmarks.speed.busy --report

Each in a process of its own, alone and beside the other program, taking turns: as varptq does it,
and with torch's threads left as they are, which is stopped after --limit seconds. --report: only
write docs/scaling.md, from the file of results.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.common.pages import DOCS, replace, table
from benchmarks.common.results import read_document, write_document

NAME, PAGE, MARK = "busy", DOCS / "scaling.md", "busy"
WORK = {
    "calibration": "quantize demo --config w4a4+paper --method brecq --samples 8 --steps 20",
    "40 images": "generate demo --classes cat --count 40 --seed 0",
}
OURS, PLAIN = "varptq", "torch as it is"
RUN = "from varptq.cli.main import app; app(prog_name='varptq')"
LEFT = f"from varptq import busy; busy.loaded_libgomp = list; {RUN}"
PROGRAMS = {OURS: RUN, PLAIN: LEFT}


@contextmanager
def another_program() -> Iterator[None]:
    """Of another session, as another user's would be."""
    loop = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(loop, start_new_session=True) as other:
        try:
            yield
        finally:
            other.kill()


def measured(program: str, words: str, threads: int, limit: float) -> tuple[float, str]:
    """Seconds, and what was written; the limit and nothing where that was reached."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        command = [sys.executable, "-c", program, *words.split(), "--out", str(out)]
        started = time.perf_counter()
        try:
            subprocess.run(
                command,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                capture_output=True,
                check=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return limit, ""
        seconds = time.perf_counter() - started
        found = hashlib.sha256()
        for path in sorted(out.iterdir()):
            found.update(path.read_bytes())
        return seconds, found.hexdigest()


def measure(threads: int, rounds: int, limit: float) -> list[dict[str, Any]]:
    """Of each work, beside each, by each program: the median."""
    found: dict[tuple[str, bool, str], list[float]] = {}
    for words in WORK.values():
        measured(RUN, words, threads, limit)  # what a first process reads from the disk
    for name, words in WORK.items():
        made = set[str]()
        for _ in range(rounds):
            for beside in (False, True):
                with another_program() if beside else nullcontext():
                    for who, program in PROGRAMS.items():
                        seconds, digest = measured(program, words, threads, limit)
                        found.setdefault((name, beside, who), []).append(seconds)
                        made |= {digest} - {""}
        assert len(made) == 1, "the bytes differ"
    return [
        {"work": name, "beside": beside, "who": who, "seconds": statistics.median(times)}
        for (name, beside, who), times in found.items()
    ]


def report(document: dict[str, Any]) -> Iterator[str]:
    seconds = {(o["work"], o["beside"], o["who"]): o["seconds"] for o in document["lines"]}
    head = ["", "", "alone", "beside a busy program", "longer by a factor of"]
    rows = list[list[str]]()
    for name in WORK:
        for who in PROGRAMS:
            alone, beside = (seconds[name, other, who] for other in (False, True))
            over = beside >= document["limit"]
            text = f"over {beside:.0f} s" if over else f"{beside:.1f} s"
            factor = f"{'over ' * over}{beside / alone:.1f}"
            rows.append([name, who, f"{alone:.1f} s", text, factor])
    threads, machine, rounds = (document[name] for name in ("threads", "machine", "rounds"))
    yield f"{threads} threads of {machine}, medians of {rounds}:"
    yield ""
    yield from table(head, rows)


def write_page() -> None:
    replace(PAGE, MARK, ["", *report(read_document(NAME))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0)
    parser.add_argument("--machine", default="", help="what CPU this is, for the page")
    parser.add_argument("--report", action="store_true", help="only write docs/scaling.md")
    asked = parser.parse_args()
    if not asked.report:
        lines = measure(asked.threads, asked.rounds, asked.limit)
        settings = {
            name: getattr(asked, name) for name in ("machine", "threads", "rounds", "limit")
        }
        write_document(NAME, {**settings, "lines": lines})
    write_page()


if __name__ == "__main__":
    main()
