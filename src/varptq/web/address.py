"""The address at which a server of this package answers: whom it reaches, and under which names.

Knows neither pages nor an API.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from collections.abc import Callable
from typing import Literal

import uvicorn
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp

from varptq.errors import InputError

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def only_known_names(host: str) -> list[Middleware]:
    """If only this machine may ask, a middleware that refuses other names in `Host`, so that a
    foreign page cannot reach the server through a name that points to this machine."""
    if not is_local(host):
        return []
    return [Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_NAMES, host])]


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises `InputError` for an address that
    cannot be used."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, ValueError) as error:  # ValueError: not a valid name, such as "a..b"
        why = getattr(error, "strerror", None) or "not a valid name"
        raise InputError(f"host {host!r}: cannot be used ({why}); choose another --host") from None
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        listening.close()
        other = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise InputError(
            f"host {host}, port {port}: cannot be used ({error.strerror}); choose another {other}"
        ) from None
    return listening


def url(host: str, listening: socket.socket) -> str:
    """Without a path."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}"


def server_of(
    app: ASGIApp, grace: int, lifespan: Literal["auto", "off"] = "auto"
) -> uvicorn.Server:
    """Not started. Told to end, it accepts nothing new and gives what it answers `grace` seconds.
    lifespan: "off" for an app that does nothing when it starts and ends."""
    config = uvicorn.Config(
        app, log_level="warning", lifespan=lifespan, timeout_graceful_shutdown=grace
    )
    logging.getLogger("uvicorn.error").addFilter(_is_failure)
    return uvicorn.Server(config)


def run(server: uvicorn.Server, listening: socket.socket, end_work: Callable[[], object]) -> None:
    """Answer until SIGTERM or Ctrl-C. `end_work` is for what is under way then, at a second Ctrl-C
    or when the grace is over."""
    try:
        server.run(sockets=[listening])
    finally:
        end_work()


def _is_failure(record: logging.LogRecord) -> bool:
    """Whether an entry of the log is no traceback of what was cut off at the end: an answer, or, as
    text, the wait for the end itself."""
    kind = record.exc_info[0] if record.exc_info else None
    cut = kind is not None and issubclass(kind, asyncio.CancelledError)
    return not cut and not record.getMessage().rstrip().endswith("CancelledError")
