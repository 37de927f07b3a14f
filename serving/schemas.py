"""What the endpoint takes and gives, as JSON. The OpenAPI document at /docs is made from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints, model_validator

MAX_IMAGES = 64
"""Images a request."""
MAX_STOPS = 16
MAX_FRAMES = 256
"""Frames of an animation in all."""
MAX_CANDIDATES = 8
MAX_BODY_BYTES = 512 * 1024
"""Of requests without an upload."""
MAX_UPLOAD_BYTES = 8 * 1024 * 1024
"""Of an uploaded image file."""
MAX_UPLOAD_BODY_BYTES = MAX_UPLOAD_BYTES * 4 // 3 + MAX_BODY_BYTES
"""Of a request with one, in base64."""
MAX_FIELDS = 64
"""Of an object: several times what any has. Each unknown one would be an error of its own."""
MAX_LATENT = 4096
MAX_MIXED = 256
"""Classes of a mixture: as many as two of a way's stops, or more, may have between them."""
MAX_EDITS = 256
MAX_SEED = 2**53 - 1
"""Largest integer that every JSON reader keeps exact."""
MAX_SECONDS = 120
"""Longest deadline of long work."""

MAX_STRENGTH = 1e4
"""Of an edit, and of what is given in the place of a class."""
MAX_COORDINATE = 1e6
"""Of a latent, such as edits may have moved it to."""

Finite = Annotated[
    float, Field(strict=True, ge=-MAX_STRENGTH, le=MAX_STRENGTH, allow_inf_nan=False)
]
Coordinate = Annotated[
    float, Field(strict=True, ge=-MAX_COORDINATE, le=MAX_COORDINATE, allow_inf_nan=False)
]
Weight = Annotated[float, Field(strict=True, gt=0, le=1e4, allow_inf_nan=False)]
ClassName = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200)]
ClassId = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[StrictInt, Field(ge=0, le=MAX_SEED)]
Truncation = Annotated[float, Field(strict=True, gt=0, le=100, allow_inf_nan=False)]
ModelName = Annotated[
    str,
    StringConstraints(
        strict=True,
        max_length=200,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*)?$",
    ),
]
# What may hold thousands is looked at no further than to the first that is wrong.
Latent = Annotated[tuple[Coordinate, ...], Field(max_length=MAX_LATENT, fail_fast=True)]
Embedding = Annotated[tuple[Finite, ...], Field(max_length=MAX_LATENT, fail_fast=True)]
Mixture = Annotated[
    dict[ClassName, Weight], Field(min_length=1, max_length=MAX_MIXED, fail_fast=True)
]
Edits = Annotated[dict[ClassName, Finite], Field(max_length=MAX_EDITS, fail_fast=True)]

PictureFormat = Literal["png", "webp", "jpeg"]
ImageFormat = Literal["png", "webp", "jpeg", "numpy", "json"]
Layout = Literal["grid", "list", "zip"]
MotionFormat = Literal["webp", "gif", "mp4", "png", "numpy", "zip", "json"]


