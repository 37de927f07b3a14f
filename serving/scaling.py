"""How many samplers the work that is asked for needs."""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

BUSY = 0.7
"""The part of its time that a sampler should be busy for; the rest is for what comes at once."""


def by_work(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Serve's autoscaling policy, over what `Sampler.record_autoscaling_stats` tells.

    Requests in hand would not do: a sampler turns away what would wait for more than a batch, so
    that one of a slow model never has more than two. Of a fast one, sixteen are little work.
    """
    work = sum((context.aggregated_metrics or {}).get("work", {}).values())
    return max(work / BUSY, min(1.0, context.total_num_requests)), {}
