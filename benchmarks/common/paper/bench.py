"""Measures the rows, each from what is there already: artifact, images, numbers.

    out/MODEL/WIDTH-METHOD-DIGEST/model      the artifact
                                  samples    images of classes; of texts, one folder a suite
                                  work       finished pieces of what is under way

All processes of torchrun make the same calls and share each: batches, units, shards, edits.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import varptq
from benchmarks.common.edits import edited
from benchmarks.common.paper.instruments import Scorer
from benchmarks.common.paper.job import BOX, SETTINGS, Job, Suite
from benchmarks.common.paper.rows import CLASS, COLUMNS, FLOAT, IMAGES, TEXTS, Row
from varptq.evaluate.evaluate import Subject, evaluate, machine, versions
from varptq.evaluate.layouts import export_layout
from varptq.evaluate.networks.clip import clip_score
from varptq.evaluate.preflight import Instruments
from varptq.evaluate.sampling import SampleSet, sample_set
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import UNCONDITIONAL, balanced
from varptq.pictures import Pixels
from varptq.progress import Progress, silent
from varptq.work import Piece, Work

MODEL, SAMPLES, WORK = "model", "samples", "work"
Values = dict[str, float]


@dataclass
class Bench:
    """`measure` for one row after the other, and `release` once its line is written."""

    job: Job
    tools: Instruments
    score: Scorer
    progress: Progress = silent
    _name: str = ""
    _pipe: Pipeline | None = None

    def measure(self, row: Row) -> dict[str, Any] | None:
        """What was found of a row, as plain values; None where numbers of a suite are still to
        come. Raises `VarptqError`."""
        started = time.monotonic()
        float_pipe = self._loaded(row.model)
        kinds: dict[str, Callable[[Row, Pipeline], Values | None]] = {
            IMAGES: self._images,
            TEXTS: self._texts,
        }
        pipe = float_pipe if row.is_float else self._quantized(row, float_pipe)
        values = kinds.get(row.kind, self._edits)(row, pipe)
        if values is None:
            return None
        return {
            "values": {name: values.get(name) for name in COLUMNS[row.kind]},
            "seconds": round(time.monotonic() - started, 1),
            "processes": self.job.ranks.size,
            "sources": float_pipe.sources,
            "versions": versions(),
            "machine": machine(pipe),
        }

    def release(self, row: Row) -> None:
        """Remove what the row needed alone, once its numbers are kept. The float model's images
        stay: all rows are compared with them, also those of a later run."""
        self.job.ranks.barrier()
        if self.job.ranks.first and not self.job.keep and not row.is_float:
            shutil.rmtree(self.folder(row) / SAMPLES, ignore_errors=True)

    def _loaded(self, name: str) -> Pipeline:
        if self._pipe is None or self._name != name:
            # Two large models need not fit.
            self._pipe = None
            self._name, self._pipe = name, self.job.source.load(name)
        return self._pipe

    def folder(self, row: Row) -> Path:
        """Of what is made for a row, whose model is at hand."""
        assert self._pipe is not None
        return self.job.folder(row, self._pipe.sources)

    def _work(self, row: Row, what: str) -> Work:
        return Work(self.folder(row) / f"{WORK}-{what}", self.job.ranks)

    def _quantized(self, row: Row, pipe: Pipeline) -> Pipeline:
        """The artifact of a row, calibrated where it is not there yet."""
        job, folder = self.job, self.folder(row) / MODEL
        missing = not folder.is_dir()
        # Nobody writes before all have looked.
        job.ranks.barrier()
        if missing:
            with self._work(row, MODEL) as work:
                made = varptq.quantize(
                    pipe,
                    varptq.QuantConfig.preset(row.preset),
                    method=row.calibration_method,
                    calibration=job.calibration(row),
                    seed=job.seed,
                    progress=self.progress,
                    work=work,
                )
                if job.ranks.first:
                    varptq.save(made, folder)
                work.remove()
        elif job.ranks.first:
            # Of a run that was killed between the two.
            shutil.rmtree(self.folder(row) / f"{WORK}-{MODEL}", ignore_errors=True)
        placement = {"device": job.device, "dtype": job.dtype}
        with warnings.catch_warnings():
            # The runtime stands in the result.
            warnings.simplefilter("ignore")
            found = varptq.load(folder, runtime=row.runtime, **placement)
        found.encoder = pipe.encoder
        return found

    def _images(self, row: Row, pipe: Pipeline) -> Values:
        """Inception Score, FID, and FID to the float model's images."""
        subject = self._subject(row, pipe)
        beside = None
        if not row.is_float:
            floats = Row(row.table, row.model, FLOAT)
            beside = self._subject(floats, self._loaded(row.model))
        names = [name for name in COLUMNS[IMAGES] if beside is not None or name != "fid2fp"]
        with self._work(row, IMAGES) as work:
            work.begin(self._identity(row, subject, beside), self.progress)
            document = evaluate(
                subject,
                beside,
                instruments=self.tools,
                metrics=names,
                progress=self.progress,
                work=work,
            )
            work.remove()
        return document["metrics"]

    def _subject(self, row: Row, pipe: Pipeline) -> Subject:
        samples = self._sampled(pipe, self.folder(row) / SAMPLES, self.job.count, SETTINGS)
        return Subject(pipe, samples)

    def _sampled(self, pipe: Pipeline, folder: Path, count: int, settings: Any) -> SampleSet:
        job = self.job
        return sample_set(
            pipe,
            folder,
            count=count,
            seed=job.seed,
            settings=settings,
            batch=job.batch,
            progress=self.progress,
            ranks=job.ranks,
        )

    def _identity(self, row: Row, *subjects: Subject | None) -> dict[str, Any]:
        """What decides the pieces of a measurement."""
        sets = [one.samples for one in subjects if one is not None]
        network, reference = self.tools.network, self.tools.reference
        return {
            "row": row.key,
            "samples": [[one.fingerprint, len(one)] for one in sets],
            "settings": self.job.settings(row),
            "network": network and network.name,
            "reference": reference and str(reference.path),
            "versions": versions(),
        }

    def _edits(self, row: Row, pipe: Pipeline) -> Values:
        """Mean over the real images, each edited once."""
        job, reference = self.job, self.tools.reference
        assert reference is not None
        starts = range(0, job.edits, job.batch)
        images = _first(reference.batches(job.batch), job.edits)
        classes = balanced(len(pipe.pool()), job.edits, job.seed)

        def make(index: int) -> Piece:
            part = slice(starts[index], starts[index] + job.batch)
            total = self._edited(row, pipe, images[part], classes[part], starts[index])
            self.progress(row.name, min(part.stop, job.edits), job.edits)
            return Piece(facts={"total": total})

        self.progress(row.name, 0, job.edits)
        with self._work(row, row.kind) as work:
            work.begin(self._identity(row), self.progress)
            pieces = list(work.each([f"edits-{start:06}" for start in starts], make))
            work.remove()
        (name,) = COLUMNS[row.kind]
        return {name: sum(piece.facts["total"] for piece in pieces) / job.edits}

    def _edited(
        self, row: Row, pipe: Pipeline, images: Pixels, classes: torch.Tensor, first: int
    ) -> float:
        """The sum of the measure over a batch."""
        changes = row.kind == CLASS
        asked = classes if changes else [UNCONDITIONAL] * len(images)
        assert isinstance(SETTINGS.cfg, float)
        drawn = edited(
            pipe,
            images,
            asked,
            BOX,
            cfg=SETTINGS.cfg if changes else 0.0,
            seed=self.job.seed,
            batch=self.job.batch,
            inside=row.kind != "outpaint",
            first_index=first,
        )
        pixels = torch.from_numpy(drawn)
        if changes:
            assert self.tools.clip is not None
            texts = pipe.prompts(classes).captions()
            # The paper's number is the cosine itself.
            found = clip_score(pixels, texts, self.tools.clip) / 100
        else:
            assert self.tools.lpips is not None
            found = self.tools.lpips(torch.from_numpy(images), pixels)
        return float(found.double().sum())

    def _texts(self, row: Row, pipe: Pipeline) -> Values | None:
        """The pictures of every suite, laid out as its own scripts read them, and their numbers."""
        folders = {suite.name: self._suite(row, pipe, suite) for suite in self.job.suites}
        self.job.ranks.barrier()
        return self.score(folders)

    def _suite(self, row: Row, pipe: Pipeline, suite: Suite) -> Path:
        asked = pipe.drawing_for(suite.file.prompts)
        place = self.folder(row) / SAMPLES / suite.name
        target = self.folder(row) / suite.name
        samples = self._sampled(asked, place, suite.count, None)
        if self.job.ranks.first and not target.is_dir():
            export_layout(samples, target, suite.layout, suite.file.records)
        return target


def _first(batches: Any, count: int) -> Pixels:
    """The first `count` images."""
    found: list[Pixels] = []
    while sum(map(len, found)) < count:
        found.append(next(batches))
    return np.concatenate(found)[:count]
