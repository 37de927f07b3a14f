"""What browser tests share: Chromium, and the page of an endpoint in it."""

import os
import shutil
from urllib.parse import urlsplit

import pytest
from conftest import add_imported
from local_endpoint import new_service, random_generator, served
from playwright.sync_api import sync_playwright


@pytest.fixture(scope="session")
def endpoint(storage):
    """An endpoint of one model, of random weights."""
    add_imported("grey", random_generator(0))
    with served(new_service(["grey"])) as url:
        yield url


@pytest.fixture(scope="session")
def page_url(request):
    """Where the page is: $BIGGAN_PAGE_URL, else the `endpoint` of these tests."""
    url = os.environ.get("BIGGAN_PAGE_URL") or request.getfixturevalue("endpoint")
    return url.rstrip("/")


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        assert chromium, "browser tests need chromium: apt-get install chromium"
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, page_url):
    """Opens the page with a fragment; what it may not do gathers in its `trouble`."""
    contexts = []

    def open_page(fragment="", **options):
        context = browser.new_context(
            permissions=["clipboard-read", "clipboard-write"], reduced_motion="reduce", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.trouble = watch(page, page_url)
        page.goto(f"{page_url}/#{fragment}")
        return page

    yield open_page
    for context in contexts:
        context.close()


def watch(page, page_url):
    """A list that fills with a page's errors, failed requests and ways to other origins."""
    trouble = []
    page.on("pageerror", lambda error: trouble.append(f"{error}\n{error.stack}"))

    def on_console(message):
        if message.type in ("error", "warning"):
            trouble.append(message.text)

    def on_request(request):
        if urlsplit(request.url).scheme in ("data", "blob"):
            return
        if not request.url.startswith(page_url + "/"):
            trouble.append(f"leaves the endpoint: {request.url}")

    def on_failure(request):
        if request.failure != "net::ERR_ABORTED":  # The page's own doing, for a newer request.
            trouble.append(f"{request.failure}: {request.url}")

    page.on("console", on_console)
    page.on("request", on_request)
    page.on("requestfailed", on_failure)
    return trouble


@pytest.fixture
def page(open_page):
    """The page, with its first images."""
    page = open_page()
    page.locator(".tile img").first.wait_for()
    return page
