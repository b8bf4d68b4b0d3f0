"""Reports made from the studio: `varptq evaluate` and `varptq analyze` in a process of their own.

These run the same commands as a user would, so the files are the same. A process can be stopped at
any time, as both verbs leave nothing half-written.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from varptq.artifact.load import read_config
from varptq.errors import InputError, VarptqError
from varptq.models.state_file import file_sha256
from varptq.web.catalogue import Catalogue, Entry, Kind
from varptq.web.jobs import Job
from varptq.web.loaded import LoadedModels

POLL_SECONDS = 0.2
REPORTS = "reports"


def report_folder(out: Path, entry: Entry, kind: Kind) -> Path:
    """Where the report of a model goes."""
    slug = re.sub(r"[^A-Za-z0-9._+-]+", "-", entry.key).strip("-.")
    return out / REPORTS / f"{slug}-{'evaluation' if kind is Kind.report else 'analysis'}"


def evaluate(
    entry: Entry, out: Path, count: int, catalogue: Catalogue, models: LoadedModels, job: Job
) -> None:
    """Sample `count` images with the model and its float model, and compare."""
    words = model_words(entry)
    if entry.kind is Kind.artifact and (source := float_model(entry, catalogue)) is not None:
        words += model_words(source) if source.files else []  # published ones are found by name
    words += ["--count", str(count), "--out", str(out), *models.words(entry), "--force"]
    run(job, "evaluate", *words)


def analyze(
    entry: Entry, out: Path, images: int, catalogue: Catalogue, models: LoadedModels, job: Job
) -> None:
    """Measure every tensor of the model at the bits of an artifact's config, w4a4 for a float
    model. Raises `InputError` if the artifact's float model is not found."""
    with tempfile.TemporaryDirectory() as folder:
        config, source = "w4a4", entry
        if entry.kind is Kind.artifact:
            document, _ = read_config(entry.files[0])
            source = float_model(entry, catalogue)
            if source is None:
                raise InputError(
                    f"model {entry.key}: its float model {document.name!r} is missing; put its "
                    "files in a folder of the studio"
                )
            file = Path(folder) / "config.json"
            file.write_text(json.dumps(document.varptq.config.to_dict()), encoding="utf-8")
            config = str(file)
        words = [*model_words(source), "--config", config, "--images", str(images)]
        run(job, "analyze", *words, "--out", str(out), *models.words(source), "--force")


def float_model(artifact: Entry, catalogue: Catalogue) -> Entry | None:
    """The float model that an artifact was made from: a published one by name, or files of the
    same name and content."""
    document, _ = read_config(artifact.files[0])
    for entry in catalogue.entries(Kind.float):
        if not entry.files and entry.key == document.name:
            return entry
        if entry.files and entry.files[0].stem == document.name:
            digests = dict(zip(("var", "vae"), map(file_sha256, entry.files), strict=True))
            if digests == document.sources:
                return entry
    return None


def model_words(entry: Entry) -> list[str]:
    """A model as the command line names it."""
    if entry.kind is Kind.artifact:
        return [str(entry.files[0])]
    if entry.files:
        return ["--var", str(entry.files[0]), "--vae", str(entry.files[1])]
    return [entry.key]


def run(job: Job, *words: Any) -> None:
    """Run `varptq <words>`; its last line is the job's progress, its error the job's error."""
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "varptq", *words]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
        )
        try:
            while process.poll() is None:
                job.progress(_last_line(log) or f"varptq {words[0]}", 0, 0)
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode != 0:
            line = _last_line(log).removeprefix("error: ")
            raise VarptqError(
                line or f"varptq {words[0]}: ended with exit code {process.returncode}"
            )


def _last_line(log: IO[bytes]) -> str:
    """Read without moving the place where the process writes, which it shares with us."""
    content = os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0)
    lines = content.decode(errors="replace").splitlines()
    return lines[-1].strip() if lines else ""
