"""A small HTTP client for applications that use an endpoint. Imports neither torch nor Ray."""

from __future__ import annotations

import base64
import io
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry


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
    class_name: str
    seed: int
    truncation: float | None
    model: str
    """The model version that made it: `digits@v3`."""


class Client:
    """An endpoint at `url`, for example ``Client("http://127.0.0.1:8000")``.

    Requests that get no answer in time, or that a busy endpoint turns away (429, 503), are repeated
    up to `retries` times with growing pauses; a seed makes the same image again.
    """

    def __init__(self, url: str, *, timeout: float = 60.0, retries: int = 5) -> None:
        """`timeout` is in seconds, for each attempt."""
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._session = requests.Session()
        policy = Retry(
            total=retries,
            backoff_factor=0.2,
            status_forcelist=(429, 503),
            allowed_methods=None,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=policy))

    def generate(
        self,
        class_: str | int,
        n: int = 1,
        *,
        seed: int | None = None,
        truncation: float | None = None,
    ) -> list[GeneratedImage]:
        """`n` images of a class given by name (text) or id (int).

        Image i has seed `seed + i`; without a seed a random one is drawn. `truncation` t
        keeps latents in [-t, t], for more typical and less varied images. Raises `EndpointError` if
        the endpoint refuses, `requests.ConnectionError` if it cannot be reached.
        """
        body = {
            "class": class_,
            "n": n,
            # Drawn here, so that a repeated request is the same request.
            "seed": secrets.randbelow(2**31) if seed is None else seed,
            "truncation": truncation,
            "format": "json",
        }
        answer = self._call("POST", "/v1/generate", json=body)
        return [
            GeneratedImage(
                image=Image.open(io.BytesIO(base64.b64decode(item["png"]))),
                class_name=answer["class"],
                seed=item["seed"],
                truncation=answer["truncation"],
                model=answer["model"],
            )
            for item in answer["images"]
        ]

    def arrays(
        self,
        class_: str | int,
        n: int = 1,
        *,
        seed: int | None = None,
        truncation: float | None = None,
    ) -> np.ndarray:
        """The same images as `generate` gives, as uint8 `[n, H, W, C]`."""
        made = self.generate(class_, n, seed=seed, truncation=truncation)
        stacked = np.stack([np.asarray(item.image) for item in made])
        return stacked[..., None] if stacked.ndim == 3 else stacked

    def classes(self) -> list[str]:
        """Class names; a class id is an index into them."""
        return [entry["name"] for entry in self._call("GET", "/v1/classes")["classes"]]

    def model(self) -> dict[str, Any]:
        """What is served: name, version, resolution, channels, FID and its protocol."""
        described: dict[str, Any] = self._call("GET", "/v1/model")
        return described

    def healthy(self) -> bool:
        """Whether the endpoint is up and its model loaded."""
        try:
            response = self._session.get(f"{self.url}/healthz", timeout=self.timeout)
        except requests.RequestException:
            return False
        return bool(response.ok)

    def _call(self, method: str, path: str, **options: Any) -> Any:
        response = self._session.request(method, self.url + path, timeout=self.timeout, **options)
        if response.ok:
            return response.json()
        try:
            problem = response.json()
        except ValueError:
            problem = {"title": response.reason, "detail": response.text[:500]}
        raise EndpointError(response.status_code, problem)
