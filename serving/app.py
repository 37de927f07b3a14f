"""The application: an HTTP gateway in front of the sampler, each scaling on its own.

`serve run serving.app:build model=digits@best`, `serve deploy serving/serve.yaml` and
`python -m serving` all build it from an `EndpointConfig`.
"""

# No `from __future__ import annotations`: Serve wraps the routes, after which FastAPI could not
# resolve annotations that are text.
import asyncio
import secrets
from typing import Annotated, Any

from fastapi import Body, FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response

from serving.encoding import encode
from serving.problems import ProblemError, install
from serving.sampler import MAX_BATCH_IMAGES, Description, Refusal, Sampler, SampleRequest
from serving.schemas import (
    ClassEntry,
    ClassesResponse,
    FieldProblem,
    GenerateRequest,
    GenerateResponse,
    HealthResponse,
    ModelResponse,
    Problem,
)


class EndpointConfig(BaseModel):
    """What an endpoint serves, and how far it scales."""

    model_config = ConfigDict(extra="forbid")

    model: str = "digits@best"
    """NAME@ALIAS or NAME@VERSION in the model store; an alias is followed when it moves."""
    storage: str | None = None
    """Storage root; by default $BIGGAN_STORAGE, else ./storage."""
    min_replicas: int = Field(1, ge=1)
    """Copies of the model at rest."""
    max_replicas: int = Field(4, ge=1)
    """Copies of the model under load."""
    cpus_per_replica: float = Field(1.0, gt=0)
    """CPU cores a copy of the model computes with."""
    gpus_per_replica: float = Field(0.0, ge=0)
    """GPUs, or the part of one, that a copy of the model takes."""

    @model_validator(mode="after")
    def _check_replicas(self) -> "EndpointConfig":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas = {self.min_replicas}: must not exceed max_replicas ="
                f" {self.max_replicas}"
            )
        return self


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in (
        (413, "The body is too long."),
        (422, "A field is wrong; the answer names it, its value and the limit."),
        (503, "Too much to do at the moment; try again after Retry-After seconds."),
    )
}
api = FastAPI(
    title="BigGAN endpoint",
    description="Samples images of a class from the best generator in the model store.",
    version="1",
)
install(api)


@serve.deployment(max_ongoing_requests=256)
@serve.ingress(api)
class Gateway:
    """Checks requests, has them sampled, and encodes the images."""

    def __init__(self, sampler: DeploymentHandle[Any]) -> None:
        """`sampler` is the handle of the `Sampler` deployment."""
        self.sampler = sampler

    @api.post(
        "/v1/generate",
        response_model=None,
        responses={
            200: {
                "model": GenerateResponse,
                "description": "The images, in the format asked for.",
                "content": {
                    "image/png": {},
                    "image/webp": {},
                    "image/jpeg": {},
                    "application/x-npy": {},
                },
            },
            **PROBLEMS,
        },
    )
    async def generate(self, request: Annotated[GenerateRequest, Body()]) -> Response:
        """Images of a class."""
        wanted = SampleRequest(
            class_=request.class_,
            seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
            n=request.n,
            truncation=request.truncation,
        )
        samples = await self._ask("sample", wanted)
        if isinstance(samples, Refusal):
            wrong = FieldProblem(field=samples.field, value=samples.value, limit=samples.reason)
            detail = f"{samples.field} = {samples.value!r}: {samples.reason}"
            raise ProblemError(422, detail, [wrong])
        return await asyncio.to_thread(encode, samples, wanted, request.format)

    @api.get("/v1/classes", responses={503: PROBLEMS[503]})
    async def classes(self) -> ClassesResponse:
        """The classes that can be asked for."""
        served = await self._describe()
        entries = [ClassEntry(id=i, name=name) for i, name in enumerate(served.class_names)]
        return ClassesResponse(model=served.name, classes=entries)

    @api.get("/v1/model", responses={503: PROBLEMS[503]})
    async def model(self) -> ModelResponse:
        """The model that is served, and how good it is."""
        served = await self._describe()
        card = served.card
        return ModelResponse(
            model=served.name,
            resolution=served.resolution,
            channels=served.channels,
            n_classes=len(served.class_names),
            **card.model_dump(include=set(ModelResponse.model_fields) - {"model"}),
        )

    @api.get("/healthz", responses={503: PROBLEMS[503]})
    async def healthz(self) -> HealthResponse:
        """Whether the endpoint works, its model included."""
        return HealthResponse(model=(await self._describe()).name)

    async def _describe(self) -> Description:
        description: Description = await self._ask("describe")
        return description

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self.sampler, method).remote(*arguments)
        except BackPressureError:
            raise ProblemError(
                503, "the endpoint has too much to do", headers={"Retry-After": "1"}
            ) from None


def build(config: EndpointConfig) -> serve.Application:
    """The application that serves `config.model`."""
    sampler = Sampler.options(  # type: ignore[attr-defined]  # The decorator hides its type.
        max_ongoing_requests=2 * MAX_BATCH_IMAGES,
        max_queued_requests=4 * MAX_BATCH_IMAGES,
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=16,
            upscale_delay_s=5,
            downscale_delay_s=60,
        ),
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
        },
    ).bind(config.model, config.storage)
    gateway = Gateway.options(ray_actor_options={"num_cpus": 0.1})  # type: ignore[attr-defined]
    application: serve.Application = gateway.bind(sampler)
    return application
