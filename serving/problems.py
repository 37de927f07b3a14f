"""Errors told to clients as `application/problem+json` (RFC 9457): field, value and limit."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from itertools import islice
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from biggan.storage import StorageError
from serving.schemas import MAX_BODY_BYTES, FieldProblem, Problem

logger = logging.getLogger("ray.serve")

MAX_ERRORS = 20
"""Fields that one answer tells of."""
MAX_LIMITS = 5
"""Of a field: one for each of its types, or of what it holds."""
MAX_TEXT = 100
"""Characters that are told back of what a client sent."""
MAX_UPLOADS = 32
"""Bodies of several megabytes that a gateway reads at once."""
BODY_SECONDS = 60.0
"""In which a body has to come."""
VALUES = {"class", "edits", "z", "y"}
"""Fields whose values have parts that are no fields."""
PIECEWISE = json.JSONEncoder(ensure_ascii=False)


class ProblemError(Exception):
    """An error to be told to the client as it is."""

    def __init__(
        self,
        status: int,
        detail: str,
        errors: Sequence[FieldProblem] = (),
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.errors = status, detail, list(errors)
        self.headers = headers or {}


def problem_response(
    status: int,
    detail: str,
    errors: Sequence[FieldProblem] = (),
    headers: dict[str, str] | None = None,
) -> Response:
    """The response that tells a problem."""
    problem = Problem(
        title=HTTPStatus(status).phrase, status=status, detail=detail, errors=list(errors)
    )
    # json escapes what is not ASCII, so that text which is no valid Unicode can be told back too.
    content = json.dumps(problem.model_dump()).encode()
    return Response(content, status, headers, media_type="application/problem+json")


def install(app: FastAPI, limits: Mapping[str, int] | None = None) -> None:
    """Make every error of an application a problem response, and bound request bodies.

    `limits` are those of paths that take longer bodies than others, in bytes.
    """

    @app.exception_handler(ProblemError)
    async def on_problem(_request: Request, error: ProblemError) -> Response:
        return problem_response(error.status, error.detail, error.errors, error.headers)

    @app.exception_handler(StorageError)
    async def on_missing(_request: Request, error: StorageError) -> Response:
        logger.error("cannot be loaded: %s", error)  # It names the store: not for strangers.
        return problem_response(404, "the model is not, or no longer, whole in the store")

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if isinstance(error.body, bytes) and kind != "application/json":  # It was not read as JSON.
            return _unread("Content-Type", kind, "must be application/json")
        found = _field_problems(error.errors(), error.body)
        told = found[:MAX_ERRORS]
        detail = "; ".join(f"{e.field} = {e.value!r}: {e.limit}" for e in told)
        if more := len(found) - len(told):
            detail += f"; and {more} more"
        return problem_response(422, detail, told)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        coding = request.headers.get("Content-Encoding", "identity")
        if error.status_code == 400 and coding != "identity":
            return _unread("Content-Encoding", coding, "must be left out: send JSON as it is")
        headers = dict(error.headers or {})
        return problem_response(error.status_code, str(error.detail), headers=headers)

    @app.exception_handler(Exception)
    async def on_defect(_request: Request, error: Exception) -> Response:
        logger.exception("defect in the endpoint", exc_info=error)
        return problem_response(500, "the endpoint failed; its log says why")

    app.add_middleware(BodyLimit, limits=limits or {})


def _unread(header: str, value: str, limit: str) -> Response:
    """The response to a body that is of another kind than is read."""
    problem = FieldProblem(field=header, value=_short(value), limit=limit)
    return problem_response(415, f"{header} = {problem.value!r}: {limit}", [problem])


def _field_problems(entries: Sequence[dict[str, Any]], body: Any) -> list[FieldProblem]:
    """What is wrong, field by field; a field of several types has one entry for all of them."""
    values: dict[str, Any] = {}
    limits: dict[str, list[str]] = {}
    for entry in entries:
        if entry["type"] == "json_invalid":
            limit = f"must be JSON: {entry['ctx']['error']} at position {entry['loc'][-1]}"
            return [FieldProblem(field="body", value=None, limit=limit)]
        missing = entry["type"] == "missing"
        field = _short(_place(entry["loc"], body, missing))
        limit = "no such field; see /docs" if entry["type"] == "extra_forbidden" else entry["msg"]
        if field not in values:
            values[field], limits[field] = _presentable(None if missing else entry["input"]), []
        if limit not in limits[field] and len(limits[field]) < MAX_LIMITS:
            limits[field].append(limit)
    return [
        FieldProblem(field=field, value=value, limit=_any(limits[field]))
        for field, value in values.items()
    ]


def _place(loc: Sequence[str | int], body: Any, missing: bool) -> str:
    """The field of a mistake, as `stops.1.seed`; `loc` also tells which of its types was tried."""
    if loc[0] != "body":
        return str(loc[1])
    parts: list[str | int] = []
    for part in loc[1:]:
        inside = isinstance(part, int) and isinstance(body, list) and part < len(body)
        if not inside and not (isinstance(body, dict) and part in body):
            break
        parts.append(part)
        body = body[part]
        if part in VALUES:
            break
    if missing:
        parts.append(loc[-1])
    return ".".join(map(str, parts)) or "body"


def _any(limits: Sequence[str]) -> str:
    first, *others = limits
    return ", or ".join([first, *(f"{limit[0].lower()}{limit[1:]}" for limit in others)])


def _presentable(value: Any) -> Any:
    """A client's value, short, and such that JSON can carry it."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if not isinstance(value, str):  # As JSON, no more than is told: it may be megabytes.
        value = "".join(islice(PIECEWISE.iterencode(value), MAX_TEXT + 1))
    return _short(value)


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


class BodyLimit:
    """Refuses request bodies above a limit, by path, without reading them whole.

    None is read for ever, and of those that may be long only so many at once.
    """

    def __init__(self, app: ASGIApp, limits: Mapping[str, int]) -> None:
        """`limits` are in bytes; paths that are not in it have `MAX_BODY_BYTES`."""
        self.app, self.limits = app, limits
        self._room = MAX_UPLOADS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen, limit = 0, self.limits.get(scope["path"], MAX_BODY_BYTES)
        coming, reading = True, scope["path"] in self.limits
        if reading and not self._room:
            detail, soon = "too many images are being uploaded; try again", {"Retry-After": "1"}
            await problem_response(503, detail, headers=soon)(scope, receive, send)
            return
        self._room -= reading
        end = asyncio.get_running_loop().time() + BODY_SECONDS

        async def limited() -> Message:
            nonlocal seen, coming, reading
            try:
                async with asyncio.timeout_at(end if coming else None):
                    message = await receive()
            except TimeoutError:
                detail = f"the body did not come within {BODY_SECONDS:g} s"
                raise HTTPException(408, detail) from None
            seen += len(message.get("body", b""))
            if seen > limit:
                raise HTTPException(413, f"the body is longer than {limit} bytes")
            if not message.get("more_body"):
                self._room += reading
                coming = reading = False
            return message

        try:
            await self.app(scope, limited, send)
        finally:
            self._room += reading
