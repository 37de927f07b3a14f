"""The HTTP interface: routes, what they document of themselves, and how their answers look."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Depends, FastAPI, Query, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.door import SECURITY, Door, RequireKey
from serving.encoding import MEDIA_TYPES, Answer, Made
from serving.examples import EXAMPLES
from serving.ingress import TURNED_AWAY, gated
from serving.keys import NO_KEY, Keys
from serving.ledger import Reporter, Served, TurnedAway
from serving.pages import add_pages
from serving.problems import ProblemError, install
from serving.schemas import (
    MAX_UPLOAD_BODY_BYTES,
    ClassesAnswer,
    DirectionsAnswer,
    EditRequest,
    FoundAnswer,
    GenerateRequest,
    Health,
    ImagesAnswer,
    ImagesRequest,
    ImagesResponse,
    InterpolateRequest,
    InvertRequest,
    ModelEntry,
    ModelName,
    ModelsAnswer,
    Problem,
    Progress,
    Ready,
    UpscaleRequest,
    VerifyAnswer,
    VerifyRequest,
)
from serving.service import Caller, Service

logger = logging.getLogger("ray.serve")

DESCRIPTION = """\
Images of the best generators in a model store.

- **Make** images of a class or a mixture (`/v1/generate`), the way between them
  (`/v1/interpolate`), changes along directions found in the model (`/v1/edit`).
- **Start from an image**: find its latent (`/v1/invert`), or images whose small picture it is
  (`/v1/upscale`).
- **Ask** whether an image came from here (`/v1/verify`).
- Programs written for the widely used images API work with `/v1/images/generations`.

