"""What every application's HTTP side shares: the form of errors, limits, health, readiness, documentation.

Errors have OpenAI's form, so that one client library understands every application:

    {"error": {"message": "…", "type": "invalid_request_error", "param": "inputs.0", "code": "string_type"}}

A client's mistake is a 4xx; a replica without a model is a 503 with Retry-After; a 500 is a bug of ours
and shows nothing of it.
"""

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from lib.errors import RequestError, StorageError, WhorlError

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

RETRY_AFTER_S = 5
# The code of a 503 that goes away by itself.
STARTING = "starting"
# The `type` of an error, where OpenAI's own is another than of a faulty request.
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Where pydantic speaks of its own matters.
PLAINER = {
    "missing": "is missing",
    "extra_forbidden": "is an unknown key",
    "model_attributes_type": "must be a JSON object, sent with content-type: application/json",
}
REQUEST_ID = re.compile(r"^[\x21-\x7e]{1,128}$")


class UnknownError(RequestError):
    """What a request names is not here."""

    http_status = 404


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class Alive(BaseModel):
    status: str = "alive"


class Ready(BaseModel):
    status: str = "ready"
    model: str
    version: int
    engine: str
    failed: str | None = None
    """Why the version that was asked for last is not the one that is served."""
    trial: str | None = None
    """How far the trial of a new version is, while there is one."""


class Readiness(Protocol):
    def ready(self) -> Ready:
        """Raises a WhorlError that says what is missing."""


def create_app(title: str, description: str, replica: Readiness) -> FastAPI:
    """An application with /healthz, /readyz, /docs and /openapi.json, to which routes are added."""
    # FastAPI's own documentation page loads its scripts from a CDN; this one brings them along.
    app: FastAPI = FastAPIOffline(
        title=title,
        description=description,
        version="1",
        redoc_url=None,
        responses={
            "4XX": {"model": ErrorResponse, "description": "The request is at fault; the reason says how."},
            503: {"model": ErrorResponse, "description": "No model yet, or too many requests; try again."},
            504: {"model": ErrorResponse, "description": "There was no answer in time."},
        },
    )
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(WhorlError, _whorl_error)
    app.add_exception_handler(Exception, _bug)

    @app.get("/healthz", tags=["health"], summary="Is the replica alive?")
    async def healthz() -> Alive:
        return Alive()

    @app.get("/readyz", tags=["health"], summary="Is a model loaded, and which?")
    async def readyz() -> Ready:
        return replica.ready()

    return app


def request_id(request: Request) -> str:
    """The request's id: the client's x-request-id, or the one that Ray Serve made.

    Ray Serve also puts it on the answer. Raises RequestError when the client's own is not fit for a log.
    """
    found = request.headers.get("x-request-id", "")
    if not REQUEST_ID.match(found):
        raise RequestError(
            "x-request-id must be 1 to 128 printable ASCII characters without spaces",
            param="x-request-id",
            code="invalid_request_id",
        )
    return found


async def of_database(what: str, call: Callable[..., T], *arguments: Any) -> T:
    """Database work, off the event loop. Raises StorageError when the database, which holds `what`, is away."""
    try:
        return await asyncio.to_thread(call, *arguments)
    except SQLAlchemyError as error:
        raise StorageError(f"the database of {what} does not answer now; try again") from error


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    if status < 500:
        kind = KINDS.get(status, "invalid_request_error")
    else:
        kind = "service_unavailable" if status == 503 else "server_error"
    headers = dict(headers or {})
    if status == 503:
        headers.setdefault("retry-after", str(RETRY_AFTER_S))
    detail = ErrorDetail(message=message, type=kind, param=param, code=code)
    return JSONResponse(ErrorResponse(error=detail).model_dump(), status, headers)


def describe(error: dict[str, Any]) -> tuple[str, str | None, str]:
    """Message, parameter and code of one of pydantic's findings in a body."""
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']}", None, "invalid_json"
    param = ".".join(str(part) for part in error["loc"] if part != "body") or None
    where = param or "the body"
    if error["type"] in PLAINER:
        return f"{where} {PLAINER[error['type']]}", param, error["type"]
    return f"{where}: {error['msg'][:1].lower()}{error['msg'][1:]}", param, error["type"]


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # Of a union each kind has its say: that a list is too long says more than that it is no text.
    found = error.errors()
    first = next((one for one in found if one["type"] == "too_long"), found[0])
    message, param, code = describe(first)
    return error_response(400, message, param=param, code=code)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"no such path: {request.url.path}; /docs lists what there is"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.method} is not allowed on {request.url.path}; use {allowed}"
    if error.status_code == 400:  # FastAPI's answer to bytes that are not UTF-8
        message, code = "the body is not valid JSON in UTF-8", "invalid_json"
    return error_response(error.status_code, message, code=code, headers=dict(error.headers or {}))


async def _whorl_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, WhorlError)
    return error_response(
        error.http_status,
        str(error),
        param=getattr(error, "param", None),
        code=getattr(error, "code", None) or ("not_ready" if error.http_status == 503 else None),
    )


async def _bug(request: Request, error: Exception) -> JSONResponse:
    found = request.headers.get("x-request-id", "unknown")
    logger.error("request %s failed", found, exc_info=error)
    return error_response(500, f"internal error; the log has it under request id {found}", code="internal")
