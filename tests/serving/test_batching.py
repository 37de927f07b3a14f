"""Batches: what travels together, and what is turned away."""

import asyncio
import threading

import numpy as np
import pytest

from serving.batching import Batcher, Busy


class Model:
    """Makes `[key, item]` of items, once it is let; remembers its batches."""

    def __init__(self):
        self.batches, self.let = [], threading.Semaphore(0)

    def __call__(self, key, items):
        assert self.let.acquire(timeout=10)
        self.batches.append((key, items))
        if "bad" in items:
            raise ValueError("bad")
        return np.array([[key, item] for item in items])


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def test_batches_fill_while_the_model_works():
    async def run():
        model, noted = Model(), []
        batcher = Batcher(model, lambda _key: 4, lambda *told: noted.append(told))
        first = asyncio.create_task(batcher.submit("a", [0]))
        await settle()  # It is in the model's hands: nothing waits for company.
        others = [
            asyncio.create_task(batcher.submit(key, items))
            for key, items in (("a", [1, 2]), ("b", [3]), ("a", [4]))
        ]
        await settle()
        assert batcher.backlog == 4
        model.let.release(3)
        made = [await task for task in (first, *others)]
        assert [m.tolist() for m in made] == [
            [["a", "0"]],
            [["a", "1"], ["a", "2"]],
            [["b", "3"]],
            [["a", "4"]],
        ]
        assert model.batches == [("a", [0]), ("a", [1, 2, 4]), ("b", [3])]
        assert noted == [(1, 0), (3, 1), (1, 0)]

    asyncio.run(run())


def test_what_the_next_batch_has_no_room_for_is_turned_away():
    async def run():
        model = Model()
        batcher = Batcher(model, lambda _key: 4)
        tasks = []
        for n in (1, 9, 1, 3):  # 9 alone are a batch of their own.
            tasks.append(asyncio.create_task(batcher.submit("a", range(n))))
            await settle()
        assert isinstance(await tasks[2], Busy)
        assert isinstance(await tasks[3], Busy)
        model.let.release(2)
        assert len(await tasks[0]) == 1
        assert len(await tasks[1]) == 9

    asyncio.run(run())


def test_one_bad_request_fails_alone():
    async def run():
        model = Model()
        model.let.release(100)
        batcher = Batcher(model, lambda _key: 8)
        tasks = [asyncio.create_task(batcher.submit("a", [item])) for item in (0, "bad", 2)]
        await asyncio.wait(tasks)
        assert [type(task.exception()) for task in tasks] == [type(None), ValueError, type(None)]
        assert tasks[2].result().tolist() == [["a", "2"]]
        assert (await batcher.submit("a", [3])).tolist() == [["a", "3"]]

    asyncio.run(run())


def test_what_nobody_waits_for_any_more_is_not_made():
    async def run():
        model = Model()
        batcher = Batcher(model, lambda _key: 2)
        tasks = []
        for item in range(3):
            tasks.append(asyncio.create_task(batcher.submit("a", [item])))
            await settle()
        tasks[2].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        model.let.release(5)
        await asyncio.wait(tasks)
        assert 2 not in [item for _, items in model.batches for item in items]

    asyncio.run(run())
