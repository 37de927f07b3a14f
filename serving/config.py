"""What an endpoint serves, and how far it scales."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, model_validator

from biggan.models import split_reference
from serving.rendering import Precision

_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*)?")


class EndpointConfig(BaseModel):
    """What an endpoint serves, and how far it scales."""

    model_config = ConfigDict(extra="forbid")

    models: tuple[str, ...] = Field(("digits@best",), min_length=1)
    """NAME or NAME@ALIAS in the model store, the first for requests that name none. Aliases are
    followed when they move; every version of a NAME can be asked for."""
    canary: dict[str, float] = {}
    """Weights of NAME@ALIAS by which requests for NAME alone are shared: digits@best 95
    digits@candidate 5."""
    no_auth: bool = False
    """Let everybody in who reaches the endpoint; only where it listens on this machine alone."""
    storage: str | None = None
    """Storage root; by default $BIGGAN_STORAGE, else ./storage."""
    max_models: int = Field(3, ge=1)
    """Models that a replica keeps in memory; those used least recently make room."""
    min_replicas: int = Field(1, ge=0)
    """Samplers at rest; with 0 the first request after a rest waits until one has started."""
    max_replicas: int = Field(4, ge=1)
    """Samplers under load."""
    cpus_per_replica: float = Field(1.0, gt=0)
    """CPU cores that a sampler reserves. It computes on up to twice as many with a model that
    takes over 5 ms for an image: between batches they are idle."""
    gpus_per_replica: float = Field(0.0, ge=0)
    """GPUs, or the part of one, that a sampler takes."""
    precision: Precision = "float32"
    """What samplers compute in. float32 makes every image again to within one grey level, as
    /v1/verify and `jobs/generate.py --reproduce` expect; bf16 is off by more here and there, so
    that they may call its images altered."""
    compiled: bool | None = None
    """Whether samplers compile models before they serve them; None: on a GPU. On a CPU it takes
    some 10 s for each size of batch and gains a tenth, but a model computes in one thread then:
    half as many images of 64 pixels on two cores (`benchmarks/README.md`)."""
    min_searchers: int = Field(0, ge=0)
    """Searchers at rest, for inversion and super-resolution; with 0 the first search waits."""
    max_searchers: int = Field(2, ge=1)
    """Searchers under load, which have half the cores of a sampler, and as much of a GPU."""
    idle_seconds: float = Field(300.0, gt=0)
    """After so long with less load, copies that are not needed leave."""
    max_gateways: int = Field(4, ge=1)
    """Gateways under load; there is always one."""

    @model_validator(mode="after")
    def _check(self) -> EndpointConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas = {self.min_replicas}: must not exceed max_replicas ="
                f" {self.max_replicas}"
            )
        for reference in [*self.models, *self.canary]:
            if not _REFERENCE.fullmatch(reference):
                raise ValueError(
                    f"model {reference}: must be NAME or NAME@ALIAS of the model store, whose place"
                    " storage says"
                )
        served = {split_reference(reference)[0] for reference in self.models}
        for reference, weight in self.canary.items():
            if split_reference(reference)[0] not in served:
                raise ValueError(f"canary {reference}: none of models is of that name")
            if not 0 < weight < float("inf"):
                raise ValueError(f"canary {reference} = {weight}: must be above 0")
        return self
