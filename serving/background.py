"""Tasks that outlive the request that begins them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any


def begin(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Begin a task that is nobody's.

    When a client leaves, Serve cancels the calls that its request has made, and it tells whose a
    call is by context variables, which tasks inherit. Others may be waiting for this one.
    """
    return asyncio.create_task(work, context=Context())