class Strict(BaseModel):
    """What clients send: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > MAX_FIELDS:
            raise ValueError(f"{len(given):,} fields; see /docs for those that there are")
        return given


class Request(Strict):
    """What requests have in common."""

    model: ModelName | None = Field(
        None,
        description="NAME, NAME@ALIAS or NAME@VERSION; see /v1/models. By default the endpoint's"
        " first, and of a NAME alone what it serves for that: `best`, or by the canary's share.",
    )


class Sampled(Request):
    """A request whose latents may be truncated."""

    truncation: Truncation | None = Field(
        None,
        description="Keeps latents in [-t, t]: smaller is more typical and less varied. By"
        " default they are not truncated.",
    )


CLASS_FIELD: Any = Field(
    alias="class",
    description="Class by name (text) or id (number), or a mixture of them with weights"
    ' (`{"cat": 0.5, "dog": 0.5}`); see /v1/classes.',
)


class GenerateRequest(Sampled):
    """Images of a class, or of a mixture of classes."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"class": 3, "n": 4, "seed": 7, "truncation": 0.7},
                {"class": {"0": 0.5, "1": 0.5}, "n": 8, "layout": "zip", "format": "webp"},
            ]
        },
    )

    class_: ClassName | ClassId | Mixture = CLASS_FIELD
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] = Field(
        1, description="Images. Image i has seed `seed + i`."
    )
    seed: Seed | None = Field(
        None, description="The same seed gives the same image. By default a random one."
    )
    edits: Edits = Field(
        {},
        description="Steps along the model's directions, by name or index; see /v1/directions.",
    )
    format: ImageFormat = Field(
        "png",
        description="png, webp, jpeg: image files. numpy: an .npy file, uint8 [n, H, W, C]. json:"
        " every image as base64 PNG, with its seed.",
    )
    layout: Layout = Field(
        "grid",
        description="Of image files: grid, one picture of all; zip, a file an image; list, JSON"
        " with each in base64.",
    )
    columns: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] | None = Field(
        None, description="Images a row of a grid; by default it is about square."
    )


class Point(Strict):
    """An image to start from: a class and a seed, or a latent that the endpoint gave."""

    class_: ClassName | ClassId | Mixture | None = Field(
        None,
        alias="class",
        description="Class by name or id, or a mixture; may be left out where `y` is given.",
    )
    seed: Seed | None = Field(None, description="Of the latent; give this or z.")
    z: Latent | None = Field(None, description="The latent itself, as /v1/invert gives it.")
    y: Embedding | None = Field(None, description="The class embedding, as /v1/invert gives it.")
    edits: Edits = Field({}, description="Steps along the model's directions.")

    @model_validator(mode="after")
    def _whole(self) -> Point:
        if (self.seed is None) == (self.z is None):
            raise ValueError("give either seed or z")
        if self.class_ is None and self.y is None:
            raise ValueError("give a class, or y")
        return self


class InterpolateRequest(Sampled):
    """The way from image to image."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "stops": [{"class": 3, "seed": 1}, {"class": 8, "seed": 2}],
                    "frames": 16,
                    "loop": True,
                    "format": "webp",
                }
            ]
        },
    )

    stops: Annotated[list[Point], Field(min_length=2, max_length=MAX_STOPS)] = Field(
        description="The images that the way leads through."
    )
    frames: Annotated[StrictInt, Field(ge=2, le=MAX_FRAMES)] = Field(
        16,
        description="Frames of the way from each stop to the next, the former included; at most"
        f" {MAX_FRAMES} in all.",
    )
    loop: bool = Field(
        True, strict=True, description="Whether the way returns to the first stop, without a jump."
    )
    format: MotionFormat = Field(
        "webp",
        description="webp, gif, mp4: animations. png: a sheet with a row a segment. zip: a PNG a"
        " frame. numpy: uint8 [frames, H, W, C]. json: base64 PNG, with each frame's latent.",
    )
    fps: Annotated[StrictInt, Field(ge=1, le=50)] = Field(
        16, description="Frames a second of an animation."
    )
    scale: Annotated[StrictInt, Field(ge=1, le=16)] = Field(
        1, description="Enlarges an animation; its sides stay within 1,024 pixels."
    )


class Morph(Strict):
    """Towards another class."""

    class_: ClassName | ClassId | Mixture = CLASS_FIELD
    amount: Annotated[float, Field(strict=True, ge=0, le=1)] = Field(
        0.5, description="0 is the image's own class, 1 the other."
    )


class EditRequest(Sampled):
    """One image changed along directions, and towards a class."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "image": {"class": 3, "seed": 7},
                    "edits": {"0": 2.0},
                    "morph": {"class": 8, "amount": 0.3},
                    "steps": 4,
                }
            ]
        },
    )

    image: Point
    edits: Edits = Field(
        {}, description="Directions by name or index, and how far along; see /v1/directions."
    )
    morph: Morph | None = Field(None, description="Towards another class.")
    steps: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] = Field(
        1,
        description="Images: 1 is the result; more lead to it evenly from the image as it was.",
    )
    format: ImageFormat = Field("png", description="As of /v1/generate.")
    layout: Layout = Field("grid", description="As of /v1/generate.")
    columns: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] | None = Field(
        None, description="Images a row of a grid; by default all in one row."
    )


