"""What the operations answer, for example: for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from serving.schemas import (
    EXAMPLE_PNG,
    B64Image,
    ClassEntry,
    ClassesAnswer,
    DirectionEntry,
    DirectionsAnswer,
    Found,
    FoundAnswer,
    Health,
    ImageItem,
    ImagesAnswer,
    ImagesResponse,
    LatentAnswer,
    ModelEntry,
    ModelsAnswer,
    Observed,
    Ready,
    VerifyAnswer,
)

MODEL = "digits@v1"
_LATENT = LatentAnswer(class_={"3": 1.0}, seed=7)
_IMAGES = ImagesAnswer(
    model=MODEL,
    truncation=None,
    media_type="image/png",
    images=[ImageItem(seed=7, image=EXAMPLE_PNG, latent=_LATENT)],
)
_FOUND = FoundAnswer(
    model=MODEL,
    candidates=[
        Found(
            image=EXAMPLE_PNG,
            psnr=31.5,
            class_="3",
            latent=LatentAnswer(class_={"3": 1.0}, z=[0.25, -1.5], y=[0.5, 0.125]),
        )
    ],
    steps=200,
    seconds=2.5,
    finished=True,
)
_ENTRY = ModelEntry(
    id=MODEL,
    created=1_795_000_000,
    aliases=["best"],
    share=1.0,
    resolution=16,
    channels=1,
    n_classes=10,
    fid=12.5,
    fid_protocol={"extractor": "classifier", "num_samples": 1797},
    dataset="digits",
    run="first",
    kimg=200.0,
    licence="CC0-1.0",
    observed=Observed(requests=1000, error_rate=0.0, p50_ms=12.0, p95_ms=31.0),
)
_VERIFIED = VerifyAnswer(
    status="verified",
    detail=f"made by {MODEL}: made again, pixels differ by 0 grey levels at most, 0.00 on average",
    model=MODEL,
    description=f"3, seed 7, by {MODEL}; synthetic",
    largest_difference=0,
    mean_difference=0.0,
    synthetic=True,
)

_ANSWERS: dict[str, BaseModel | str] = {
    "/v1/generate": _IMAGES,
    "/v1/interpolate": _IMAGES,
    "/v1/edit": _IMAGES,
    "/v1/invert": _FOUND,
    "/v1/upscale": _FOUND,
    "/v1/images/generations": ImagesResponse(
        created=1_795_000_000, data=[B64Image(b64_json=EXAMPLE_PNG, revised_prompt="3")]
    ),
    "/v1/verify": _VERIFIED,
    "/v1/models": ModelsAnswer(data=[_ENTRY]),
    "/v1/models/{model}": _ENTRY,
    "/v1/classes": ClassesAnswer(model=MODEL, classes=[ClassEntry(id=0, name="0")]),
    "/v1/directions": DirectionsAnswer(
        model=MODEL, directions=[DirectionEntry(index=0, name="thickness", stage=0, effect=1.5)]
    ),
    "/healthz": Health(),
    "/readyz": Ready(model=MODEL),
    "/metrics": (
        'biggan_images_total{key="alice",model="digits@v1"} 64.0\n'
        'biggan_backlog_images{model="digits@v1",replica="1f0c9a2b"} 3.0\n'
    ),
}
EXAMPLES: dict[str, Any] = {
    path: answer if isinstance(answer, str) else answer.model_dump(mode="json", by_alias=True)
    for path, answer in _ANSWERS.items()
}
"""By the path of an operation: its answer as JSON, or as text."""
