"""Tasks that outlive the request that begins them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")
_finishing: set[asyncio.Task[Any]] = set()


def begin(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Begin a task that is nobody's.

    When a client leaves, Serve cancels the calls that its request has made, and it tells whose a
    call is by context variables, which tasks inherit. Others may be waiting for this one.
    """
    return asyncio.create_task(work, context=Context())


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """What work gives that is done to its end, though whoever waits for it may leave."""
    task = begin(work)
    _finishing.add(task)  # The event loop alone would forget it.
    task.add_done_callback(_finishing.discard)
    return await asyncio.shield(task)
