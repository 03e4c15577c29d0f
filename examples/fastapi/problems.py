"""Errors as application/problem+json (RFC 9457), without texts of users, SQL or the DSN."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import chatdb

STATUS = {  # the first class that fits
    chatdb.NotFoundError: 404,
    chatdb.StaleError: 412,
    chatdb.ConflictError: 409,
    chatdb.InvalidInputError: 422,
    chatdb.UnavailableError: 503,
    chatdb.SchemaError: 503,
    chatdb.ConfigurationError: 503,
}
ERRORS = (HTTPException, RequestValidationError, chatdb.ChatDBError, Exception)
FIELDS = {"type": "string", "title": "string", "status": "integer", "detail": "string", "parameter": "string"}
SCHEMA = {"type": "object", "properties": {name: {"type": kind} for name, kind in FIELDS.items()}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the problems of a route in OpenAPI."""
    content = {"application/problem+json": {"schema": SCHEMA}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **more: str) -> Response:
    """Return a problem."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    return JSONResponse(body, status, headers, "application/problem+json")


def on_error(request: Request, error: Exception) -> Response:
    """Return the problem for an exception."""
    if isinstance(error, HTTPException):
        return problem(error.status_code, error.detail, error.headers)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]  # names the parameter; its value stays out
        if first["type"] == "json_invalid":
            return problem(400, "The body is not valid JSON.")
        return problem(422, first["msg"], parameter=".".join(map(str, first["loc"][1:])) or "body")
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
    if status == 409 and "idempotency-key" in request.headers:
        return problem(422, "This Idempotency-Key has been used for another request.", parameter="Idempotency-Key")
    if isinstance(error, chatdb.InvalidInputError):
        return problem(422, error.public, parameter=error.parameter)
    if isinstance(error, chatdb.ChatDBError) and status >= 500:
        logging.getLogger("uvicorn.error").error("%s: %s: %s", request.url.path, type(error).__name__, error)
    public = error.public if isinstance(error, chatdb.ChatDBError) else chatdb.ChatDBError.public
    return problem(status, public, {"Retry-After": "1"} if status == 503 else None)
