"""How much each key may use: a rate, and a quota of images a day. Counts; knows nothing of Ray.

One `Meter` counts for all gateways of an endpoint, and for one endpoint a storage root: two that
counted apart would let twice as much through.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta

from serving.keys import Key, KeyStore, repeat
from serving.problems import ProblemError

logger = logging.getLogger("ray.serve")

FLUSH_SECONDS = 5.0
"""What was used of quotas is written so often; a meter that is killed forgets at most the last of
these."""
SECOND = 10**9
MINUTE = 60 * SECOND
DAY = 24 * 60 * MINUTE


@dataclass(frozen=True)
class Admission:
    """The images may be made, and are counted."""

    left: int | None
    """Images that are left of today's quota; None without one."""


@dataclass(frozen=True)
class Refusal:
    """The images may not be made now, and are not counted."""

    detail: str
    retry_after: int | None
    """Seconds after which they may, if nobody takes what comes free until then; None: never."""

    def problem(self) -> ProblemError:
        """What to tell the client: a 429, or a 403 if trying again is no use."""
        if self.retry_after is None:
            return ProblemError(403, self.detail)
        detail = f"{self.detail}: try again in {self.retry_after} s"
        return ProblemError(429, detail, headers={"Retry-After": str(self.retry_after)})


class Meter:
    """Counts images by key.

    The rate is a token bucket, kept as the moment at which it will be full (the generic cell rate
    algorithm, ITU-T I.371): a restart fills it. The day's images are kept in the store. Times are
    whole nanoseconds, so that no rounding lets through more or less than the limits say. Memory
    grows with the keys in use, not with requests. Threads may share a meter.
    """

    def __init__(self, root: str | None = None, *, clock: Callable[[], int] = time.time_ns) -> None:
        """Take up the counts of the day; raises OSError or `StorageError` if they are unreadable.

        `clock` gives nanoseconds since 1970 UTC. It may be set back: that neither begins a day
        anew, nor makes anybody wait for longer.
        """
        self.store, self.clock = KeyStore(root), clock
        self._counting, self._writing = threading.Lock(), threading.Lock()
        self._full_at: dict[str, int] = {}
        self._latest = clock()
        self._day = self._latest // DAY
        self._used = {self._day: self.store.usage(_date(self._day))}
        self._unsaved: set[int] = set()
        self._stop = threading.Event()

    def start(self) -> None:
        """Write the counts every `FLUSH_SECONDS` from now on, in a thread, and at exit."""
        repeat(self._stop, FLUSH_SECONDS, self.flush)
        atexit.register(self.close)

    def close(self) -> None:
        """Write the counts a last time."""
        atexit.unregister(self.close)
        self._stop.set()
        self.flush()

    def take(self, key: Key, images: int) -> Admission | Refusal:
        """Count images to be made with a key, or refuse them; all of them or none.

        More than may be taken at once are made when nothing was taken, as if on credit: who has
        them waits the longer for the next.
        """
        if key.quota is not None and images > key.quota:
            detail = f"this API key may have {key.quota} images a day, not {images}"
            return Refusal(detail, None)
        with self._counting:
            now = self._now()
            self._day = max(self._day, now // DAY)
            used = self._used.setdefault(self._day, {})
            total = used.get(key.name, 0) + images
            full = key.burst * MINUTE // key.rate
            begin = max(self._full_at.get(key.name, 0), now)
            full_at = begin + images * MINUTE // key.rate
            too_fast = begin + min(images, key.burst) * MINUTE // key.rate - (now + full)
            too_many = (self._day + 1) * DAY - now if key.quota and total > key.quota else 0
            if (wait := max(too_fast, too_many)) > 0:
                limit = f"{key.rate} images a minute"
                if key.quota and too_many:
                    left = max(0, key.quota + images - total)
                    limit = f"{key.quota} images a day (UTC), {left} of which are left"
                return Refusal(f"this API key may have {limit}", -(-wait // SECOND))
            self._full_at[key.name], used[key.name] = full_at, total
            self._unsaved.add(self._day)
        return Admission(key.quota - total if key.quota else None)

    def _now(self) -> int:
        """The time; if the clock was set back, so are the moments at which buckets are full."""
        now = self.clock()
        if (back := self._latest - now) > 0:
            self._full_at = {name: at - back for name, at in self._full_at.items()}
        self._latest = now
        return now

    def give_back(self, key: Key, images: int) -> None:
        """Count no more what was taken for work that failed.

        What was taken before midnight and failed after it counts for the new day.
        """
        with self._counting:
            used = self._used.setdefault(self._day, {})
            used[key.name] = max(0, used.get(key.name, 0) - images)
            self._full_at[key.name] = self._full_at.get(key.name, 0) - images * MINUTE // key.rate
            self._unsaved.add(self._day)

    def flush(self) -> None:
        """Write the counts that have changed; what cannot be written is tried again next time."""
        with self._writing:
            with self._counting:
                now = self._now()
                self._full_at = {name: at for name, at in self._full_at.items() if at > now}
                changed = {day: dict(self._used[day]) for day in self._unsaved}
                self._unsaved.clear()
            for day, used in changed.items():
                try:
                    self.store.write_usage(_date(day), used)
                except Exception as error:  # Storage raises several kinds; none may end the count.
                    logger.warning("counts of %s are not written yet: %s", _date(day), error)
                    with self._counting:
                        self._unsaved.add(day)
            with self._counting:
                kept = self._unsaved | {self._day}
                self._used = {day: used for day, used in self._used.items() if day in kept}


def _date(day: int) -> date:
    return date(1970, 1, 1) + timedelta(days=day)
