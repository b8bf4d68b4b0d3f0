"""All there is to find out on a machine with a GPU, in at most eight minutes.

    python -m benchmarks.speed.gpu [--minutes 8] [--json FILE]    # what `make gpu` runs
    python -m benchmarks.speed.gpu --report                       # only the page, from the results
    python -m benchmarks.speed.gpu --dry-run [--json FILE]        # every part on the CPU, tiny

Parts, each a process of its own, so that none can take another along:

- `tests`: those of the Triton kernels, on the GPU instead of the interpreter.
- `kernels MODEL`: every Triton kernel against runtime `reference` at the shapes of the model, for
  codes of several presets (common/gpu/kernels.py).
- `images MODEL`: whole images with random weights at batch 1 and 8, variants in turn in one
  process, medians; with the memory they take (common/gpu/variants.py). A library that is not
  installed is listed with what installs it.

A part may take its share of the time that is left. What it did not reach is written as such, and
the file is whole after every step: a part that hangs is killed and keeps what it had found. A dry
run interprets the kernels, measures nothing of interest, and takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.gpu.models import MODELS
from benchmarks.common.gpu.page import NOT_REACHED, page_of
from benchmarks.common.pages import DOCS, replace
from benchmarks.common.results import RESULTS, read_document
from varptq.files import write_atomic

MODULE = "benchmarks.speed.gpu"
NAME, MARK = "gpu", "gpu"
PAGE = DOCS / "tables" / "gpu.md"
ROOT = RESULTS.parents[1]
# Shares of the time by part, in the order in which they run.
SHARES = {
    "tests": 3.0,
    "kernels var-d16": 1.5,
    "kernels var-d30": 2.0,
    "images var-d16": 4.0,
    "images var-d30": 5.0,
}
# A process needs this many seconds to begin, and gets them to end by itself.
LEAST, GRACE = 10.0, 5.0
DRY_TESTS = ("tests/runtime/cuda/test_linear.py", "-k", "pairs")
DRY_KERNELS = {"var-d16": "w8a8", "var-d30": "w4a4+groups+segment"}
Found = dict[str, Any]
Save = Callable[[], None]


class Outcomes:
    """A plugin of pytest that keeps what came of each test as soon as it is known."""

    def __init__(self, found: Found, save: Save) -> None:
        self.found, self.save = found, save
        found |= {"passed": 0, "failed": [], "skipped": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.found["failed"].append(report.nodeid)
        elif report.skipped:
            self.found["skipped"] += 1
        elif report.when == "call":
            self.found["passed"] += 1
        self.save()


def run_tests(dry: bool, found: Found, save: Save) -> None:
    import pytest  # of the development tools

    chosen = DRY_TESTS if dry else ("tests/runtime/cuda",)
    where = [str(ROOT / chosen[0]), *chosen[1:]]
    pytest.main(["-p", "no:cacheprovider", "--no-header", *where], [Outcomes(found, save)])


def check_kernels(model: str, dry: bool, found: Found, save: Save) -> None:
    # Triton must have been told where it runs before.
    from benchmarks.common.gpu import kernels
    from benchmarks.common.gpu.images import one_line
    from benchmarks.common.gpu.models import one_block

    device = "cpu" if dry else "cuda"
    one = one_block(model, dry)
    presets = (DRY_KERNELS[model],) if dry else kernels.PRESETS
    found["presets"] = {preset: {"why not": NOT_REACHED} for preset in presets}
    save()
    for preset in presets:
        rows = found["presets"][preset]
        try:
            for name, row in kernels.check(one, preset, device):
                rows[name] = row
            rows.pop("why not")
        except Exception as error:  # a kernel that a GPU refuses must not hide the other ones
            rows["why not"] = one_line(error)
        save()


def time_images(model: str, seconds: float, dry: bool, found: Found, save: Save) -> None:
    from benchmarks.common.gpu import images

    found["variants"] = {}
    device = "cpu" if dry else "cuda"
    images.measure(model, device, seconds, dry, found["variants"], save)


def run_part(name: str, seconds: float, dry: bool, path: Path) -> None:
    """In the process of a part: what it finds goes into `path` step by step."""
    found: Found = {}

    def save() -> None:
        write_atomic(path, json.dumps(found).encode())

    kind, _, model = name.partition(" ")
    if kind == "tests":
        run_tests(dry, found, save)
    elif kind == "kernels":
        check_kernels(model, dry, found, save)
    else:
        time_images(model, seconds, dry, found, save)


def part(name: str, seconds: float, dry: bool) -> Found:
    """What a part finds in a process of its own within `seconds`; `why not` says what ended it."""
    with tempfile.TemporaryDirectory() as folder:
        path, errors = Path(folder, "found.json"), Path(folder, "errors")
        end = str(time.time() + seconds)
        command = [sys.executable, "-m", MODULE, "--part", name, "--end", end]
        command += ["--json", str(path), *(["--dry-run"] if dry else [])]
        environment = os.environ | {"TRITON_INTERPRET": str(int(dry))}
        started, why = time.monotonic(), None
        with errors.open("wb") as stderr:
            # A session of its own, so that what it has started ends with it.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stderr=stderr, start_new_session=True
            )
            try:
                if process.wait(seconds + GRACE):
                    why = f"ended by itself: {_last_line(errors)}"
            except subprocess.TimeoutExpired:
                why = f"stopped after {seconds:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        found = json.loads(path.read_text()) if path.exists() else {}
    found["seconds"] = round(time.monotonic() - started, 1)
    return found | ({"why not": why} if why else {})


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "no message"


def measure(minutes: float, dry: bool, path: Path | None) -> Found:
    """Run all parts, each within its share of what is left."""
    document = {**machine(dry), "minutes": minutes}
    parts = document["parts"] = {name: {"why not": NOT_REACHED} for name in SHARES}
    end, waiting = time.monotonic() + 60 * minutes, sum(SHARES.values())
    for name, share in SHARES.items():
        allowed = (end - time.monotonic()) * share / waiting
        waiting -= share
        print(f"{name}: at most {max(allowed, 0):.0f} s", flush=True)
        if allowed > LEAST:
            parts[name] = part(name, allowed, dry)
        if path:
            write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())
    return document


def machine(dry: bool) -> Found:
    """What the numbers are of."""
    found = {"dry run": dry, "torch": torch.__version__, "device": "none"}
    if not dry:
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory, bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
    return found


def missing() -> str | None:
    """Why nothing can be measured here; None if something can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install one that was"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; run this on a machine with a GPU and its driver"
    return None


def write_page(document: Found | None = None) -> None:
    """docs/tables/gpu.md, from results/gpu.json."""
    replace(PAGE, MARK, page_of(document or read_document(NAME), tuple(SHARES), MODELS))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--json", type=Path, help="where the results go, step by step")
    parser.add_argument("--report", action="store_true", help="only write docs/tables/gpu.md")
    parser.add_argument("--dry-run", action="store_true", help="all parts on the CPU, tiny")
    parser.add_argument("--part", choices=list(SHARES), help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: expected a number above 0")
    if options.report:
        write_page()
        return
    if not options.dry_run and (why := missing()):
        parser.exit(2, f"no GPU: {why}, or look at every part with --dry-run\n")
    if options.part:
        seconds = options.end - time.time()
        run_part(options.part, seconds, options.dry_run, options.json)
        return
    kept = None if options.dry_run else RESULTS / f"{NAME}.json"
    document = measure(options.minutes, options.dry_run, options.json or kept)
    print("\n".join(page_of(document, tuple(SHARES), MODELS)))
    if options.json is None and not options.dry_run:
        write_page(document)


if __name__ == "__main__":
    main()
