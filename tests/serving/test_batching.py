"""Batches: what travels together, and what is turned away."""

import asyncio
import threading
from itertools import chain

import numpy as np
import pytest

from serving.batching import MAX_EXCESS, MAX_ITEMS, SMALL, Batcher, Busy, Demand
from serving.schemas import MAX_FRAMES


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
        assert noted == [(a, 1, 0), (a, 3, 0), (b, 1, 0)]  # Of the same model none was left.


def test_what_the_next_batch_has_no_room_for_is_turned_away():
    @run
    async def _test():
        model = Model(limit=4)
        batcher = Batcher(Model.make)
        tasks = await ask_in_turn(batcher, [(model, range(n)) for n in (4, 1, 2, 1, 1, 1)])
        assert isinstance(await tasks[4], Busy)
        assert isinstance(await tasks[5], Busy)
        model.let.release(9)
        made = [await task for task in tasks[:4]]
        assert [len(images) for images in made] == [4, 1, 2, 1]
        assert [len(batch) for batch in model.batches] == [4, 4]


def numbers(images):
    return [int(item) for item in images[:, 1]]


def of_large(batch):
    """Items of a batch that are of a request of numbers, and not of one of words."""
    return sum(isinstance(item, int) for item in batch)


@pytest.mark.parametrize("room", [20, 15])  # 15 where much is turned away (`Loaded.room`).
def test_single_images_are_let_in_beside_an_animation_and_have_half_of_its_batches(room):
    @run
    async def _test():
        model, batcher = Model(limit=10), Batcher(Model.make)
        model.room = room
        singles = [(model, [f"s{i}"]) for i in range(6)]
        large, *tasks = await ask_in_turn(batcher, [(model, range(256)), *singles])
        assert batcher.backlog == 246 + 5  # All items, for whoever is told.
        assert isinstance(await tasks.pop(), Busy)  # It would not be in the next batch.
        model.let.release(2)
        for task, (_, [name]) in zip(tasks, singles, strict=False):
            assert (await task)[0, 1] == name
        await settle()
        assert model.batches[1] == [10, 11, 12, 13, 14, "s0", "s1", "s2", "s3", "s4"]
        assert model.batches[2] == list(range(15, 25))  # Nobody else waits.
        model.let.release(100)
        assert numbers(await large) == list(range(256))


def test_the_next_batch_has_no_more_of_others_than_half_while_an_animation_goes_on():
    @run
    async def _test():
        model, batcher = Model(limit=4), Batcher(Model.make)
        model.room = 100
        singles = [(model, [f"s{i}"]) for i in range(12)]
        tasks = await ask_in_turn(batcher, [(model, range(20)), *singles])
        model.let.release(100)
        await asyncio.gather(*tasks)
        assert [of_large(batch) for batch in model.batches] == [4, 2, 2, 2, 2, 2, 2, 4]


def test_where_a_batch_is_one_image_they_take_turns():
    @run
    async def _test():
        model, batcher = Model(limit=1), Batcher(Model.make)
        requests = [(model, [0, 1, 2, 3]), (model, ["s0"]), (model, ["s1"])]
        *tasks, turned_away = await ask_in_turn(batcher, requests)
        assert isinstance(await turned_away, Busy)
        model.let.release(2)
        await tasks[1]
        tasks += await ask_in_turn(batcher, [(model, ["s2"])])
        model.let.release(100)
        await asyncio.gather(*tasks)
        assert model.batches == [[0], ["s0"], [1], ["s2"], [2], [3]]


def test_a_few_images_are_let_in_beside_an_animation_too_where_a_batch_has_fewer():
    @run
    async def _test():
        model, batcher = Model(limit=2), Batcher(Model.make)
        model.room = 3
        requests = [(model, range(n)) for n in (50, SMALL + 1, SMALL)]
        large, larger, small = await ask_in_turn(batcher, requests)
        assert isinstance(await larger, Busy)
        model.let.release(1 + SMALL)
        assert len(await small) == SMALL
        model.let.release(100)
        await large


def test_each_in_turn_has_half_of_what_is_left():
    @run
    async def _test():
        model, batcher = Model(limit=12), Batcher(Model.make)
        large = [[f"{name}{i}" for i in range(n)] for name, n in (("a", 9), ("b", 2), ("c", 9))]
        model.room = 100
        tasks = await ask_in_turn(batcher, [(model, [0]), *[(model, items) for items in large]])
        model.let.release(100)
        await asyncio.gather(*tasks)
        a, b, c = large
        assert model.batches == [[0], a[:6] + b + c[:4], c[4:] + a[6:]]
        # And round again, if those behind leave something.
        model.batches.clear()
        model.let = threading.Semaphore(0)
        tasks = await ask_in_turn(batcher, [(model, [0]), (model, a + c), (model, b)])
        model.let.release(100)
        await asyncio.gather(*tasks)
        assert model.batches == [[0], (a + c)[:10] + b, (a + c)[10:]]


def test_however_many_animations_go_on_nobody_waits_for_their_end():
    @run
    async def _test():
        model, batcher = Model(limit=4), Batcher(Model.make)
        model.room = 100
        large = [[f"{name}{i}" for i in range(40)] for name in "abcdef"]
        tasks = await ask_in_turn(batcher, [(model, items) for items in large])
        for _ in range(11):
            model.let.release(1)
            await settle()
        made = [sum(item[0] == name for item in chain(*model.batches)) for name in "abcdef"]
        assert sum(made) == 48
        assert min(made) >= 5
        single = asyncio.create_task(batcher.submit(model, ["s0"]))
        await settle()
        model.let.release(2)
        assert len(await single) == 1
        model.let.release(100)
        await asyncio.gather(*tasks)


def test_another_model_does_not_wait_for_an_animation():
    @run
    async def _test():
        a, b, batcher = Model("a"), Model("b"), Batcher(Model.make)
        large, single = await ask_in_turn(batcher, [(a, range(100)), (b, [0])])
        a.let.release(2)
        b.let.release(1)
        assert len(await single) == 1
        assert len(a.batches) <= 3  # The last may have begun.
        a.let.release(100)
        await large


def test_an_animation_that_waits_counts_as_half_a_batch():
    @run
    async def _test():
        model, batcher = Model(limit=10), Batcher(Model.make)
        tasks = await ask_in_turn(batcher, [(model, range(256)) for _ in range(3)])
        assert [task.done() for task in tasks] == [False, False, True]
        assert isinstance(await tasks[2], Busy)
        model.let.release(100)
        assert [numbers(await task) for task in tasks[:2]] == 2 * [list(range(256))]


def test_the_images_that_may_be_held_for_animations_have_a_bound():
    @run
    async def _test():
        model, batcher = Model(limit=64), Batcher(Model.make)
        model.room = 10**6
        frames = [(model, range(MAX_FRAMES))] * (MAX_ITEMS // MAX_FRAMES + 1)
        tasks = await ask_in_turn(batcher, [*frames, (model, range(SMALL))])
        assert [task.done() for task in tasks] == [*[False] * (len(frames) - 1), True, False]
        assert isinstance(await tasks[-2], Busy)
        model.let.release(100)
        await asyncio.gather(*tasks)


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
