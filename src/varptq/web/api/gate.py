"""What every request passes before it is read: token, size, room in the queue, deadline.

A request that may not come in is answered from its headers alone, so its body is never read.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from varptq import readable
from varptq.web.api.metrics import Metrics
from varptq.web.api.refusals import BUSY, CLOSE, NOT_AGAIN, SERVER, RefusalError
from varptq.web.limits import MAX_BYTES

HEALTH, OTHER = "/health", "other"
# An image, a mask of the same size, and what stands around them.
MAX_BODY = 2 * MAX_BYTES + 1_000_000
# What a client is told to wait, in seconds.
SHORTEST, LONGEST = 1, 60


@dataclass(frozen=True)
class Limits:
    """token: what every request must bring, None for nothing. queue: requests that may be under way
    at a time. deadline: seconds from the first byte of a request to its last image."""

    token: str | None
    queue: int
    deadline: float


class Gate:
    """Middleware that holds `Limits`. paths: those that are counted by name; stopping: whether the
    server is told to end; ahead: seconds of work that wait."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        paths: frozenset[str],
        stopping: Callable[[], bool],
        ahead: Callable[[], float],
    ) -> None:
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths
        self.stopping, self.ahead = stopping, ahead
        self.under_way = 0
        metrics.gauge("requests_under_way", "Requests read, waiting or drawn.", self._under_way)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        passage = _Passage(receive, send)
        started = time.monotonic()
        try:
            self._check(scope)
            await self._through(scope, passage)
        except RefusalError as refused:
            await refused.response()(scope, receive, passage.send)
        except asyncio.CancelledError:
            # The server ends at once. An answer that has begun remains unfinished.
            if not passage.status:
                await _stopped().response()(scope, receive, passage.send)
        except Exception:
            passage.status = 500
            raise
        finally:
            path = scope["path"] if scope["path"] in self.paths else OTHER
            self.metrics.answered(path, passage.status, time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        """Raise `RefusalError` for a request that may not come in."""
        headers = Headers(scope=scope)
        if scope["path"] == HEALTH:
            return
        if self.limits.token is not None and not _is_allowed(headers, self.limits.token):
            says = "token: missing or wrong; send it as Authorization: Bearer TOKEN"
            challenge = {"www-authenticate": "Bearer"}
            raise RefusalError(401, says, code="invalid_api_key", headers=challenge)
        if scope["method"] != "POST":
            return
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY:
            raise _too_large(int(length))
        if self.stopping():
            says = "the server is about to stop; ask again soon"
            raise RefusalError(503, says, SERVER, code="stopping", headers=self._again())
        if self.under_way >= self.limits.queue:
            says = f"queue: {self.under_way} requests are under way; ask again later"
            raise RefusalError(429, says, BUSY, code="queue_full", headers=self._again())

    async def _through(self, scope: Scope, passage: _Passage) -> None:
        if scope["method"] != "POST":
            await self.app(scope, passage.receive, passage.send)
            return
        deadline = asyncio.get_running_loop().time() + self.limits.deadline
        scope["state"] = {**scope.get("state", {}), "deadline": deadline}
        self.under_way += 1
        try:
            async with asyncio.timeout_at(deadline) as passage.limit:
                await self.app(scope, passage.receive, passage.send)
        except TimeoutError:
            # An answer that has begun in this very moment remains unfinished.
            if not passage.status:
                raise too_late(self.limits.deadline) from None
        finally:
            passage.limit = None
            self.under_way -= 1

    def _again(self) -> dict[str, str]:
        """When to send the request again."""
        seconds = min(max(math.ceil(self.ahead()), SHORTEST), LONGEST)
        return {"retry-after": str(seconds)}

    def _under_way(self) -> float:
        return self.under_way


class _Passage:
    """The two ways of one request: what comes in is counted, and once an answer has begun, which
    cannot be replaced any more, the deadline is left to the one who sends it."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.received = self.status = 0
        self.limit: asyncio.Timeout | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        if self.received > MAX_BODY:
            raise _too_large(self.received)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.limit is not None and not self.limit.expired():
                self.limit.reschedule(None)
        await self._send(message)


def _stopped() -> RefusalError:
    return RefusalError(503, "the server was stopped; ask again soon", SERVER, code="stopping")


def too_late(seconds: float) -> RefusalError:
    says = f"deadline: not finished within {seconds:g} seconds; ask for less, or later"
    return RefusalError(504, says, SERVER, code="deadline_exceeded", headers=NOT_AGAIN)


def _too_large(size: int) -> RefusalError:
    says = (
        f"body: {readable.megabytes(size)}, expected at most {readable.megabytes(MAX_BODY)}; "
        "make the images smaller"
    )
    return RefusalError(413, says, code="body_too_large", headers={**NOT_AGAIN, **CLOSE})


def _is_allowed(headers: Headers, token: str) -> bool:
    """Compares in constant time."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    same = secrets.compare_digest(given.strip().encode(), token.encode())
    return same and kind.lower() == "bearer"
