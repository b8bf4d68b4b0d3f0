"""How much may be uploaded; and middleware for every request and response of the studio: the
security headers, what a browser keeps, no addresses in place of files, and uploads that cannot be
stored. Knows no page; `server.py` puts it around the app."""

from __future__ import annotations

import os
import traceback
from contextlib import suppress
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from varptq.web.surroundings import CACHE

# Of a picture, or of a file of prompts.
MAX_BYTES = 25_000_000
# Below the limit of `reading`, since 20 people may upload at the same time.
MAX_PIXELS = 25_000_000
# Some of the app's own scripts are inline, and some pictures are made in the page (blob:, data:).
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; frame-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
API = "/gradio_api"
UPLOAD = f"{API}/upload"
ASSETS, FOR_GOOD = "/assets/", "public, max-age=31536000, immutable"
ENCODINGS = b"accept-encoding"
# Through these the app would fetch any address, or accept a film of any size.
REFUSED = (
    *(f"{API}/{place}{scheme}" for place in ("file=", "file/") for scheme in ("http:", "https:")),
    *(f"{API}/proxy=", f"{API}/process_recording"),
)


class PolicyHeaders:
    """Adds the security headers to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self.app(scope, receive, send_with_policy)


class QuickFiles:
    """Lets the browser keep what the page is made of, whose names change with the content. To a
    browser on this machine (`local`) nothing is compressed: it takes longer than sending it."""

    def __init__(self, app: ASGIApp, local: bool) -> None:
        self.app, self.local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        kept = scope["path"].startswith(ASSETS)

        async def send_kept(message: Message) -> None:
            if kept and message["type"] == "http.response.start" and message["status"] == 200:
                MutableHeaders(scope=message)["Cache-Control"] = FOR_GOOD
            await send(message)

        if self.local:
            headers = [(name, value) for name, value in scope["headers"] if name != ENCODINGS]
            scope = {**scope, "headers": headers}
        await self.app(scope, receive, send_kept)


class OwnFilesOnly:
    """Refuses routes of the app that reach beyond this machine or exceed its limits."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(REFUSED):
            refused = PlainTextResponse("not in this studio", status_code=403)
            await refused(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class KeptUploads:
    """Says in one line why an upload cannot be stored, instead of the app's traceback, and removes
    the remains of incomplete uploads from `folder`."""

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app, self.folder = app, folder
        self._going_on = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != UPLOAD:
            await self.app(scope, receive, send)
            return
        held: list[Message] = []
        answer: PlainTextResponse | None = None

        async def hold(message: Message) -> None:
            held.append(message)

        self._going_on += 1
        try:
            await self.app(scope, receive, hold)
        except OSError as error:
            says = (
                f"upload: cannot be stored ({error.strerror}); free some space or set {CACHE} to "
                "another folder"
            )
            # Its frames keep the partial file open, and with it the space on disk.
            traceback.clear_frames(error.__traceback__)
            answer = PlainTextResponse(says, status_code=507)
        except (AttributeError, TypeError):  # the app's errors for a part that is not a file
            answer = PlainTextResponse("upload: holds no file; choose one", status_code=400)
        finally:
            self._going_on -= 1
            self._tidy()
        if answer is not None:
            await answer(scope, receive, send)
        for message in held if answer is None else []:
            await send(message)

    def _tidy(self) -> None:
        """Remove partial uploads: a finished one lies in a folder of its own, a partial one
        beside."""
        if self._going_on:
            return
        with suppress(OSError):
            for entry in os.scandir(self.folder):
                if entry.is_file(follow_symlinks=False):
                    os.unlink(entry)
