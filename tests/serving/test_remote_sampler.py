"""What a gateway asks of samplers by one call, and what it asks of them at all."""

import asyncio
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from biggan.errors import UserError
from serving.app import RemoteSampler
from serving.batching import SMALL, Busy


class Samplers:
    """Stand for Serve's handle; answer a call once it is let, by the images of its first request.

    They turn away what is named in `busy`.
    """

    def __init__(self):
        self.calls, self.told, self.let, self.busy = [], [], {}, set()
        self.anywhere = []
        """Of each call: whether samplers that are yet to load the model may get it."""
        self.synthesize_all = SimpleNamespace(remote=partial(self.ask, True))

    def options(self, multiplexed_model_id):
        assert multiplexed_model_id == "grey@v1"
        return SimpleNamespace(synthesize_all=SimpleNamespace(remote=partial(self.ask, False)))

    async def ask(self, anywhere, version, wanted, turned_away):
        assert version == "grey@v1"
        self.anywhere.append(anywhere)
        self.calls.append([len(recipes) for recipes in wanted])
        self.told.append(turned_away)
        await self.let.setdefault(len(wanted[0]), asyncio.Event()).wait()
        return [self.answer(recipes) for recipes in wanted]

    def answer(self, recipes):
        if "bad" in recipes:
            return UserError("bad")
        return Busy(0.5) if len(recipes) in self.busy else np.array(recipes)

    def let_go(self, *images):
        for n in images:
            self.let.setdefault(n, asyncio.Event()).set()


async def ask(painter, *images):
    """Tasks that ask for so many images each."""
    tasks = [asyncio.create_task(painter.synthesize("grey@v1", [0] * n)) for n in images]
    for _ in range(20):
        await asyncio.sleep(0)
    return tasks


def run(test):
    asyncio.run(test())


def test_a_large_request_has_a_call_of_its_own(monkeypatch):
    monkeypatch.setattr("serving.coalescing.PATIENCE_SECONDS", 60)

    @run
    async def _test():
        samplers = Samplers()
        first, second, large, *rest = await ask(RemoteSampler(samplers), 1, 1, 256, 2, SMALL)
        assert sorted(samplers.calls) == [[1], [1], [256]]
        samplers.let_go(1, 2)
        answers = await asyncio.gather(first, second, *rest)
        assert [len(images) for images in answers] == [1, 1, 2, SMALL]
        assert samplers.calls[3:] == [[2, SMALL]]  # Small ones still go together.
        assert not large.done()
        samplers.let_go(256)
        assert len(await large) == 256


def test_its_error_is_raised():
    @run
    async def _test():
        samplers = Samplers()
        samplers.let_go(SMALL + 1)
        with pytest.raises(UserError, match="bad"):
            await RemoteSampler(samplers).synthesize("grey@v1", ["bad"] * (SMALL + 1))


def test_a_call_that_nobody_waits_for_ends():
    @run
    async def _test():
        samplers, ended = Samplers(), []

        async def hang(*_arguments):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append(True)
                raise

        samplers.ask = hang
        [large] = await ask(RemoteSampler(samplers), 256)
        large.cancel()
        await asyncio.wait([large])
        assert ended == [True]


def test_an_animation_does_not_keep_a_gateway_from_asking_for_single_images():
    @run
    async def _test():
        samplers = Samplers()
        painter = RemoteSampler(samplers)
        samplers.busy = {1}
        samplers.let_go(1)
        for _ in range(3):
            [task] = await ask(painter, 1)
            assert isinstance(await task, Busy)
        samplers.busy = set()
        await ask(painter, 256)
        assert painter.full("grey@v1", 1, 0) is None
        [task] = await ask(painter, 1)
        assert len(await task) == 1


def test_animations_that_are_too_many_are_remembered_and_told():
    @run
    async def _test():
        samplers = Samplers()
        painter = RemoteSampler(samplers)
        [large] = await ask(painter, 256)
        samplers.busy = {100}
        samplers.let_go(100)
        [second] = await ask(painter, 100)
        assert isinstance(await second, Busy)
        assert painter.full("grey@v1", 100, 0).seconds == 0.5  # Without a call.
        assert painter.full("grey@v1", 1, 0) is None
        [third] = await ask(painter, 100)
        assert isinstance(await third, Busy)
        samplers.let_go(256, SMALL + 1)
        await large
        [task] = await ask(painter, SMALL + 1)
        await task
        assert samplers.calls == [[256], [100], [SMALL + 1]]
        assert samplers.told == [0, 0, 200]  # For autoscaling.
        assert samplers.anywhere == [False, False, True]
