"""Errors as application/problem+json (RFC 9457). No text of a user, no SQL and no DSN gets into an answer."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import chatdb

STATUS: dict[type[chatdb.ChatDBError], int] = {  # the first class that fits
    chatdb.NotFoundError: 404,
    chatdb.StaleError: 412,
    chatdb.ConflictError: 409,
    chatdb.InvalidInputError: 422,
    chatdb.UnavailableError: 503,
    chatdb.ChatDBError: 500,
}

SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "parameter": {"type": "string"},
    },
}

log = logging.getLogger("uvicorn.error")


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the problems of a route for OpenAPI."""
    content = {"application/problem+json": {"schema": SCHEMA}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **more: str) -> JSONResponse:
    """Return an answer with a problem."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def on_chatdb_error(request: Request, error: Exception) -> Response:
    """Answer with `public`, the sentence that chatdb has for users."""
    assert isinstance(error, chatdb.ChatDBError)
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    if status >= 500:
        log.error("%s %s: %s: %s", request.method, request.url.path, type(error).__name__, error)
    if status == 409 and "idempotency-key" in request.headers:
        return problem(422, "This Idempotency-Key was already used for another request.", parameter="Idempotency-Key")
    more = {"parameter": error.parameter} if isinstance(error, chatdb.InvalidInputError) else {}
    return problem(status, error.public, {"Retry-After": "1"} if status == 503 else None, **more)


def on_invalid_request(request: Request, error: Exception) -> Response:
    """Name the parameter that is invalid, without its value."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return problem(400, "The body is not valid JSON.")
    if place == ["body"] and first["type"] != "missing" and "json" not in request.headers.get("content-type", ""):
        return problem(415, "The body must have the content type application/json.")
    if first["type"] == "extra_forbidden":  # its name is the caller's own text
        return problem(422, "The body has an unknown field.", parameter="body")
    return problem(422, first["msg"], parameter=".".join(place[1:] or place))


def on_http_error(_request: Request, error: Exception) -> Response:
    """Answer for unknown routes, wrong methods, large bodies and what the routes raise."""
    assert isinstance(error, HTTPException)
    return problem(error.status_code, error.detail, error.headers)


def on_error(_request: Request, _error: Exception) -> Response:
    """Answer for what nobody expected; the server logs it."""
    return problem(500, chatdb.ChatDBError.public)


def install(app: FastAPI) -> None:
    """Let all errors of an app be problems."""
    app.add_exception_handler(chatdb.ChatDBError, on_chatdb_error)
    app.add_exception_handler(RequestValidationError, on_invalid_request)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_error)