BASE64_FIELD: Any = Field(
    min_length=1,
    description="An image file (PNG, JPEG, WebP, GIF) of up to 8 MiB in base64, or as a data: URL.",
)
EXAMPLE_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAARklEQVR42jXGMRGAIAAAwD/OHRpoE2hiBM8EVLCB"
    "FWxABCpoAozg5E+PbfQIta8jwxx7R/Ck5Y5AbO3fWQVqLiWZeA/X7gNUCQ+kWdtNDgAAAABJRU5ErkJggg=="
)
"""A 3, of 8 by 8 pixels."""


class UploadRequest(Request):
    """Long work on an uploaded image."""

    image: str = BASE64_FIELD
    class_: ClassName | ClassId | None = Field(
        None, alias="class", description="Class by name or id; if not said, it is found."
    )
    seed: Seed = Field(0, description="Where the search begins.")
    deadline: Annotated[float, Field(strict=True, gt=0, le=MAX_SECONDS)] = Field(
        30.0, description="Seconds that the work may take; then the best so far is given."
    )
    stream: bool = Field(
        False, strict=True, description="Tell progress as server-sent events, the result last."
    )


class InvertRequest(UploadRequest):
    """Find the latent of an image."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"image": EXAMPLE_PNG, "class": 3, "stream": True}]}
    )

    candidates: Annotated[StrictInt, Field(ge=1, le=MAX_CANDIDATES)] = Field(
        1, description="Latents to give, the nearest first."
    )


class UpscaleRequest(UploadRequest):
    """Find images whose down-sampled picture is the uploaded one."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"image": EXAMPLE_PNG, "class": 3, "factor": 2}]}
    )

    factor: Literal[2, 4, 8] | None = Field(
        None,
        description="2, 4 or 8; by default the largest that makes the image no larger than the"
        " model's resolution. An image of another size is first brought to that over this.",
    )
    candidates: Annotated[StrictInt, Field(ge=1, le=MAX_CANDIDATES)] = Field(
        4, description="Images to give, the best match first."
    )


class ImagesRequest(BaseModel):
    """A request of the widely used images API; unknown fields are passed over, as there."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"examples": [{"prompt": "3", "n": 1, "response_format": "b64_json"}]},
    )

    prompt: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=1000)] = Field(
        description="A class name, or something near one."
    )
    model: ModelName | None = None
    n: Annotated[StrictInt, Field(ge=1, le=10)] | None = None
    size: (
        Annotated[
            str, StringConstraints(strict=True, pattern=r"^(auto|[1-9]\d{0,3}x[1-9]\d{0,3})$")
        ]
        | None
    ) = Field(
        None, description="auto is the model's own; WIDTHxHEIGHT enlarges or shrinks, to 1,024."
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="url gives data: URLs."
    )
    output_format: PictureFormat | None = None
    user: str | None = None


class VerifyRequest(Strict):
    """An image whose origin is in question."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": EXAMPLE_PNG}]})

    image: str = BASE64_FIELD


class LatentAnswer(BaseModel):
    """What an image is made from; it can be a stop of /v1/interpolate or the image of /v1/edit."""

    model_config = ConfigDict(populate_by_name=True)

    class_: dict[str, float] | None = Field(
        alias="class", description="Weights by class name; null where `y` alone was given."
    )
    seed: int | None = None
    z: list[float] | None = None
    y: list[float] | None = None
    edits: dict[str, float] = {}


