"""What is not answered with images, in the shape of OpenAI's errors.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from varptq.errors import ConfigError, InputError, OutOfMemoryError, VarptqError
from varptq.settings import SettingError

BAD_REQUEST, SERVER, BUSY = "invalid_request_error", "server_error", "rate_limit_error"
CLIENT_GONE = 499
# The client of OpenAI sends again what was answered with some codes, unless this says otherwise.
NOT_AGAIN = {"x-should-retry": "false"}
CLOSE = {"connection": "close"}


class RefusalError(Exception):
    """An answer that is no image. headers: besides those of JSON."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = BAD_REQUEST,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code},
        }

    def response(self) -> Response:
        return JSONResponse(self.body, self.status, self.headers)


class ClientGoneError(Exception):
    """Whoever asked has hung up, so the answer reaches nobody."""


def refusal_of(error: Exception) -> RefusalError:
    """What a client is told of an error; of a bug of ours, not more than that there is one."""
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, HTTPException):
        return RefusalError(error.status_code, error.detail, headers=error.headers)
    if isinstance(error, OutOfMemoryError):
        return RefusalError(503, str(error), SERVER, code="out_of_memory", headers=NOT_AGAIN)
    if isinstance(error, SettingError):
        param = str(error.path[0]) if error.path else None
        return RefusalError(400, str(error), param=param, code="invalid_value")
    if isinstance(error, InputError | ConfigError):
        return RefusalError(400, str(error), code="invalid_value")
    if isinstance(error, VarptqError):
        return RefusalError(500, str(error), SERVER, headers=NOT_AGAIN)
    return RefusalError(500, "the server failed; its log says why", SERVER, headers=NOT_AGAIN)


async def refuse(_: Request, error: Exception) -> Response:
    return refusal_of(error).response()


async def nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


HANDLERS: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    ClientGoneError: nobody,
    ClientDisconnect: nobody,  # in the middle of its body
    RefusalError: refuse,
    VarptqError: refuse,
    HTTPException: refuse,
    Exception: refuse,
}
