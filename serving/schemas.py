"""What the endpoint takes and gives, as JSON. The OpenAPI document at /docs is made from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints

MAX_IMAGES = 64
"""Images a request."""
MAX_BODY_BYTES = 64 * 1024
MAX_SEED = 2**53 - 1
"""Largest integer that every JSON reader keeps exact."""

ImageFormat = Literal["png", "webp", "jpeg", "numpy", "json"]


class GenerateRequest(BaseModel):
    """Images of one class."""

    model_config = ConfigDict(
        extra="forbid",
        populate_by_name=True,
        json_schema_extra={"examples": [{"class": "3", "n": 4, "seed": 7, "truncation": 0.7}]},
    )

    class_: (
        Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200)]
        | Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
    ) = Field(alias="class", description="Class by name (text) or id (number); see /v1/classes.")
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] = Field(
        1, description="Images. Image i has seed `seed + i`."
    )
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="The same seed gives the same image. By default a random one."
    )
    truncation: Annotated[float, Field(strict=True, gt=0, le=100, allow_inf_nan=False)] | None = (
        Field(
            None,
            description="Keeps latents in [-t, t]: smaller is more typical and less varied. By"
            " default they are not truncated.",
        )
    )
    format: ImageFormat = Field(
        "png",
        description="png, webp, jpeg: one picture, several images as a grid. numpy: an .npy file,"
        " uint8 [n, H, W, C]. json: every image as base64 PNG, with its seed.",
    )


class GeneratedItem(BaseModel):
    """One image of a JSON answer."""

    seed: int
    png: str = Field(description="PNG file in base64.")


class GenerateResponse(BaseModel):
    """The answer to a request with format json."""

    model_config = ConfigDict(populate_by_name=True)

    model: str = Field(description="NAME@VERSION that made the images.")
    class_: str = Field(alias="class")
    class_id: int
    truncation: float | None
    images: list[GeneratedItem]


class ClassEntry(BaseModel):
    """A class that can be asked for."""

    id: int
    name: str


class ClassesResponse(BaseModel):
    """All classes of the model that is served."""

    model: str
    classes: list[ClassEntry]


class ModelResponse(BaseModel):
    """The model that is served."""

    model: str = Field(description="NAME@VERSION.")
    resolution: int
    channels: int
    n_classes: int
    fid: float | None = Field(description="None until it is measured, as of imported weights.")
    fid_protocol: dict[str, Any] = Field(description="What the FID was measured with.")
    dataset: str | None
    run: str | None = Field(description="None of imported weights.")
    kimg: float | None
    created: str
    licence: str


class HealthResponse(BaseModel):
    """The endpoint works."""

    status: Literal["ok"] = "ok"
    model: str


class FieldProblem(BaseModel):
    """One thing wrong with a request."""

    field: str
    value: Any
    limit: str


class Problem(BaseModel):
    """An error, as RFC 9457 has it (`application/problem+json`)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] = []