A seed makes the same image again, so that a request with one may be repeated safely. Errors are
`application/problem+json` and name the field, the value and the limit.
"""

ERRORS: dict[int, tuple[str, dict[str, Any]]] = {
    400: (
        "The body is not text that can be read.",
        {"detail": "There was an error parsing the body"},
    ),
    401: ("No key, or one that is not known.", {"detail": NO_KEY}),
    403: ("The key may not do this.", {"detail": "this API key may not use model faces"}),
    404: (
        "There is no such model.",
        {"detail": "model cats is not served here; served are: digits"},
    ),
    408: (
        "The body was too slow.",
        {"detail": "the body did not come within 60 s"},
    ),
    413: ("The body is too long.", {"detail": "the body is longer than 524288 bytes"}),
    415: (
        "The body is not JSON, or the upload no image of a kind that is read.",
        {"detail": "Content-Type = 'text/plain': must be application/json"},
    ),
    422: (
        "A field is wrong; the answer names it, its value and the limit.",
        {
            "detail": "n = 100: Input should be less than or equal to 64",
            "errors": [
                {"field": "n", "value": 100, "limit": "Input should be less than or equal to 64"}
            ],
        },
    ),
    429: (
        "More than the key's rate or quota; try again after Retry-After seconds.",
        {"detail": "this API key may have 600 images a minute: try again in 12 s"},
    ),
    500: (
        "A defect of the endpoint.",
        {"detail": "the endpoint failed; its log says why"},
    ),
    503: (
        "Too much to do at the moment; try again after Retry-After seconds.",
        {"detail": "the endpoint has too much to do"},
    ),
}


PROBLEM = {"$ref": "#/components/schemas/Problem"}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of an operation as OpenAPI documents them, an example each."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        description, said = ERRORS[status]
        example = Problem(title=HTTPStatus(status).phrase, status=status, **said).model_dump()
        described[status] = {
            "description": description,
            "content": {"application/problem+json": {"schema": PROBLEM, "example": example}},
        }
        if status in (429, 503):
            described[status]["headers"] = {
                "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}
            }
    return described


def files(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """The answer of an operation that gives files of some kinds, or JSON."""
    content: dict[str, Any] = {
        MEDIA_TYPES[kind]: {"schema": {"type": "string", "format": "binary"}} for kind in kinds
    }
    headers = {
        "X-Model": {"schema": {"type": "string"}, "description": "NAME@VERSION that made them."},
        "X-Seed": {"schema": {"type": "integer"}, "description": "Of the first image."},
    }
    return {
        200: {
            "model": ImagesAnswer,
            "description": "The images, in the format asked for.",
            "content": content,
            "headers": headers,
        }
    }


UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
EVENT = {
    "type": "object",
    "properties": {
        "event": {"enum": ["progress", "result", "problem"]},
        "data": {"type": "string", "description": "JSON"},
    },
    "required": ["event", "data"],
}
SEARCHED: dict[int | str, dict[str, Any]] = {
    200: {
        "model": FoundAnswer,
        "description": "What was found, the best first; with `stream`, server-sent events"
        " `progress` and, last, `result` (this) or `problem`.",
        "content": {"text/event-stream": {"schema": EVENT}},
    }
}
UPLOADING = ("/v1/invert", "/v1/upscale", "/v1/verify")
MAKING = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)
ASKING = (401, 403, 404, 422, 500, 503)
SECURED: dict[str, Any] = {"security": [{name: []} for name in SECURITY]}
ModelQuery = Annotated[
    ModelName | None,
    Query(description="As of a request.", examples=["digits", "digits@best", "digits@v1"]),
]


class Api:
    """The routes, over a `Service`."""

    def __init__(self, service: Service, guard: RequireKey) -> None:
        self.service = service
        self.open, self.closed = APIRouter(), APIRouter(dependencies=[Depends(guard)])
        self._post("/v1/generate", self.generate, files("png", "webp", "jpeg", "numpy", "zip"))
        self._post(
            "/v1/interpolate",
            self.interpolate,
            files("webp", "gif", "mp4", "png", "numpy", "zip"),
        )
        self._post("/v1/edit", self.edit, files("png", "webp", "jpeg", "numpy", "zip"))
        self._post("/v1/invert", self.invert, SEARCHED)
        self._post("/v1/upscale", self.upscale, SEARCHED)
        self._post("/v1/images/generations", self.images, None)
        self._post("/v1/verify", self.verify, None)
        self._get("/v1/models", self.models)
        self._get("/v1/models/{model}", self.model)
        self._get("/v1/classes", self.classes)
        self._get("/v1/directions", self.directions)
        self.open.add_api_route("/healthz", self.healthz, tags=["health"])
        self.open.add_api_route(
            "/readyz", self.readyz, tags=["health"], responses=problems(404, 500, 503)
        )
        for route in (self.healthz, self.readyz):  # As many balancers ask.
            self.open.add_api_route(
                f"/{route.__name__}", route, methods=["HEAD"], include_in_schema=False
            )
        self.closed.add_api_route(
            "/metrics",
            self.metrics,
            tags=["health"],
            responses=problems(401, 403, 500, 503),
            response_class=PlainTextResponse,
            openapi_extra=SECURED,
        )
        add_pages(self.open)

    def _post(
        self, path: str, route: Callable[..., Any], answers: dict[int | str, Any] | None
    ) -> None:
        responses = problems(*MAKING) | (answers or {})
        kind: dict[str, Any] = {"response_model": None} if answers else {}
        self.closed.add_api_route(
            path,
            route,
            methods=["POST"],
            responses=responses,
            tags=["images"],
            openapi_extra=SECURED,
            **kind,
        )

    def _get(self, path: str, route: Callable[..., Any]) -> None:
        self.closed.add_api_route(
            path, route, responses=problems(*ASKING), tags=["models"], openapi_extra=SECURED
        )

    async def generate(
        self, http: Request, request: Annotated[GenerateRequest, Body()]
    ) -> Response:
        """Images of a class, or of a mixture of classes."""
        return _file(*await self.service.generate(_caller(http), request))

    async def interpolate(
        self, http: Request, request: Annotated[InterpolateRequest, Body()]
    ) -> Response:
        """The way from image to image, as frames or as an animation that loops without a jump."""
        return _file(*await self.service.interpolate(_caller(http), request))

    async def edit(self, http: Request, request: Annotated[EditRequest, Body()]) -> Response:
        """An image changed along directions of the model, and towards a class."""
        return _file(*await self.service.edit(_caller(http), request))

    async def invert(self, http: Request, request: Annotated[InvertRequest, Body()]) -> Response:
        """The latent of an image: to be edited, and to be a stop of an interpolation."""
        return await self._search(http, request)

    async def upscale(self, http: Request, request: Annotated[UpscaleRequest, Body()]) -> Response:
        """Images of the model whose small picture is the uploaded one (PULSE).

        Several, as it may be the small picture of many. Detail is made up, not recovered.
        """
        return await self._search(http, request)

    async def _search(self, http: Request, request: InvertRequest | UpscaleRequest) -> Response:
        news = self.service.search(_caller(http), request)
        # What is wrong with the request is told as an error, not as an event.
        first = await _unless_left(http, anext(news))
        if first is None:
            return GONE
        if request.stream:
            return StreamingResponse(
                _events(news, first), media_type="text/event-stream", headers=UNBUFFERED
            )
        async with aclosing(news):
            while not isinstance(first, FoundAnswer):
                if not (first := await _unless_left(http, anext(news))):
                    return GONE
        return Response(first.model_dump_json(by_alias=True), media_type="application/json")

    async def images(
        self, http: Request, request: Annotated[ImagesRequest, Body()]
    ) -> ImagesResponse:
        """The widely used images API: the prompt is a class name, or the nearest to it."""
        return await self.service.images(_caller(http), request)

    async def verify(
        self, http: Request, request: Annotated[VerifyRequest, Body()]
    ) -> VerifyAnswer:
        """Whether an image came from the models that are served: made again, and compared."""
        return await self.service.verify(_caller(http), request)

    async def models(self, http: Request) -> ModelsAnswer:
        """The models that are served, every version of them."""
        return await self.service.models(_caller(http))

    async def model(self, http: Request, model: ModelName) -> ModelEntry:
        """One model: NAME, NAME@ALIAS or NAME@VERSION."""
        return await self.service.model(_caller(http), model)

    async def classes(self, http: Request, model: ModelQuery = None) -> ClassesAnswer:
        """The classes that can be asked for."""
        return await self.service.classes(_caller(http), model)

    async def directions(self, http: Request, model: ModelQuery = None) -> DirectionsAnswer:
        """The directions in which the model's images change most (SeFa), the strongest first."""
        return await self.service.directions(_caller(http), model)

    async def healthz(self) -> Health:
        """Whether the gateway works."""
        return Health()

    async def readyz(self) -> Ready:
        """Whether images can be made: the default model is loaded."""
        return Ready(model=await self.service.ready())

    async def metrics(self, http: Request) -> Response:
        """Requests, latency, images and batches, for Prometheus; with a key of all models."""
        return Response(await self.service.metrics(_caller(http)), media_type=PROMETHEUS)


PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class Observe:
    """Tells the ledger of every request to a documented route."""

    def __init__(self, app: ASGIApp, reporter: Reporter, gated: bool) -> None:
        """`gated` requests tell of those that the gate turned away."""
        self.app, self.reporter, self.gated = app, reporter, gated

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = None, time.perf_counter()
        noted = scope.setdefault("state", {})
        # Four digits would be many for 40 ms. Whoever reaches a gateway past HAProxy writes any.
        others = Headers(scope=scope).get(TURNED_AWAY, "0") if self.gated else "0"
        caller = Caller(None, int(others) if re.fullmatch("[0-9]{1,4}", others) else 0)
        noted["caller"] = caller

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except asyncio.CancelledError:
            status = status or 499  # The client is gone, which is nobody's error here.
            raise
        finally:
            if operation := self._operation(scope):
                self.reporter.add(
                    Served(
                        operation=operation,
                        key=key.name if (key := noted.get("key")) else "",
                        model=caller.model,
                        status=status or 500,
                        seconds=time.perf_counter() - began,
                        images=caller.images,
                    )
                )
                if caller.turned_away:
                    self.reporter.add(TurnedAway(operation, caller.turned_away))

    def _operation(self, scope: Scope) -> str | None:
        """The path of a documented route, also of one that the door kept a request from."""
        route = scope.get("route")
        if isinstance(route, APIRoute):
            return route.path if route.include_in_schema else None
        return scope["path"] if scope["path"] in EXAMPLES else None


