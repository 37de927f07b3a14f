"""What a browser shows: the page for people, and the API's description. All from this machine."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from serving.problems import ProblemError

PAGE = Path(__file__).parent / "page"
SWAGGER_UI = Path(fastapi_offline.__file__).parent / "static"
FILES = {path.name: path for path in PAGE.iterdir()} | {
    name: SWAGGER_UI / name for name in ("swagger-ui.css", "swagger-ui-bundle.js")
}
# A script from elsewhere could read the API key, which the page keeps for its origin.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' blob: data:; media-src blob:; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_pages(router: APIRouter) -> None:
    """Add the routes: `/`, `/docs`, and the files of both."""
    router.add_api_route("/", index, include_in_schema=False)
    router.add_api_route("/docs", docs, include_in_schema=False)
    router.add_api_route("/page/{file}", page, include_in_schema=False)


async def index() -> Response:
    """The page, for people."""
    return await page("index.html")


async def docs() -> Response:
    """The API's description, in Swagger UI."""
    return await page("docs.html")


async def page(file: str) -> Response:
    """A file of the two."""
    if file not in FILES:
        raise ProblemError(404, f"no such page: {file[:100]}")
    return FileResponse(FILES[file], headers=HEADERS)
