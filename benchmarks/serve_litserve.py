"""The model under LitServe, with its batching, for `serve.py`: pip install litserve pyzmq.

A file of its own, for LitServe starts processes that import the class.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import litserve
from serve import Bare
from starlette.responses import Response


class Api(litserve.LitAPI):  # type: ignore[misc]
    """The route of `/v1/generate`."""

    as_loaded: bool
    """Of `serve.Bare`."""

    def setup(self, device: str) -> None:  # noqa: ARG002
        """Load the model."""
        self.bare = Bare(os.environ["BIGGAN_STORAGE"], self.as_loaded)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads the types.
        """A request as it is."""
        return request

    def predict(self, x: Any) -> Any:
        """The files of a batch of requests."""
        return self.bare.files(x)

    def unbatch(self, output: Any) -> Any:
        """A file a request."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """A file as it is."""
        return Response(output, media_type="image/png")


if __name__ == "__main__":
    api = Api(max_batch_size=64, batch_timeout=0.002, api_path="/v1/generate")
    api.as_loaded = "--as-loaded" in sys.argv
    server = litserve.LitServer(api, accelerator="cpu", fast_queue=True)
    server.run(port=int(sys.argv[1]), log_level="error", generate_client_file=False)
