"""The files of results: where they are, those that grow by a line per measurement, and what another
script finds.

A run that was stopped goes on by skipping the lines that are there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from varptq.files import write_atomic

RESULTS = Path(__file__).parents[1] / "results"
Line = dict[str, Any]


def found_by(script: str, *words: str, **environment: str) -> Any:
    """What another script of speed/ finds, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [sys.executable, "-m", f"benchmarks.speed.{script}", *words, "--json", str(out)]
        subprocess.run(command, check=True, cwd=RESULTS.parents[1], env=os.environ | environment)
        return json.loads(out.read_text())


def read_lines(name: str, folder: Path = RESULTS) -> list[Line]:
    """All lines of `folder`/`name`.jsonl, none where the file is not there yet."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_line(name: str, line: Line, folder: Path = RESULTS) -> None:
    """The file has the whole line or none of it, also after a kill or on a full disk."""
    path = folder / f"{name}.jsonl"
    before = path.read_bytes() if path.exists() else b""
    write_atomic(path, before + json.dumps(line).encode() + b"\n")


def read_document(name: str) -> Any:
    """results/`name`.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def write_document(name: str, document: Any) -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
