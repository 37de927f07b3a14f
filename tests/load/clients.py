"""Clients that ask without pause, and hold every image against the generator's own."""

import asyncio
import io
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

import aiohttp
import numpy as np

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


def ask(url, reference, clients, seconds, rate=None):
    """Ask from `clients` connections for so long: without pause, or at random, `rate` a second.

    At random is as independent users do, now and then several at once (a Poisson process). A
    connection that still waits for an answer when its next request is due asks it after that.
    """
    answers, end = Answers([], [], [], seconds), time.monotonic() + seconds

    async def request(session, seed):
        body, began = {"class": CLASS, "seed": seed, "format": "numpy"}, time.monotonic()
        async with session.post(f"{url}/v1/generate", json=body) as response:
            content = await response.read()
            took = time.monotonic() - began
            if response.status in (429, 503) and "Retry-After" in response.headers:
                answers.refused.append(took)
                return
            response.raise_for_status()
        reference.check(np.load(io.BytesIO(content)), seed)
        answers.accepted.append(took)

    async def one(number, session):
        seed, random, due = number % SEEDS, Random(number), time.monotonic()
        while True:
            if rate:
                due += random.expovariate(rate / clients)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            if time.monotonic() > end:
                return
            seed = (seed + 7) % SEEDS
            try:
                await request(session, seed)
            except Exception as error:
                answers.others.append(repr(error))

    async def all_clients():
        timeout = aiohttp.ClientTimeout(total=60)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            await asyncio.gather(*(one(number, session) for number in range(clients)))

    asyncio.run(all_clients())
    return answers
