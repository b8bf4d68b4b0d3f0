"""The endpoints: images and edits, whole or as a stream of previews; models, health and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from varptq import readable
from varptq.errors import InputError, VarptqError
from varptq.web.api.batches import Batches, Failure, Part
from varptq.web.api.gate import HEALTH, Limits, too_late
from varptq.web.api.metrics import Metrics
from varptq.web.api.refusals import ClientGoneError, RefusalError, refusal_of
from varptq.web.api.served import Served, Task, found
from varptq.web.api.shapes import EDIT, GENERATION, ImageRequest, common, event, usage_of
from varptq.web.jobs import Job, Jobs, follow
from varptq.web.limits import MAX_BYTES

MODELS, GENERATIONS, EDITS = "/v1/models", "/v1/images/generations", "/v1/images/edits"
METRICS = "/metrics"
# A form's fields are short, and an edit has two files.
MAX_FIELDS, MAX_FILES, MAX_FIELD_BYTES = 32, 4, 65_536
# Proxies keep what is sent until there is much of it, unless they are told.
STREAMED = {"cache-control": "no-store", "x-accel-buffering": "no"}


class Service:
    """The state of one server, and its endpoints."""

    def __init__(
        self,
        models: Sequence[Served],
        batch_size: int,
        limits: Limits,
        metrics: Metrics,
        stopping: Callable[[], bool],
    ) -> None:
        self.models = {model.name: model for model in models}
        self.limits, self.metrics, self.stopping = limits, metrics, stopping
        self.jobs = Jobs(limits.queue)
        self.batches = Batches(self.jobs, batch_size, metrics)
        self.started = int(time.time())
        metrics.gauge("images_waiting", "Images that no batch has taken.", self.batches.waiting)

    def routes(self) -> list[Route]:
        return [
            Route(GENERATIONS, self.generations, methods=["POST"]),
            Route(EDITS, self.edits, methods=["POST"]),
            Route(MODELS, self.listed),
            Route(MODELS + "/{name:path}", self.one),
            Route(HEALTH, self.health),
            Route(METRICS, self.measured),
        ]

    async def generations(self, request: Request) -> Response:
        try:
            values = await request.json()
        except (ValueError, RecursionError) as error:
            raise RefusalError(
                400, f"body: not valid JSON ({error})", code="invalid_json"
            ) from None
        asked = ImageRequest.from_dict(values)
        served = found(self.models, asked.model)
        async with served.preparing:
            task = await asyncio.to_thread(served.generation, asked)
        return await self._answer(request, served, asked, task, GENERATION)

    async def edits(self, request: Request) -> Response:
        fields, images, masks = await _form(request)
        asked = ImageRequest.from_dict(fields)
        served = found(self.models, asked.model)
        if len(images) != 1 or len(masks) > 1:
            said = f"{len(images)} images and {len(masks)} masks"
            raise InputError(f"image: {said}, expected one image and at most one mask")
        async with served.preparing:
            task = await asyncio.to_thread(served.edit, asked, images[0], *masks or [None])
        return await self._answer(request, served, asked, task, EDIT)

    async def listed(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": list(map(self._entry, self.models))})

    async def one(self, request: Request) -> Response:
        return JSONResponse(self._entry(found(self.models, request.path_params["name"]).name))

    async def health(self, _: Request) -> Response:
        if self.stopping():
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def measured(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type=self.metrics.CONTENT_TYPE)

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "varptq"}

    async def _answer(
        self, request: Request, served: Served, asked: ImageRequest, task: Task, kind: str
    ) -> Response:
        job = self.batches.submit(served.name, task.order)
        if asked.stream:
            events = self._events(self._parts(request, job, asked.n), asked, task, kind)
            return StreamingResponse(events, media_type="text/event-stream", headers=STREAMED)
        files = [""] * asked.n
        async with aclosing(self._parts(request, job, asked.n)) as parts:
            async for part in parts:
                if part is not None:
                    files[part.index] = await _encoded(asked, task, part)
        data = [{"b64_json": file} for file in files]
        said = common(asked, task.size, task.order.seed)
        usage = usage_of(task.order.prompts, task.order.pipe.scales.num_tokens)
        return JSONResponse({"created": int(time.time()), "data": data, "usage": usage, **said})

    async def _events(
        self, following: AsyncGenerator[Part | None], asked: ImageRequest, task: Task, kind: str
    ) -> AsyncIterator[bytes]:
        """Previews and images as they come, and a comment while there are none, so that nobody on
        the way takes the connection for dead. What fails now can only be told as an event."""
        order, said = task.order, common(asked, task.size, task.order.seed)
        usage = usage_of(order.prompts[:1], order.pipe.scales.num_tokens)
        try:
            async with aclosing(following) as parts:
                async for part in parts:
                    if part is None:
                        yield b": \n\n"
                        continue
                    file = {"b64_json": await _encoded(asked, task, part), **said}
                    file |= {"quality": "auto", "image_index": part.index}
                    if part.scale is None:
                        yield event(f"{kind}.completed", {**file, "usage": usage})
                    else:
                        place = sorted(order.previews).index(part.scale)
                        yield event(f"{kind}.partial_image", {**file, "partial_image_index": place})
        except ClientGoneError:
            return
        except (RefusalError, VarptqError) as error:
            yield event("error", refusal_of(error).body)
        except Exception as error:
            yield event("error", refusal_of(error).body)
            raise

    async def _parts(self, request: Request, job: Job, images: int) -> AsyncGenerator[Part | None]:
        """What is drawn for a job until all its images are there, and None now and then. Raises why
        one cannot be drawn, `RefusalError` at the deadline, and `ClientGoneError` once nobody
        waits. Leaving it stops the job."""
        async with aclosing(follow(self.jobs, job)) as parts:
            async for part in parts:
                if isinstance(part, Failure):
                    raise part.error
                if asyncio.get_running_loop().time() > request.state.deadline:
                    raise too_late(self.limits.deadline)
                # Not every server tells a stream that its client has gone.
                if part is None and await request.is_disconnected():
                    raise ClientGoneError
                yield part
                images -= part is not None and part.scale is None
                if images == 0:
                    return


async def _encoded(asked: ImageRequest, task: Task, part: Part) -> str:
    return await asyncio.to_thread(lambda: asked.encoded(task.pictured(part.image)))


async def _form(request: Request) -> tuple[dict[str, str], list[bytes], list[bytes]]:
    """Fields, images and masks of a form. Raises `InputError` for other files and large ones."""
    fields: dict[str, str] = {}
    files: dict[str, list[bytes]] = {"image": [], "mask": []}
    limits = {"max_files": MAX_FILES, "max_fields": MAX_FIELDS, "max_part_size": MAX_FIELD_BYTES}
    async with request.form(**limits) as form:
        for name, value in form.multi_items():
            # Several files of one name are called so by the client of OpenAI.
            name = name.removesuffix("[]")
            if not isinstance(value, UploadFile):
                fields[name] = value
            elif name not in files:
                raise InputError(f"file {name!r}: expected image or mask")
            elif (value.size or 0) > MAX_BYTES:
                size, most = readable.megabytes(value.size or 0), readable.megabytes(MAX_BYTES)
                raise InputError(f"{name}: {size}, expected at most {most}; make it smaller")
            else:
                files[name].append(await value.read())
    return fields, files["image"], files["mask"]
