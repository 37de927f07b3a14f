"""A small HTTP client for applications that use an endpoint. Imports neither torch nor Ray."""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ReadTimeoutError
from urllib3.util.retry import Retry

LONGEST_PAUSE = 3.0
"""Seconds between two attempts, whatever an endpoint says in Retry-After."""
KEY = "BIGGAN_API_KEY"
"""Variable with the API key, where none is given."""
SEARCHES = ("/v1/invert", "/v1/upscale")
ClassChoice = str | int | Mapping[str, float]


class EndpointError(RuntimeError):
    """The endpoint refused a request; the message names the field, the value and the limit."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        """`problem` is the response's `application/problem+json`."""
        self.status = status
        self.problem = problem
        super().__init__(f"{status} {problem.get('title', '')}: {problem.get('detail', '')}")


@dataclass(frozen=True)
class GeneratedImage:
    """One image, and what would make it again."""

    image: Image.Image
    latent: dict[str, Any]
    """What it was made from: a stop for `interpolate`, or the image for `edit`."""
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


class _Patience(Retry):
    def get_retry_after(self, response: Any) -> float | None:
        """What the endpoint says, and more each time, for many may have been told the same."""
        seconds = super().get_retry_after(response)
        return None if seconds is None else min(seconds + self.get_backoff_time(), LONGEST_PAUSE)


class _SearchPatience(_Patience):
    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: Any = None,
        error: Exception | None = None,
        *rest: Any,
        **options: Any,
    ) -> Self:
        """The next attempt; none after a search that was waited for in vain.

        The endpoint has spent its deadline on it, and would spend it again.
        """
        if isinstance(error, ReadTimeoutError):
            raise error
        return super().increment(method, url, response, error, *rest, **options)


class Client:
    """An endpoint at `url`, for example ``Client("http://127.0.0.1:8000")``.

    Requests that get no whole answer in time, that a busy endpoint turns away (429, 503), or during
    which a part of it dies (5xx) are repeated up to `retries` times with growing pauses; a seed
    makes the same image again. A search that gets no answer in time is not repeated: that raises
    `requests.ReadTimeout`.
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
        if key := key or os.environ.get(KEY):
            self._session.headers["Authorization"] = f"Bearer {key}"
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=_policy(_Patience, retries)))
        for path in SEARCHES:
            patience = _policy(_SearchPatience, retries)
            self._session.mount(self.url + path, HTTPAdapter(max_retries=patience))

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
        stops: Sequence[Mapping[str, Any]],
        *,
        frames: int = 16,
        loop: bool = True,
        truncation: float | None = None,
        file_format: str = "webp",
        fps: int = 16,
        scale: int = 1,
    ) -> bytes:
        """The way from image to image as an animated file: webp, gif or mp4.

        A stop is ``{"class": "cat", "seed": 3}``, or an image's `latent`.
        """
        body = {"stops": [dict(stop) for stop in stops], "frames": frames, "loop": loop}
        body |= {"truncation": truncation, "format": file_format, "fps": fps, "scale": scale}
        return self._send("POST", "/v1/interpolate", json=self._for_model(body)).content

    def edit(
        self,
        image: Mapping[str, Any],
        edits: Mapping[str, float] | None = None,
        *,
        morph: Mapping[str, Any] | None = None,
        steps: int = 1,
        truncation: float | None = None,
    ) -> list[GeneratedImage]:
        """An image changed along directions, by name or index, and towards a class.

        `image` is as a stop of `interpolate`; `morph` is ``{"class": "dog", "amount": 0.5}``. With
        `steps`, that many images lead from the image to the result.
        """
        body: dict[str, Any] = {"image": dict(image), "edits": edits or {}, "morph": morph}
        body |= {"steps": steps, "truncation": truncation, "format": "json"}
        return _images(self._post("/v1/edit", body))

    def invert(
        self,
        image: str | Path | bytes,
        class_: str | int | None = None,
        *,
        candidates: int = 1,
        deadline: float = 30.0,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[GeneratedImage]:
        """The latents whose images are nearest to one of yours (a file, or its bytes)."""
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
        """Images whose small picture is yours, the best match first."""
        body = {"image": _base64(image), "class": class_, "candidates": candidates}
        return self._long("/v1/upscale", body | {"factor": factor, "deadline": deadline}, progress)

    def verify(self, image: str | Path | bytes) -> dict[str, Any]:
        """Whether an image came from the endpoint's store."""
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

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._call("POST", path, json=self._for_model(body))

    def _get(self, path: str) -> Any:
        return self._call("GET", path, params={"model": self.model_name} if self.model_name else {})

    def _long(
        self, path: str, body: dict[str, Any], progress: Callable[[dict[str, Any]], None] | None
    ) -> list[GeneratedImage]:
        """Long work, whose progress is told as it goes if somebody listens."""
        # What a search takes beyond its deadline is what any other request may take.
        patience = {"timeout": (self.timeout, body["deadline"] + self.timeout)}
        body = self._for_model(body)
        if progress is None:
            return _found(self._call("POST", path, json=body, **patience))
        body |= {"stream": True}
        with self._send("POST", path, json=body, stream=True, **patience) as response:
            for event, content in _events(response.iter_lines()):
                if event == "result":
                    return _found(content)
                if event == "problem":
                    raise EndpointError(int(content["status"]), content)
                progress(content)
        raise EndpointError(502, {"title": "Bad Gateway", "detail": "the answer broke off"})

    def _call(self, method: str, path: str, **options: Any) -> Any:
        return self._send(method, path, **options).json()

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        options = {"timeout": self.timeout} | options
        response = self._request(method, self.url + path, **options)
        if response.ok:
            return response
        try:
            problem = response.json()
        except ValueError:
            problem = {"title": response.reason, "detail": response.text[:500]}
        raise EndpointError(response.status_code, problem)

    def _request(self, method: str, url: str, **options: Any) -> requests.Response:
        for attempt in range(self.retries):
            try:
                return self._session.request(method, url, **options)
            except requests.exceptions.ChunkedEncodingError:
                # The answer broke off in its body, which urllib3 has left to us.
                time.sleep(min(0.5 * 2**attempt, LONGEST_PAUSE))
        return self._session.request(method, url, **options)


def _policy(kind: type[_Patience], retries: int) -> _Patience:
    return kind(
        total=retries,
        backoff_factor=0.5,
        backoff_max=LONGEST_PAUSE,
        backoff_jitter=0.5,  # Clients that were turned away together do not return together.
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None,
        raise_on_status=False,
    )


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


def _events(lines: Iterator[bytes]) -> Iterator[tuple[str, Any]]:
    """Server-sent events: their names, and their data as JSON."""
    name, data = "message", b""
    for line in lines:
        if line.startswith(b"event:"):
            name = line[6:].strip().decode()
        elif line.startswith(b"data:"):
            data += line[5:]
        elif not line and data:
            yield name, json.loads(data)
            name, data = "message", b""
