"""A small HTTP client for applications that use an endpoint. Imports neither torch nor Ray."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import random
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import requests
from PIL import Image
from requests.adapters import HTTPAdapter

LONGEST_PAUSE = 3.0
"""Seconds between two attempts, whatever an endpoint says in Retry-After."""
LONGEST_WAIT = 30.0
"""Seconds of Retry-After beyond which a request is not repeated: a quota that is used up."""
VAIN = 0.9
"""Part of its deadline after which a search is not repeated; not all, as hosts' clocks differ."""
PASSING = (429, 500, 502, 503, 504)
"""Statuses that the same request may not get again."""
CONNECTIONS = 64
"""Kept open for threads that share a client; more of them open new ones."""
KEY = "BIGGAN_API_KEY"
"""Variable with the API key, where none is given."""
ClassChoice = str | int | Mapping[str, float]
T = TypeVar("T")


class EndpointError(RuntimeError):
    """The endpoint refused a request; the message names the field, the value and the limit."""

    def __init__(
        self, status: int, problem: dict[str, Any], retry_after: float | None = None
    ) -> None:
        """`problem` is the response's `application/problem+json`.

        `retry_after` is in how many seconds to ask again, where the endpoint said so.
        """
        super().__init__(status, problem, retry_after)  # By which it is pickled.
        self.status, self.problem, self.retry_after = status, problem, retry_after

    def __str__(self) -> str:
        return f"{self.status} {self.problem.get('title', '')}: {self.problem.get('detail', '')}"


@dataclass(frozen=True)
class GeneratedImage:
    """One image, and what would make it again."""

    image: Image.Image
    latent: dict[str, Any]
    """What it was made from, with its `truncation`, and its `model`."""
    model: str
    """The model version that made it: `digits@v3`."""
    truncation: float | None = None
    psnr: float | None = None
    """Of an image that was looked for: how near it is to the uploaded one, in dB."""
    file: bytes = field(default=b"", repr=False)
    """The image file, which tells where it came from."""

    @property
    def seed(self) -> int | None:
        """None of an image that no seed gives."""
        seed: int | None = self.latent.get("seed")
        return seed

    @property
    def class_name(self) -> str | None:
        """The class of the greatest weight; None of an image by a class embedding alone."""
        weights: dict[str, float] = self.latent["class"] or {}
        return max(weights, key=weights.__getitem__, default=None)


Start = GeneratedImage | Mapping[str, Any]
"""A stop of `interpolate`, or the image of `edit`: ``{"class": "cat", "seed": 3}``, or an image."""