def create_api(service: Service, reporter: Reporter, keys: Keys | None) -> FastAPI:
    """The application over a service; `reporter` is told of every request.

    Without `keys` everybody is let in.
    """
    app = FastAPI(
        title="BigGAN endpoint", description=DESCRIPTION, version="1", docs_url=None, redoc_url=None
    )
    guard = RequireKey(keys)
    api = Api(service, guard)
    app.include_router(api.closed)  # First, as routes are tried in their order.
    app.include_router(api.open)
    install(app, dict.fromkeys(UPLOADING, MAX_UPLOAD_BODY_BYTES))
    app.add_middleware(Door, guard=guard, open_to_all=("/healthz", "/readyz"))
    app.openapi = lambda: _with_problem(app)  # type: ignore[method-assign]
    app.add_middleware(Observe, reporter=reporter, gated=gated())
    return app


def _with_problem(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with examples, and the schema of errors: no route answers that."""
    document = FastAPI.openapi(app)
    for path, example in EXAMPLES.items():
        [operation] = document["paths"][path].values()
        kind = "text/plain" if isinstance(example, str) else "application/json"
        operation["responses"]["200"]["content"][kind]["example"] = example
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    document["components"]["schemas"] |= schema.pop("$defs") | {"Problem": schema}
    document["components"]["securitySchemes"] = SECURITY
    return document


T = TypeVar("T")
GONE = Response(status_code=499)
LEFT_SECONDS = 0.1
"""It is looked so often whether a client is still there."""


async def _unless_left(http: Request, work: Awaitable[T]) -> T | None:
    """What `work` gives; if the client leaves before, it is cancelled, and there is nothing."""
    task = asyncio.ensure_future(work)
    try:
        while not await http.is_disconnected():
            if (await asyncio.wait([task], timeout=LEFT_SECONDS))[0]:
                return task.result()
        return None
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _events(
    news: AsyncGenerator[Progress | FoundAnswer, None], first: Progress | FoundAnswer
) -> AsyncIterator[bytes]:
    """Server-sent events of long work; it ends when the client is gone."""
    try:
        yield _event("progress" if isinstance(first, Progress) else "result", first)
        async for item in news:
            yield _event("progress" if isinstance(item, Progress) else "result", item)
    except Exception as error:
        if not isinstance(error, ProblemError):
            logger.exception("defect in the endpoint")
            error = ProblemError(500, "the endpoint failed; its log says why")
        title = HTTPStatus(error.status).phrase
        yield _event(
            "problem",
            Problem(title=title, status=error.status, detail=error.detail, errors=error.errors),
        )
    finally:
        await news.aclose()


def _event(name: str, content: BaseModel) -> bytes:
    return f"event: {name}\ndata: {content.model_dump_json(by_alias=True)}\n\n".encode()


def _caller(http: Request) -> Caller:
    caller: Caller = http.state.caller
    caller.key = http.state.key
    return caller


def _file(made: Made, answer: Answer) -> Response:
    first = made.recipes[0]
    headers = {
        "X-Model": made.model.reference,
        "Content-Disposition": f'inline; filename="{answer.filename}"',
    }
    if first.seed is not None:
        headers["X-Seed"] = str(first.seed)
    return Response(answer.content, headers=headers, media_type=answer.media_type)