class ImageItem(BaseModel):
    """One image of a JSON answer."""

    seed: int | None = Field(None, description="None of an image that no seed gives.")
    image: str = Field(description="The image file in base64.")
    latent: LatentAnswer


class ImagesAnswer(BaseModel):
    """Images as JSON."""

    model_config = ConfigDict(populate_by_name=True)

    model: str = Field(description="NAME@VERSION that made the images.")
    truncation: float | None
    media_type: str = Field(description="Of the image files.")
    images: list[ImageItem]


class Found(BaseModel):
    """One candidate of an inversion."""

    image: str = Field(description="PNG file in base64.")
    psnr: float = Field(
        description="Peak signal-to-noise ratio to the uploaded image, dB; of /v1/upscale, once it"
        " is small again."
    )
    class_: str = Field(alias="class")
    latent: LatentAnswer

    model_config = ConfigDict(populate_by_name=True)


class FoundAnswer(BaseModel):
    """What long work found, the best first."""

    model: str
    candidates: list[Found]
    steps: int
    seconds: float
    finished: bool = Field(description="False if the deadline ended it early.")


class Progress(BaseModel):
    """A server-sent event `progress` of long work; the last event is `result`, or `problem`."""

    step: int
    steps: int
    psnr: float
    image: str | None = Field(None, description="What it looks like by now: PNG in base64.")


class B64Image(BaseModel):
    """An image of the images API."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = Field(None, description="The class that the prompt was taken for.")


class ImagesResponse(BaseModel):
    """The answer of the images API."""

    created: int
    data: list[B64Image]


class ClassEntry(BaseModel):
    """A class that can be asked for."""

    id: int
    name: str


class ClassesAnswer(BaseModel):
    """All classes of a model."""

    model: str
    classes: list[ClassEntry]


class DirectionEntry(BaseModel):
    """A direction in which a model's images change."""

    index: int
    name: str = Field(description="Its index as text, unless somebody named it.")
    stage: int = Field(description="0: the first linear layer; k: the k-th block.")
    effect: float = Field(description="How much a step changes what the layers see.")


class DirectionsAnswer(BaseModel):
    """The directions of a model, the strongest first."""

    model: str
    directions: list[DirectionEntry]


class Observed(BaseModel):
    """How a model version fared of late."""

    requests: int
    error_rate: float = Field(description="Part of the requests that failed on our side (5xx).")
    p50_ms: float | None
    p95_ms: float | None


class ModelEntry(BaseModel):
    """A model that is served."""

    id: str = Field(description="NAME@VERSION.")
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970.")
    owned_by: str = "biggan"
    aliases: list[str] = Field(description="Aliases that point to it.")
    share: float = Field(description="Part of the requests for NAME alone that go to it.")
    resolution: int
    channels: int
    n_classes: int
    fid: float | None = Field(description="None until it is measured, as of imported weights.")
    fid_protocol: dict[str, Any] = Field(description="What the FID was measured with.")
    dataset: str | None
    run: str | None = Field(description="None of imported weights.")
    kimg: float | None
    licence: str
    observed: Observed


class ModelsAnswer(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class VerifyAnswer(BaseModel):
    """Whether an image came from this store."""

    status: Literal["verified", "altered", "claimed", "unknown model", "no origin"] = Field(
        description="verified: the model that the file names makes these pixels. altered: it makes"
        " others. claimed: nothing proves it, for only 256 colours of the pixels are left, or one"
        " frame of several, or they are of more images than are made again here. unknown model:"
        " none that is served here."
    )
    detail: str
    model: str | None = None
    description: str | None = Field(None, description="What the file says that it shows.")
    largest_difference: int | None = Field(None, description="In grey levels.")
    mean_difference: float | None = None
    synthetic: bool | None = Field(None, description="True if made by a model of this store.")


class Health(BaseModel):
    """The endpoint works."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """The endpoint can serve; its first model is loaded."""

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
