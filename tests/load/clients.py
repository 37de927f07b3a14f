"""Clients that ask without pause, and hold every image against the generator's own."""

import io
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import requests

import biggan

SEEDS = 32
CLASS = 1


class Reference:
    """The images of `SEEDS` seeds."""

    def __init__(self, G):
        self.images = np.concatenate([G.sample([CLASS], seed=seed) for seed in range(SEEDS)])

    def check(self, made, seed):
        expected = self.images[seed : seed + 1].astype(int)
        assert made.shape == expected.shape
        assert np.abs(made.astype(int) - expected).max() <= 1


@dataclass
class Load:
    """What clients saw."""

    answered: list[tuple[float, float]] = field(default_factory=list)
    """When a request began and ended, of all that gave the right image."""
    failed: list[BaseException] = field(default_factory=list)

    def since(self, moment):
        """Seconds from `moment` to the end of the first request that began after it."""
        return min(end for begin, end in self.answered if begin > moment) - moment

    def slowest(self, moment):
        """The longest that a request took which ended after `moment`."""
        return max(end - begin for begin, end in self.answered if end > moment)


@contextmanager
def load(url, reference, clients):
    """`clients` that ask until the end of the block; they retry as applications do."""
    seen, stop = Load(), threading.Event()

    def ask(number):
        client = biggan.Client(url)
        seed = number
        while not stop.is_set():
            seed = (seed + 7) % SEEDS
            began = time.monotonic()
            try:
                reference.check(client.arrays(CLASS, seed=seed), seed)
            except BaseException as error:
                seen.failed.append(error)
                continue
            seen.answered.append((began, time.monotonic()))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@dataclass(frozen=True)
class Answers:
    """What clients that do not retry were told in `seconds`."""

    accepted: list[float]
    """Seconds that each image took."""
    refused: list[float]
    """Seconds until each refusal with Retry-After."""
    others: list[str]
    seconds: float

    @property
    def rate(self):
        """Images a second."""
        return len(self.accepted) / self.seconds


def ask(url, reference, clients, seconds, every=0.0):
    """Ask from `clients` connections for so long; each waits until `every` s from its last one."""
    answers, end = Answers([], [], [], seconds), time.monotonic() + seconds

    def one(number):
        session, seed = requests.Session(), number % SEEDS
        time.sleep(every * number / clients)
        while (began := time.monotonic()) < end:
            seed = (seed + 7) % SEEDS
            body = {"class": CLASS, "seed": seed, "format": "numpy"}
            try:
                response = session.post(f"{url}/v1/generate", json=body, timeout=60)
                took = time.monotonic() - began
                if response.status_code in (429, 503) and "Retry-After" in response.headers:
                    answers.refused.append(took)
                else:
                    response.raise_for_status()
                    reference.check(np.load(io.BytesIO(response.content)), seed)
                    answers.accepted.append(took)
            except Exception as error:
                answers.others.append(repr(error))
            time.sleep(max(0.0, began + every - time.monotonic()))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers
