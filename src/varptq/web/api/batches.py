"""Images of several requests drawn together.

    job = batches.submit("demo", order)
    async for part in follow(jobs, job): ...     a `Part` or a `Failure`

Every request is a job of the model's queue (web/jobs.py). A job that runs draws batches until its
own images are done; each takes the next images of the requests in line, in order of arrival, that
are drawn in the same way. A job whose images others have drawn finds nothing left to do. So a
request joins where a batch begins, and image i of it draws from (seed, i) wherever it stands.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, reduce

import torch
from torch import Tensor

from varptq.errors import OutOfMemoryError
from varptq.models.generate import ScaleEvent, decoded, generate
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import Prompts
from varptq.models.sampling import SamplingSettings
from varptq.web.api.metrics import Metrics
from varptq.web.jobs import Job, Jobs, StoppedError

# How much of the newest batch goes into the pace.
NEWEST = 0.3


@dataclass(eq=False)
class Order:
    """What one request asks a model for, an image per prompt. pipe: the model at the size that is
    asked for. given: tokens of the kept part of an edit, as `PreparedEdit.given`. previews: scales
    after which the images are to be seen. `taken`: how many images batches have taken."""

    pipe: Pipeline
    prompts: Prompts
    sampling: SamplingSettings
    seed: int
    given: Callable[[], Tensor] | None = None
    previews: frozenset[int] = frozenset()
    taken: int = 0
    _given: Tensor | None = field(default=None, init=False)

    @property
    def left(self) -> int:
        return len(self.prompts) - self.taken

    def joins(self, other: Order) -> bool:
        """Whether one batch can have images of both, which are of one model."""
        return self.pipe.scales == other.pipe.scales and self.sampling == other.sampling

    def forced(self) -> Tensor:
        """What is given of one image: (1, L) or (1, L, draws) int64, -1 for what is drawn."""
        if self.given is None:
            shape = self.pipe.alphabet.shape(1, self.pipe.scales.num_tokens)
            return torch.full(shape, -1, dtype=torch.int64, device=self.pipe.device)
        if self._given is None:
            self._given = self.given()
        return self._given


@dataclass(frozen=True)
class Part:
    """Image `index` of a request, (1, 3, H, W) float32 in [0, 1]: finished, or as it is after
    `scale`."""

    index: int
    image: Tensor
    scale: int | None = None


@dataclass(frozen=True)
class Failure:
    """Why an image of a request cannot be drawn."""

    error: Exception


@dataclass(frozen=True)
class Row:
    """One image of a batch."""

    job: Job
    order: Order
    index: int

    def tell(self, part: Part | Failure) -> None:
        """Pass it to whoever follows the job."""
        with suppress(StoppedError):
            self.job.emit(part)


class Batches:
    """Batches of at most `size` images; a batch that memory does not hold makes later ones
    smaller."""

    def __init__(self, jobs: Jobs, size: int, metrics: Metrics) -> None:
        self.size = size
        self._jobs, self._metrics = jobs, metrics
        self._lock = threading.Lock()
        self._lines: defaultdict[str, list[tuple[Job, Order]]] = defaultdict(list)
        self._pace = 0.0

    def submit(self, model: str, order: Order) -> Job:
        """Queue an order. Raises `InputError` if too many wait."""
        with self._lock:
            job = self._jobs.submit(model, f"{len(order.prompts)} images", self._work)
            self._lines[model].append((job, order))
        return job

    def waiting(self) -> int:
        """Images that no batch has taken yet."""
        with self._lock:
            lines = list(self._lines.values())
            return sum(order.left for line in lines for job, order in line if job.wanted)

    def seconds_ahead(self) -> float:
        """About how long the images that wait take, by the pace of the last batches."""
        return self.waiting() * self._pace

    def _work(self, job: Job) -> None:
        while rows := self._take(job):
            self._draw(rows)

    def _take(self, job: Job) -> list[Row]:
        """The next batch while `job` has images left, else none."""
        rows: list[Row] = []
        with self._lock:
            line = [(j, order) for j, order in self._lines[job.model] if j.wanted and order.left]
            self._lines[job.model] = line
            if not line or line[0][0] is not job:
                return rows
            first = line[0][1]
            for other, order in line:
                count = min(order.left, self.size - len(rows)) if order.joins(first) else 0
                rows += [Row(other, order, order.taken + i) for i in range(count)]
                order.taken += count
        return rows

    def _draw(self, rows: Sequence[Row]) -> None:
        """Draw a batch, or its halves if that fails, so that no request fails for its
        neighbours."""
        half = len(rows) // 2
        try:
            self._generate(rows)
        except StoppedError:
            return
        except Exception as error:
            if isinstance(error, OutOfMemoryError):
                self.size = max(1, half)
            if half == 0:
                rows[0].tell(Failure(error))
                return
        else:
            return
        # Outside of the handler, where the failed call's tensors are gone.
        self._draw(rows[:half])
        self._draw(rows[half:])

    def _generate(self, rows: Sequence[Row]) -> None:
        """Raises what `generate` does, and `StoppedError` once nobody waits for any of the rows."""
        order, started = rows[0].order, time.monotonic()
        edits = any(row.order.given is not None for row in rows)
        output = generate(
            order.pipe,
            reduce(lambda some, more: some.joined(more), map(_prompt_of, rows)),
            streams=[(row.order.seed, row.index) for row in rows],
            forced=torch.cat([row.order.forced() for row in rows]) if edits else None,
            batch_size=len(rows),
            on_scale=partial(self._after_scale, order.pipe, rows),
            **order.sampling.to_dict(),
        )
        assert output.images is not None
        spent = time.monotonic() - started
        pace = spent / len(rows)
        self._pace += (NEWEST if self._pace else 1.0) * (pace - self._pace)
        self._metrics.drawn(rows[0].job.model, len(rows), spent)
        for row, image in zip(rows, output.images.split(1), strict=True):
            row.tell(Part(row.index, image))

    def _after_scale(self, pipe: Pipeline, rows: Sequence[Row], event: ScaleEvent) -> None:
        if not any(row.job.wanted for row in rows):
            raise StoppedError
        for place, row in enumerate(rows):
            if event.scale in row.order.previews and row.job.wanted:
                image = decoded(pipe, event.f_hat[place : place + 1])
                row.tell(Part(row.index, image, event.scale))


def _prompt_of(row: Row) -> Prompts:
    return row.order.prompts[slice(row.index, row.index + 1)]
