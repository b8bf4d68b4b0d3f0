"""Start the API: who may reach it, and how it ends.

It answers only on this machine unless another address and a token are given. Told to end
(SIGTERM, Ctrl-C), it takes nothing new and finishes what it has, at most until the deadline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.middleware import Middleware

from varptq.errors import InputError
from varptq.web.address import is_local, listen, only_known_names, run, server_of, url
from varptq.web.api.defaults import BATCH_SIZE, DEADLINE, PORT, QUEUE
from varptq.web.api.gate import Gate, Limits
from varptq.web.api.metrics import Metrics
from varptq.web.api.refusals import HANDLERS
from varptq.web.api.served import Served
from varptq.web.api.service import Service

MIN_TOKEN = 16


@dataclass(frozen=True)
class Options:
    """How to serve. port 0: any that is free. token, queue, deadline: as in `Limits`."""

    host: str = "127.0.0.1"
    port: int = PORT
    token: str | None = None
    queue: int = QUEUE
    deadline: float = DEADLINE
    batch_size: int = BATCH_SIZE

    def check(self) -> None:
        """Raise `InputError` for an endless deadline, an address that other machines reach, without
        a token, and for a token that can be guessed or does not fit into a header; the token is not
        repeated."""
        if not math.isfinite(self.deadline):
            raise InputError(f"deadline {self.deadline:g}: expected a number of seconds")
        if self.token is None:
            if not is_local(self.host):
                raise InputError(
                    f"host {self.host}: other machines can reach it; give a token too "
                    "(VARPTQ_TOKEN or --token)"
                )
            return
        if len(self.token) < MIN_TOKEN or not (self.token.isascii() and self.token.isprintable()):
            raise InputError(
                f"token: {len(self.token)} characters, expected at least {MIN_TOKEN} of ASCII"
            )
        if self.token != self.token.strip():
            raise InputError("token: begins or ends with a space; leave it out")


def api(
    models: Sequence[Served], options: Options, stopping: Callable[[], bool] = lambda: False
) -> Starlette:
    """The API, ready for any ASGI server. The first model is the one of requests that name none.
    stopping: whether the server is told to end."""
    limits, metrics = Limits(options.token, options.queue, options.deadline), Metrics()
    service = Service(models, options.batch_size, limits, metrics, stopping)
    routes = service.routes()
    paths = frozenset(route.path for route in routes)
    gate = Middleware(Gate, limits, metrics, paths, stopping, service.batches.seconds_ahead)
    middleware = [*only_known_names(options.host), gate]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=HANDLERS)
    app.state.jobs = service.jobs
    return app


def serve(models: Sequence[Served], options: Options, announce: Callable[[str], object]) -> None:
    """Answer until SIGTERM or Ctrl-C. `announce` gets the address once it is open.

    Raises `InputError` for an address that may not or cannot be used.
    """
    options.check()
    listening = listen(options.host, options.port)
    app = api(models, options, lambda: server.should_exit)
    server = server_of(app, grace=math.ceil(options.deadline) + 1, lifespan="off")
    announce(f"{url(options.host, listening)}/v1")
    run(server, listening, app.state.jobs.end)
