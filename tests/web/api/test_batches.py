"""What shares a batch, and what becomes of the others where one of its images fails."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("prometheus_client", reason="the API needs varptq[api]")

from helpers.holding import Held, held, until
from varptq.errors import InputError, NonFiniteError
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline
from varptq.models.sampling import Sampler
from varptq.web.api.batches import Batches, Failure, Order, Part
from varptq.web.api.metrics import Metrics
from varptq.web.jobs import Job, Jobs, follow

NAMES = ("ant", "bee", "cat")


@dataclass
class Room:
    """Batches of a model that waits until all orders are in line. sizes: images of each batch."""

    batches: Batches
    jobs: Jobs
    sizes: list[int]

    @classmethod
    def of(cls, size: int) -> Room:
        metrics, sizes = Metrics(), list[int]()
        metrics.drawn = lambda model, images, seconds: sizes.append(images)
        jobs = Jobs()
        return cls(Batches(jobs, size, metrics), jobs, sizes)

    def parts(self, jobs: list[Job]) -> list[list[Any]]:
        """What each job was told."""

        async def told(job: Job) -> list[Any]:
            return [part async for part in follow(self.jobs, job) if part is not None]

        async def all_told() -> list[list[Any]]:
            return await asyncio.gather(*map(told, jobs))

        return asyncio.run(all_told())


def order(pipe: Pipeline, count: int = 1, seed: int = 0, **sampling: Any) -> Order:
    settings = pipe.filled().replace(**sampling)
    return Order(pipe, pipe.prompts((list(NAMES) * count)[:count]), settings, seed)


def images(parts: list[Any]) -> torch.Tensor:
    assert all(isinstance(part, Part) for part in parts), parts
    return torch.cat([part.image for part in sorted(parts, key=lambda part: part.index)])


def alone(wish: Order) -> torch.Tensor:
    output = generate(wish.pipe, wish.prompts, seed=wish.seed, **wish.sampling.to_dict())
    assert output.images is not None
    return output.images


def submitted(room: Room, orders: list[Order], sampler: Held) -> list[Job]:
    """In line behind a first one that is being drawn."""
    first = room.batches.submit("m", orders[0])
    until(lambda: sampler.scales)
    return [first, *(room.batches.submit("m", wish) for wish in orders[1:])]


def test_what_is_drawn_alike_shares_batches_in_order_of_arrival(on_integers: Pipeline) -> None:
    pipe, sampler = held(on_integers)
    wishes = [order(pipe), order(pipe, 5, 1), order(pipe, 2, 2), order(pipe, 1, 3, cfg=4.0)]
    wishes += [order(pipe, 3, 4)]
    room = Room.of(4)
    jobs = submitted(room, wishes, sampler)
    sampler.free.set()
    parts = room.parts(jobs)
    # One; four of five; the fifth with two others and one of three; another guidance; two of three.
    assert room.sizes == [1, 4, 4, 1, 2]
    for wish, told in zip(wishes, parts, strict=True):
        assert torch.equal(images(told), alone(wish))


@dataclass
class Failing(Sampler):
    """Fails where a batch has more than `most` images, or an image of this first number."""

    inner: Sampler
    error: Exception
    most: int = 10**9

    def draw(self, logits: Any, guidance: Any, settings: Any, randoms: Any, **rest: Any) -> Any:
        if len(randoms) > self.most:
            raise self.error
        return self.inner.draw(logits, guidance, settings, randoms, **rest)


def test_a_batch_that_memory_does_not_hold_is_halved(on_integers: Pipeline) -> None:
    sampler = Failing(on_integers.sampler, MemoryError("out of memory"), most=2)
    wish, room = order(replace(on_integers, sampler=sampler), 7), Room.of(7)
    assert torch.equal(
        images(room.parts([room.batches.submit("m", wish)])[0]), alone(order(on_integers, 7))
    )
    assert max(room.sizes) == 2 and room.batches.size <= 3


def test_an_image_that_cannot_be_drawn_fails_alone(on_integers: Pipeline) -> None:
    pipe, sampler = held(on_integers)
    wishes = [order(pipe), order(pipe, 3, 1), order(pipe, 1, 2), order(pipe, 2, 3)]

    def given() -> torch.Tensor:
        raise InputError("image: cannot be encoded")

    wishes[2].given = given
    room = Room.of(16)
    jobs = submitted(room, wishes, sampler)
    sampler.free.set()
    parts = room.parts(jobs)
    (failure,) = parts[2]
    assert isinstance(failure, Failure) and "cannot be encoded" in str(failure.error)
    for place in (0, 1, 3):
        assert torch.equal(images(parts[place]), alone(wishes[place]))


def test_a_model_that_always_fails_tells_everybody(on_integers: Pipeline) -> None:
    sampler = Failing(on_integers.sampler, NonFiniteError("logits: NaN"), most=0)
    wish, room = order(replace(on_integers, sampler=sampler), 3), Room.of(2)
    parts = room.parts([room.batches.submit("m", wish)])[0]
    assert len(parts) == 3 and all(isinstance(part, Failure) for part in parts)


def test_images_that_nobody_waits_for_leave_the_line(on_integers: Pipeline) -> None:
    pipe, sampler = held(on_integers)
    room = Room.of(2)
    jobs = submitted(room, [order(pipe), order(pipe, 9, 1), order(pipe, 1, 2)], sampler)
    assert room.batches.waiting() == 10
    room.jobs.stop(jobs[1].id)
    assert room.batches.waiting() == 1
    sampler.free.set()
    assert len(room.parts([jobs[0]])[0]) == len(room.parts([jobs[2]])[0]) == 1
    assert room.sizes == [1, 1] and room.batches.waiting() == 0


def test_texts_of_many_lengths_share_a_batch(text_on_integers: Pipeline) -> None:
    texts = ("a boat", "a boat on a blue lake", "", "two red boats")
    pipe, sampler = held(text_on_integers)
    settings = pipe.filled()
    wishes = [Order(pipe, pipe.prompts([text]), settings, i) for i, text in enumerate(texts)]
    wishes[1] = replace(wishes[1], prompts=pipe.prompts([texts[1]], "rain"))
    room = Room.of(8)
    jobs = submitted(room, wishes, sampler)
    sampler.free.set()
    parts = room.parts(jobs)
    assert room.sizes == [1, 3]
    for wish, told in zip(wishes, parts, strict=True):
        assert torch.equal(images(told), alone(wish))
