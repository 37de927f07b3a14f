"""Batches: what travels together, and what is turned away."""

import asyncio
import threading

import numpy as np
import pytest

from serving.batching import MAX_EXCESS, Batcher, Busy, Demand


class Model:
    """Makes `[name, item]` of items, once it is let; remembers its batches and their threads."""

    def __init__(self, name="a", limit=4, threads=1):
        self.name, self.limit, self.threads = name, limit, threads
        self.room = limit * (3 * threads - 1)
        self.batches, self.used, self.let = [], [], threading.Semaphore(0)

    def make(self, items, threads):
        self.batches.append(items)
        self.used.append((threading.get_ident(), threads))
        assert self.let.acquire(timeout=10)
        if "bad" in items:
            raise ValueError("bad")
        return np.array([[self.name, item] for item in items])


async def settle():
    for _ in range(10):
        await asyncio.sleep(0.005)


async def ask_in_turn(batcher, requests):
    """Tasks that ask a model for items, each once the one before has begun to wait."""
    tasks = []
    for model, items in requests:
        tasks.append(asyncio.create_task(batcher.submit(model, items)))
        await settle()
    return tasks


def run(test):
    asyncio.run(test())


def test_batches_fill_while_the_model_works():
    @run
    async def _test():
        a, b, noted = Model("a"), Model("b"), []
        batcher = Batcher(Model.make, lambda model, *told: noted.append((model, *told[:2])))
        requests = ((a, [0]), (a, [1, 2]), (b, [3]), (a, [4]))
        tasks = await ask_in_turn(batcher, requests)
        assert a.batches == [[0]]  # It is in the model's hands: nothing waits for company.
        assert batcher.backlog == 4
        a.let.release(2)
        b.let.release(1)
        made = [await task for task in tasks]
        assert [m.tolist() for m in made] == [
            [["a", "0"]],
            [["a", "1"], ["a", "2"]],
            [["b", "3"]],
            [["a", "4"]],
        ]
        assert (a.batches, b.batches) == ([[0], [1, 2, 4]], [[3]])
        assert noted == [(a, 1, 0), (a, 3, 1), (b, 1, 0)]


def test_what_the_next_batch_has_no_room_for_is_turned_away():
    @run
    async def _test():
        model = Model(limit=4)
        batcher = Batcher(Model.make)
        tasks = await ask_in_turn(batcher, [(model, range(n)) for n in (1, 9, 1, 3)])
        assert isinstance(await tasks[2], Busy)
        assert isinstance(await tasks[3], Busy)
        model.let.release(9)
        assert len(await tasks[0]) == 1
        made = await tasks[1]
        assert made[:, 1].tolist() == [str(item) for item in range(9)]
        assert [len(batch) for batch in model.batches] == [1, 4, 4, 1]


def test_two_threads_have_batches_of_their_own():
    @run
    async def _test():
        model = Model(limit=4, threads=2)
        batcher = Batcher(Model.make)
        tasks = await ask_in_turn(
            batcher, [(model, range(6)), *[(model, [i]) for i in range(6, 21)]]
        )
        assert model.batches == [[0, 1, 2], [3, 4, 5]]
        assert len(set(model.used)) == 2
        assert batcher.backlog == 14  # 6 are done, and one more would be more than 5 batches.
        assert isinstance(await tasks[-1], Busy)
        model.let.release(1)
        await settle()
        assert model.batches[2:] == [[6, 7, 8, 9]]
        model.let.release(9)
        made = np.concatenate([await task for task in tasks[:-1]])
        assert made[:, 1].tolist() == [str(item) for item in range(20)]
        assert sorted(model.batches[3:]) == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]


def test_an_image_that_comes_alone_has_all_threads():
    @run
    async def _test():
        model = Model(limit=8, threads=2)
        batcher = Batcher(Model.make)
        tasks = await ask_in_turn(batcher, [(model, [0]), (model, [1]), (model, [2])])
        assert model.batches == [[0]]  # The others would be in its way, were they to begin.
        model.let.release(9)
        await asyncio.gather(*tasks)
        await batcher.submit(model, [3])
        assert sorted(model.batches) == [[0], [1], [2], [3]]
        assert [threads for _, threads in model.used] == [2, 1, 1, 2]
        assert model.used[0] == model.used[3]  # OpenMP has workers for one thread alone.


def test_one_bad_request_fails_alone():
    @run
    async def _test():
        model = Model(limit=8)
        model.let.release(100)
        batcher = Batcher(Model.make)
        requests = [[0], ["bad"], [2], ["bad", *range(10, 19)]]
        tasks = [asyncio.create_task(batcher.submit(model, items)) for items in requests]
        await asyncio.wait(tasks)
        assert [type(task.exception()) for task in tasks] == [
            *(type(None), ValueError, type(None), ValueError)
        ]
        assert tasks[2].result().tolist() == [["a", "2"]]
        assert not any(18 in batch for batch in model.batches)  # Of it no more is made.
        assert (await batcher.submit(model, [3])).tolist() == [["a", "3"]]


def test_what_nobody_waits_for_any_more_is_not_made():
    @run
    async def _test():
        model = Model(limit=2)
        batcher = Batcher(Model.make)
        tasks = await ask_in_turn(batcher, [(model, [0]), (model, [1, 2, 3])])
        model.let.release(1)
        await settle()
        assert model.batches == [[0], [1, 2]]
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        model.let.release(5)
        assert len(await batcher.submit(model, [4])) == 1
        assert model.batches == [[0], [1, 2], [4]]


def test_demand_is_what_is_turned_away_for_an_image_that_is_made():
    demand = Demand()
    for _ in range(100):
        demand.turn_away(24)
        demand.make(8)
    assert demand.excess == pytest.approx(3, rel=0.25)
    for _ in range(100):
        demand.make(1)
    assert demand.excess < 0.2
    demand.turn_away(10**6)
    assert demand.excess == MAX_EXCESS
