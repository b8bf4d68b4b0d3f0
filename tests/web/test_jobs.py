"""Jobs: one at a time per model, in order, stopped when nobody waits for them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from varptq.errors import InputError
from varptq.web.jobs import Job, Jobs, State, follow

PATIENCE = 20.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Gate:
    """Work that begins, waits for `open` and can be asked to stop meanwhile."""

    def __init__(self) -> None:
        self.began, self.open = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> str:
        self.began.set()
        while not self.open.wait(0.005):
            job.progress("gate", 1, 2)
        return "through"


async def parts_of(jobs: Jobs, job: Job) -> list[Any]:
    return [part async for part in follow(jobs, job) if part is not None]


def test_jobs_of_a_model_run_one_by_one_in_the_order_of_asking() -> None:
    jobs, inside, order = Jobs(), [], []

    def work(job: Job) -> None:
        inside.append(job)
        assert len(inside) == 1, "two at a time"
        time.sleep(0.01)
        inside.pop()
        order.append(job.title)

    made = [jobs.submit("m", str(i), work) for i in range(7)]
    until(lambda: all(job.finished for job in made))
    assert {job.state for job in made} == {State.done}, [job.error for job in made]
    assert order == [str(i) for i in range(7)]


def test_two_models_run_at_the_same_time() -> None:
    jobs, first, second = Jobs(), Gate(), Gate()
    made = jobs.submit("a", "", first), jobs.submit("b", "", second)
    assert first.began.wait(PATIENCE) and second.began.wait(PATIENCE)
    first.open.set()
    second.open.set()
    until(lambda: all(job.finished for job in made))
    assert [job.result for job in made] == ["through"] * 2


def test_the_queue_shows_who_runs_and_who_waits() -> None:
    jobs, gate = Jobs(), Gate()
    running = jobs.submit("m", "one", gate)
    assert gate.began.wait(PATIENCE)
    waiting = [jobs.submit("m", title, lambda job: None) for title in ("two", "three")]
    assert [job.title for job in jobs.listed()] == ["one", "two", "three"]
    assert [jobs.ahead(job) for job in (running, *waiting)] == [0, 1, 2]
    jobs.stop(waiting[0].id)
    assert waiting[0].state is State.stopped and not waiting[0].started
    assert jobs.ahead(waiting[1]) == 1
    gate.open.set()
    until(lambda: waiting[1].finished)
    until(lambda: not jobs.listed())


def test_a_running_job_stops_at_its_next_progress() -> None:
    jobs, gate = Jobs(), Gate()
    job = jobs.submit("m", "", gate)
    assert gate.began.wait(PATIENCE)
    jobs.stop(job.id)
    until(lambda: job.finished)
    assert job.state is State.stopped and job.result is None
    jobs.stop("no such id")


def test_a_failure_reaches_the_follower_and_the_next_job_runs() -> None:
    jobs = Jobs()

    def work(job: Job) -> None:
        job.emit("part")
        raise InputError("no good")

    bad = jobs.submit("m", "", work)
    good = jobs.submit("m", "", lambda job: 3)
    with pytest.raises(InputError, match="no good"):
        asyncio.run(parts_of(jobs, bad))
    assert asyncio.run(parts_of(jobs, good)) == [] and good.result == 3


def test_every_part_arrives_once_and_in_order_at_every_follower() -> None:
    jobs = Jobs()
    job = jobs.submit("m", "", lambda job: [job.emit(i) for i in range(50)])

    async def two() -> list[list[Any]]:
        return await asyncio.gather(parts_of(jobs, job), parts_of(jobs, job))

    assert asyncio.run(two()) == [list(range(50))] * 2


def test_a_part_that_changes_is_kept_once() -> None:
    job, growing, other = Job("m", "", lambda job: None), [1], [1]
    for part in (growing, other, growing):
        job.emit(part)
    number, parts = job.parts(0)
    assert [id(part) for part in parts] == [id(other), id(growing)]
    assert job.parts(number) == (number, [])


@pytest.mark.parametrize("keep", [False, True])
def test_a_job_whose_page_is_closed_stops_unless_it_is_kept(keep: bool) -> None:
    jobs, gate = Jobs(), Gate()
    job = jobs.submit("m", "", gate)

    async def leave() -> None:
        watching = follow(jobs, job, keep=keep)
        await anext(watching)
        await watching.aclose()

    asyncio.run(leave())
    if keep:
        assert not job.finished
        gate.open.set()
    until(lambda: job.finished)
    assert job.state is (State.done if keep else State.stopped)


def test_a_full_queue_refuses() -> None:
    jobs, gate = Jobs(max_waiting=2), Gate()
    made = [jobs.submit("m", "", gate)]
    assert gate.began.wait(PATIENCE)
    made += [jobs.submit("m", "", lambda job: None) for _ in range(2)]
    with pytest.raises(InputError, match="2 jobs are waiting already"):
        jobs.submit("m", "", lambda job: None)
    jobs.submit("other", "", lambda job: None)
    gate.open.set()
    until(lambda: all(job.finished for job in made))
