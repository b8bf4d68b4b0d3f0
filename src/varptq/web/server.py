"""Start the studio: who may reach it, and how much they may send.

It answers only on this machine unless another address and a password are given; there is no link
through a third party (`share`). Every response carries a content security policy that keeps the
browser from contacting other servers.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from starlette.middleware import Middleware

from varptq.errors import InputError, OutputError
from varptq.web import app, theme
from varptq.web.address import is_local, listen, only_known_names, run, server_of, url
from varptq.web.catalogue import Catalogue
from varptq.web.jobs import Jobs
from varptq.web.limits import MAX_BYTES, KeptUploads, OwnFilesOnly, PolicyHeaders, QuickFiles
from varptq.web.loaded import LoadedModels
from varptq.web.studio import Studio
from varptq.web.surroundings import claim_cache

MIN_PASSWORD = 8


@dataclass(frozen=True)
class Options:
    """How to serve. auth: (user, password). port 0: any that is free."""

    host: str = "127.0.0.1"
    port: int = 7860
    auth: tuple[str, str] | None = None

    def check(self) -> None:
        """Raise `InputError` for an address that other machines reach, without a password."""
        if not is_local(self.host) and self.auth is None:
            raise InputError(
                f"host {self.host}: other machines can reach it; give --auth USER:PASSWORD too"
            )


def parse_auth(text: str) -> tuple[str, str]:
    """ "user:password". Raises `InputError`, without repeating the password."""
    user, colon, password = text.partition(":")
    if not (user and colon):
        raise InputError("auth: expected USER:PASSWORD")
    if len(password) < MIN_PASSWORD:
        raise InputError(
            f"auth: password of {len(password)} characters, expected at least {MIN_PASSWORD}"
        )
    return user, password


def make_studio(folders: list[Path], out: Path, models: LoadedModels | None = None) -> Studio:
    """The state of a studio that opens what is under `folders` and `out`, and writes to `out`.

    models: where and in which numbers models compute; None takes the defaults. Raises `InputError`
    for a folder that does not exist, `OutputError` if `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be made ({error.strerror}); choose another place"
        ) from None
    if not os.access(out, os.W_OK):
        raise OutputError(f"{out}: cannot be written; choose another place")
    return Studio(Catalogue([out, *folders]), models or LoadedModels(), Jobs(), out.resolve())


def web_app(studio: Studio, options: Options) -> FastAPI:
    """The studio with its limits and security headers, ready for any ASGI server.

    Raises `OutputError` if uploads cannot be stored.
    """
    limits = _middleware(options, claim_cache())
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=limits)
    blocks = app.build(studio)
    # A page for writing programs, which an environment variable of the app would enable.
    blocks.vibe_mode = False
    # Only then does the app check which files a page may name; its `launch` does the same.
    blocks.has_launched = blocks.is_running = True
    return gr.mount_gradio_app(
        outer,
        blocks,
        path="/",
        server_name=options.host,
        auth=_password_check(*options.auth) if options.auth else None,
        show_error=False,
        max_file_size=MAX_BYTES,
        enable_monitoring=False,
        mcp_server=False,
        run_history=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        theme=theme.theme(),
        css=theme.style(),
    )


def serve(studio: Studio, options: Options, announce: Callable[[str], object]) -> None:
    """Answer until Ctrl-C. `announce` gets the address once it is open.

    Raises `InputError` for an address that may not or cannot be used, `OutputError` if uploads
    cannot be stored.
    """
    options.check()
    listening = listen(options.host, options.port)
    server = server_of(web_app(studio, options), grace=1)
    announce(f"{url(options.host, listening)}/")
    run(server, listening, studio.jobs.end)


def _password_check(user: str, password: str) -> Callable[[str, str], bool]:
    """Compares user and password in constant time."""

    def check(given_user: str, given_password: str) -> bool:
        pairs = ((user, given_user), (password, given_password))
        return all([secrets.compare_digest(a.encode(), b.encode()) for a, b in pairs])

    return check


def _middleware(options: Options, uploads: Path) -> list[Middleware]:
    """The policy on every response, and what a browser may ask for."""
    return [
        Middleware(PolicyHeaders),
        Middleware(QuickFiles, local=is_local(options.host)),
        Middleware(OwnFilesOnly),
        Middleware(KeptUploads, folder=uploads),
        *only_known_names(options.host),
    ]
