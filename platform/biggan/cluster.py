"""Connecting to Ray: the cluster that is there, or one of our own on this machine."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.data
import torch

from biggan.errors import UserError
from biggan.parallel import CPU, Workers


def connect() -> None:
    """Connect this process to Ray, unless it already is.

    The cluster is that of $RAY_ADDRESS (set inside a submitted job), else one that `ray start`
    began on this machine, else a new one that lives as long as this process, with its dashboard
    on loopback and token authentication on. Raises ConnectionError if $RAY_ADDRESS leads nowhere.
    """
    if ray.is_initialized():
        return
    # It warns that authentication is on, which it should be.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    options: dict[str, Any] = {"logging_level": logging.WARNING}
    if "RAY_ADDRESS" not in os.environ:
        # One's own machine gives no notice before it goes.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        # Not address="auto", which would join the private cluster of any process on the machine.
        ray.init(**options)
    except ConnectionError:  # What `ray start` began is gone.
        if "RAY_ADDRESS" in os.environ:
            raise
        ray.init(address="local", **options)


def own_device() -> torch.device:
    """The GPU that Ray set aside for this task or actor, else the CPU.

    Ray leaves GPUs visible to tasks that asked for none.
    """
    return Workers.current().device if ray.get_gpu_ids() else CPU


def result(task: Any) -> Any:
    """What a task gave; a `UserError` is raised as it was there, without Ray's traceback."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


E = TypeVar("E", bound=Exception)


def cause(error: BaseException | None, kind: type[E]) -> E | None:
    """The first error of a kind among what an error of Ray's was made from; None if there is none.

    Ray wraps what goes wrong in its processes, each of its libraries in a way of its own.
    """
    if error is None or isinstance(error, kind):
        return error
    within = [
        *getattr(error, "worker_failures", {}).values(),
        *(getattr(error, name, None) for name in ("controller_failure", "cause", "_base_exc")),
        error.__cause__,
    ]
    found = (cause(e, kind) for e in within if isinstance(e, BaseException) and e is not error)
    return next((e for e in found if e), None)


def quiet_ray_data() -> None:
    """Keep Ray Data from logging plans and bars: our jobs print progress of their own."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has to offer."""

    cpus: int
    gpus: int


def largest_node() -> Node:
    """The machine with the most GPUs, then CPUs, of the connected cluster."""
    nodes = [
        Node(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return max(nodes, key=lambda node: (node.gpus, node.cpus))
