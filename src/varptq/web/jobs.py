"""Long-running work: one job at a time per model, first come first served, in a visible queue.

    job = jobs.submit("demo", "2 images of cat", work)     work(job) runs in a thread of its own
    async for part in follow(job): ...                     what `work` emits, as it comes

Work is stopped by an exception from calls that it makes anyway (`progress`, `emit`, `check`). This
file knows neither pages nor models.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from varptq.errors import InputError

MAX_WAITING = 100
# How often a follower looks where nothing was emitted.
POLL_SECONDS = 0.1
SIGN_OF_LIFE_SECONDS = 1.0


class State(StrEnum):
    """The life of a job."""

    waiting = "waiting"
    running = "running"
    done = "done"
    failed = "failed"
    stopped = "stopped"


class StoppedError(Exception):
    """Raised inside the work of a job that was asked to stop."""


@dataclass(eq=False)
class Job:
    """One piece of work on one model. `stage`, `done`, `total` and `info` are the last progress."""

    model: str
    title: str
    work: Callable[[Job], Any]
    kind: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = State.waiting
    stage: str = ""
    done: int = 0
    total: int = 0
    info: str = ""
    started: float = 0.0
    ended: float = 0.0
    result: Any = None
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: list[tuple[int, Any]] = []
        self._emitted = 0
        self._stop = threading.Event()
        self._finished = threading.Event()
        self._listeners: list[Callable[[], object]] = []

    @property
    def finished(self) -> bool:
        return self._finished.is_set()

    @property
    def seconds(self) -> float:
        """Running time until now, or until its end."""
        return (self.ended or time.monotonic()) - self.started if self.started else 0.0

    @property
    def stopped(self) -> bool:
        return self.state is State.stopped

    @property
    def wanted(self) -> bool:
        """Whether nobody asked it to stop."""
        return not self._stop.is_set()

    def check(self) -> None:
        """Raise `StoppedError` if the job was asked to stop."""
        if self._stop.is_set():
            raise StoppedError

    def progress(self, stage: str, done: int, total: int, info: str = "") -> None:
        """A `varptq.progress.Progress` that also stops the work."""
        self.check()
        self.stage, self.done, self.total, self.info = stage, done, total, info

    def emit(self, part: Any) -> None:
        """Pass a part of the result to every follower; one that is emitted again, changed, takes
        the place of its earlier self."""
        self.check()
        with self._lock:
            self._emitted += 1
            earlier = [entry for entry in self._parts if entry[1] is not part]
            self._parts = [*earlier, (self._emitted, part)]
        self._tell()

    @contextmanager
    def heard(self, listener: Callable[[], object]) -> Iterator[None]:
        """Call `listener` after every emitted part and at the end, in the thread of the work."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def _tell(self) -> None:
        for listener in list(self._listeners):
            # Its event loop has ended.
            with suppress(RuntimeError):
                listener()

    def stop(self) -> None:
        """Ask the work to stop; a waiting job never starts."""
        self._stop.set()

    def parts(self, after: int) -> tuple[int, list[Any]]:
        """The number of the last part emitted, and the parts from behind number `after`, 0 at
        first."""
        with self._lock:
            return self._emitted, [part for number, part in self._parts if number > after]

    def run(self) -> None:
        """Do the work; its result or its exception stays in the job."""
        try:
            self.check()
            self.state, self.started = State.running, time.monotonic()
            self.result = self.work(self)
            self.state = State.done
        except StoppedError:
            self.state = State.stopped
        except BaseException as error:
            # Nobody would see an exception of this thread; the follower raises it where it can be
            # shown.
            self.error, self.state = error, State.failed
        finally:
            self.ended = time.monotonic()
            self._finished.set()
            self._tell()


class Jobs:
    """Queues by model. A model with work has one thread, which ends when its queue is empty."""

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self.max_waiting = max_waiting
        self._lock = threading.Lock()
        self._waiting: defaultdict[str, deque[Job]] = defaultdict(deque)
        self._running: dict[str, Job] = {}
        self._busy: set[str] = set()
        self._threads: dict[str, threading.Thread] = {}

    def submit(self, model: str, title: str, work: Callable[[Job], Any], *, kind: str = "") -> Job:
        """Queue `work` behind the other jobs of `model`. Raises `InputError` if too many wait."""
        job = Job(model, title, work, kind)
        with self._lock:
            if len(self._waiting[model]) >= self.max_waiting:
                raise InputError(
                    f"model {model!r}: {self.max_waiting} jobs are waiting already; try again later"
                )
            self._waiting[model].append(job)
            if model not in self._busy:
                self._busy.add(model)
                thread = threading.Thread(target=self._serve, args=(model,), daemon=True)
                self._threads[model] = thread
                thread.start()
        return job

    def ahead(self, job: Job) -> int:
        """How many jobs of the same model run before it."""
        with self._lock:
            line = list(self._waiting[job.model])
            if job not in line:
                return 0
            return line.index(job) + (job.model in self._running)

    def listed(self) -> list[Job]:
        """Every job that runs or waits, model by model in the order they run."""
        with self._lock:
            waiting = {model: list(line) for model, line in self._waiting.items()}
            running = dict(self._running)
        models = list(dict.fromkeys([*running, *waiting]))
        return [
            job
            for model in models
            for job in [*([running[model]] if model in running else []), *waiting.get(model, [])]
            if not job.finished
        ]

    def stop(self, job_id: str) -> None:
        """Stop the job of that id, if there is one; a waiting one leaves the queue at once."""
        with self._lock:
            for line in self._waiting.values():
                for job in [job for job in line if job.id == job_id]:
                    line.remove(job)
                    job.stop()
                    job.run()
            for job in self._running.values():
                if job.id == job_id:
                    job.stop()

    def end(self) -> None:
        """Stop every job, and return once none computes: a thread that is inside torch while the
        interpreter ends would abort the process."""
        for job in self.listed():
            self.stop(job.id)
        for thread in list(self._threads.values()):
            thread.join()

    def _serve(self, model: str) -> None:
        while True:
            with self._lock:
                self._running.pop(model, None)
                if not self._waiting[model]:
                    self._busy.discard(model)
                    del self._waiting[model]
                    return
                job = self._waiting[model].popleft()
                self._running[model] = job
            job.run()


async def follow(jobs: Jobs, job: Job, *, keep: bool = False) -> AsyncGenerator[Any]:
    """The parts of a job as they come, and None whenever its state or progress has changed, and at
    intervals besides, since a follower learns only between two items that its page is closed.

    Ends with the job; raises what its work raised. Unless `keep`, a follower that leaves stops the
    job, so that nothing is computed for a closed page.
    """
    seen, said, number = (), 0.0, 0
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    with ExitStack() as stack:
        stack.enter_context(job.heard(lambda: loop.call_soon_threadsafe(news.set)))
        if not keep:
            stack.callback(lambda: job.finished or jobs.stop(job.id))
        while True:
            news.clear()
            finished = job.finished
            number, parts = job.parts(number)
            for part in parts:
                yield part
            now = (job.state, jobs.ahead(job), job.stage, job.done, job.info, int(job.seconds))
            if now != seen or time.monotonic() - said >= SIGN_OF_LIFE_SECONDS:
                seen, said = now, time.monotonic()
                yield None
            if finished:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await news.wait()
    if job.error is not None:
        raise job.error