class Client:
    """An endpoint at `url`, for example ``Client("http://127.0.0.1:8000")``.

    A request that gets no whole answer in time, that a busy endpoint turns away (429, 503), or
    during which a part of it dies (5xx) is repeated up to `retries` times with pauses of 3 s at
    most, some 90 s in all, besides what the attempts take; a seed makes the same image again. Not
    repeated are what the endpoint wants to be asked again in more than 30 s (a quota is used up),
    and a search whose attempts have taken its deadline: the last error is raised,
    `requests.ReadTimeout` if it is that no answer came.

    Threads may share a client, and it can be pickled, its key included.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        model: str | None = None,
        timeout: float = 60.0,
        retries: int = 30,
    ) -> None:
        """`key` is an API key, by default $BIGGAN_API_KEY; `model` is what requests are for.

        `timeout` is in seconds, for each attempt; a search has its deadline besides.
        """
        self.url = url.rstrip("/")
        self.model_name = model
        self.timeout, self.retries = timeout, retries
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=CONNECTIONS))
        if key := key or os.environ.get(KEY):
            self._session.auth = partial(_with_key, key)

    def generate(
        self,
        class_: ClassChoice,
        n: int = 1,
        *,
        seed: int | None = None,
        truncation: float | None = None,
        edits: Mapping[str, float] | None = None,
    ) -> list[GeneratedImage]:
        """`n` images of a class given by name (text), id (int), or as a mixture with weights.

        Image i has seed `seed + i`; without a seed a random one is drawn. `truncation` t keeps
        latents in [-t, t], for more typical and less varied images. Raises `EndpointError` if the
        endpoint refuses, `requests.ConnectionError` if it cannot be reached.
        """
        # The seed is drawn here, so that a repeated request is the same request.
        body: dict[str, Any] = {"class": class_, "n": n}
        body |= {"seed": secrets.randbelow(2**31) if seed is None else seed}
        body |= {"truncation": truncation, "edits": edits or {}, "format": "json"}
        return _images(self._post("/v1/generate", body))

    def arrays(
        self,
        class_: ClassChoice,
        n: int = 1,
        *,
        seed: int | None = None,
        truncation: float | None = None,
    ) -> np.ndarray:
        """The same images as `generate` gives, as uint8 `[n, H, W, C]`."""
        made = self.generate(class_, n, seed=seed, truncation=truncation)
        stacked = np.stack([np.asarray(item.image) for item in made])
        return stacked[..., None] if stacked.ndim == 3 else stacked

    def interpolate(
        self,
        stops: Sequence[Start],
        *,
        frames: int = 16,
        loop: bool = True,
        truncation: float | None = None,
        file_format: str = "webp",
        fps: int = 16,
        scale: int = 1,
        model: str | None = None,
    ) -> bytes:
        """The way from image to image as an animated file: webp, gif or mp4.

        A stop is ``{"class": "cat", "seed": 3}``, an image that the endpoint made, or its `latent`.
        The model version and the truncation are those of the images among the stops, if not told;
        raises `ValueError` if the images differ in these. Of stops that are no images the model is
        the client's, which may be another version by now than that which made a `latent`.
        """
        body = {"stops": [_latent(stop) for stop in stops], "frames": frames, "loop": loop}
        body |= {"format": file_format, "fps": fps, "scale": scale}
        body |= self._as_of(stops, model, truncation)
        return self._send("POST", "/v1/interpolate", json=body).content

    def edit(
        self,
        image: Start,
        edits: Mapping[str, float] | None = None,
        *,
        morph: Mapping[str, Any] | None = None,
        steps: int = 1,
        truncation: float | None = None,
        model: str | None = None,
    ) -> list[GeneratedImage]:
        """An image changed along directions, by name or index, and towards a class.

        `image`, `truncation` and `model` are as of `interpolate`: any image that the endpoint made
        is changed by the version that made it. `morph` is ``{"class": "dog", "amount": 0.5}``. With
        `steps`, that many images lead from the image to the result.
        """
        body: dict[str, Any] = {"image": _latent(image), "edits": edits or {}, "morph": morph}
        body |= {"steps": steps, "format": "json"} | self._as_of([image], model, truncation)
        return _images(self._call("POST", "/v1/edit", json=body))

    def invert(
        self,
        image: str | Path | bytes,
        class_: str | int | None = None,
        *,
        candidates: int = 1,
        deadline: float = 30.0,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[GeneratedImage]:
        """The latents whose images are nearest to one of yours (a file, or its bytes).

        `deadline` is in seconds: then the best so far is given. `progress` is told each step's
        number, PSNR and preview; it starts again where a search that broke off is repeated.
        """
        body = {"image": _base64(image), "class": class_, "candidates": candidates}
        return self._long("/v1/invert", body | {"deadline": deadline}, progress)

    def upscale(
        self,
        image: str | Path | bytes,
        class_: str | int | None = None,
        *,
        factor: int | None = None,
        candidates: int = 4,
        deadline: float = 30.0,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[GeneratedImage]:
        """Images whose small picture is yours, the best match first; otherwise as `invert`."""
        body = {"image": _base64(image), "class": class_, "candidates": candidates}
        return self._long("/v1/upscale", body | {"factor": factor, "deadline": deadline}, progress)

    def verify(self, image: str | Path | bytes) -> dict[str, Any]:
        """Whether an image was made by a model that the endpoint serves."""
        answer: dict[str, Any] = self._call("POST", "/v1/verify", json={"image": _base64(image)})
        return answer

    def classes(self) -> list[str]:
        """Class names; a class id is an index into them."""
        return [entry["name"] for entry in self._get("/v1/classes")["classes"]]

    def directions(self) -> list[dict[str, Any]]:
        """The directions in which images can be edited, the strongest first."""
        directions: list[dict[str, Any]] = self._get("/v1/directions")["directions"]
        return directions

    def models(self) -> list[dict[str, Any]]:
        """All model versions that are served, with FID, aliases, and how they fared of late."""
        models: list[dict[str, Any]] = self._call("GET", "/v1/models")["data"]
        return models

    def model(self) -> dict[str, Any]:
        """The model that requests are for."""
        wanted = self.model_name or self._get("/v1/classes")["model"]
        described: dict[str, Any] = self._call("GET", f"/v1/models/{wanted}")
        return described

    def healthy(self) -> bool:
        """Whether the endpoint is up and its model loaded, asked once: "not yet" is an answer."""
        try:
            response = requests.get(f"{self.url}/readyz", timeout=self.timeout)
        except requests.RequestException:
            return False
        return bool(response.ok)

    def _for_model(self, body: dict[str, Any]) -> dict[str, Any]:
        return body | {"model": self.model_name}

    def _as_of(
        self, starts: Sequence[Start], model: str | None, truncation: float | None
    ) -> dict[str, Any]:
        """The model and the truncation of a request, by default those of the images in it."""
        images = [start for start in starts if isinstance(start, GeneratedImage)]
        if model is None:
            model = _common("model", [image.model for image in images]) or self.model_name
        if truncation is None:
            truncation = _common("truncation", [image.truncation for image in images])
        return {"model": model, "truncation": truncation}

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._call("POST", path, json=self._for_model(body))

    def _get(self, path: str) -> Any:
        return self._call("GET", path, params={"model": self.model_name} if self.model_name else {})

    def _long(
        self, path: str, body: dict[str, Any], progress: Callable[[dict[str, Any]], None] | None
    ) -> list[GeneratedImage]:
        """Long work, whose progress is told as it goes if somebody listens."""
        deadline: float = body["deadline"]
        options: dict[str, Any] = {
            "json": self._for_model(body | {"stream": progress is not None}),
            # What a search takes beyond its deadline is what any other request may take.
            "timeout": (self.timeout, deadline + self.timeout),
            "deadline": deadline,
        }
        if progress is None:
            return _found(self._call("POST", path, **options))
        # What `progress` raises ends the search, and is not taken for an error of the endpoint.
        with closing(self._answers(_events, "POST", path, stream=True, **options)) as events:
            for name, content in events:
                if name == "progress":
                    progress(content)
        return _found(content)

    def _call(self, method: str, path: str, **options: Any) -> Any:
        return self._send(method, path, **options).json()

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        [response] = self._answers(lambda response: [response], method, path, **options)
        return response

    def _answers(
        self,
        read: Callable[[requests.Response], Iterable[T]],
        method: str,
        path: str,
        *,
        deadline: float = math.inf,
        **options: Any,
    ) -> Generator[T, None, None]:
        """What `read` finds in the answer to a request, which is repeated while that may help.

        Whatever has been found by then is found again.
        """
        options = {"timeout": self.timeout} | options
        spent = 0.0
        for attempt in itertools.count():
            began = time.monotonic()
            try:
                with self._session.request(method, self.url + path, **options) as response:
                    yield from read(_accepted(response))
                return
            except (
                EndpointError,
                requests.ConnectionError,
                requests.Timeout,
                requests.exceptions.ChunkedEncodingError,  # It broke off in its body.
            ) as error:
                spent += time.monotonic() - began
                pause = _pause(error, attempt)
                if pause is None or attempt >= self.retries or spent > VAIN * deadline:
                    raise
            time.sleep(pause)


def _with_key(key: str, request: requests.PreparedRequest) -> requests.PreparedRequest:
    """The request with an API key: as a header of the session, ~/.netrc would replace it."""
    request.headers["Authorization"] = f"Bearer {key}"
    return request


def _accepted(response: requests.Response) -> requests.Response:
    """The response; raises `EndpointError` if it tells of one."""
    if response.ok:
        return response
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):  # It comes from something in front of the endpoint.
        problem = {"title": response.reason, "detail": response.text[:500]}
    said = response.headers.get("Retry-After", "")  # Seconds; others' may be a date.
    raise EndpointError(response.status_code, problem, float(said) if said.isdecimal() else None)


def _pause(error: Exception, attempt: int) -> float | None:
    """Seconds before the next attempt; None if another would fare no better.

    More each time, for many may have been told the same; and drawn, so that clients that were
    turned away together do not return together.
    """
    said = 0.0
    if "CERTIFICATE_VERIFY_FAILED" in str(error):  # It stays what it is.
        return None
    if isinstance(error, EndpointError):
        said = error.retry_after or 0.0
        if error.status not in PASSING or said > LONGEST_WAIT:
            return None
    chance = random.uniform(0.8, 1.0)
    return min(said + attempt * chance, LONGEST_PAUSE * chance)


def _latent(start: Start) -> dict[str, Any]:
    return dict(start.latent if isinstance(start, GeneratedImage) else start)


def _common(name: str, values: Sequence[T]) -> T | None:
    """What the images of a request have in common; raises `ValueError` if they differ."""
    if len(different := list(dict.fromkeys(values))) > 1:
        listed = ", ".join(map(str, different))
        raise ValueError(f"{name}: the images differ ({listed}); say which, as {name}=...")
    return different[0] if different else None


def _image(content: str, **about: Any) -> GeneratedImage:
    file = base64.b64decode(content)
    return GeneratedImage(Image.open(io.BytesIO(file)), file=file, **about)


def _images(answer: dict[str, Any]) -> list[GeneratedImage]:
    about = {"model": answer["model"], "truncation": answer["truncation"]}
    return [_image(item["image"], latent=item["latent"], **about) for item in answer["images"]]


def _found(answer: dict[str, Any]) -> list[GeneratedImage]:
    return [
        _image(item["image"], latent=item["latent"], model=answer["model"], psnr=item["psnr"])
        for item in answer["candidates"]
    ]


def _base64(image: str | Path | bytes) -> str:
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    return base64.b64encode(content).decode("ascii")


def _events(response: requests.Response) -> Iterator[tuple[str, Any]]:
    """Server-sent events by name, with their data, up to and with the `result`.

    Raises `EndpointError` for a `problem`, or if there is no result.
    """
    name, data = "message", b""
    for line in _lines(response.iter_content(2**16)):
        if line.startswith(b"event:"):
            name = line[6:].strip().decode()
        elif line.startswith(b"data:"):
            data += line[5:]
        elif not line and data:
            content = json.loads(data)
            if name == "problem":
                raise EndpointError(int(content["status"]), content)
            yield name, content
            if name == "result":
                return
            name, data = "message", b""
    raise EndpointError(502, {"title": "Bad Gateway", "detail": "the answer broke off"})


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines that end in chunks.

    `requests.Response.iter_lines` copies what it has of a line with every chunk: half a minute for
    one of 4 MB, which a few large pictures are.
    """
    parts: list[bytes] = []
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield b"".join([*parts, end]).rstrip(b"\r")
            parts = []
        parts.append(rest)
