"""What a gateway asks of samplers at once."""

import asyncio
import itertools
import math

import numpy as np
import pytest

from serving.batching import Busy
from serving.window import Window


class Samplers:
    """Hold images until they are let go, and have room for so many."""

    def __init__(self, room):
        self.room, self.held, self.asked = room, 0, 0
        self.let = asyncio.Event()

    async def __call__(self, images):
        self.asked += images
        if self.held + images > self.room:
            return Busy(0.5)
        self.held += images
        await self.let.wait()
        self.held -= images
        return np.zeros(images)


async def ask_at_once(window, samplers, requests):
    """Images that each request got, or the seconds after which it should ask again."""
    samplers.let.clear()
    asked = [asyncio.create_task(window.ask(n, lambda n=n: samplers(n))) for n in requests]
    for _ in range(5):
        await asyncio.sleep(0)
    samplers.let.set()
    answers = await asyncio.gather(*asked)
    return [len(a) if isinstance(a, np.ndarray) else a.seconds for a in answers]


def run(test):
    asyncio.run(test())


def test_what_was_too_much_is_not_asked_again():
    @run
    async def _test():
        window, samplers = Window(), Samplers(room=10)
        assert await ask_at_once(window, samplers, [4, 4, 4]) == [4, 4, 0.5]
        assert samplers.asked == 12
        assert 8 <= window.limit < 9  # What was asked when it was too much, and a little.
        limit = math.floor(window.limit)
        answers = await ask_at_once(window, samplers, 20 * [1])
        assert answers == limit * [1] + (20 - limit) * [0.5]
        assert samplers.asked == 12 + limit
        assert window.turned_away == 20 - limit
        assert window.asked == 0


def test_who_asks_whether_it_is_full_is_counted_as_turned_away():
    @run
    async def _test():
        window, samplers = Window(), Samplers(room=4)
        assert window.full(64) is None
        assert not window.crowded
        await ask_at_once(window, samplers, 5 * [1])
        assert window.full(3) is None  # Nothing is asked now.
        window.asked = 4
        assert window.full(3).seconds == 0.5
        assert window.turned_away == 3
        assert window.crowded


def test_that_more_is_turned_away_than_made_is_told():
    @run
    async def _test():
        window, samplers = Window(), Samplers(room=8)

        async def many(requests):
            for _ in range(50):
                await ask_at_once(window, samplers, requests * [1])
            window.asked = 9
            answer = window.full(1)
            window.asked = 0
            return answer.many

        assert not await many(10)  # A fifth of them.
        assert await many(30)
        assert not await many(10)


def test_those_count_too_who_could_not_ask():
    @run
    async def _test():
        window = Window()
        assert window.full(1, others=40) is None  # There is room again.
        assert window.turned_away == 40
        assert window.crowded


def test_it_grows_to_what_there_is_room_for():
    @run
    async def _test():
        window, samplers = Window(), Samplers(room=4)
        await ask_at_once(window, samplers, 5 * [1])
        samplers.room, made = 16, []  # More samplers have come.
        for _ in range(60):
            answers = await ask_at_once(window, samplers, 32 * [1])
            made.append(sum(answer == 1 for answer in answers))
        grown = made.index(16)
        assert made[:grown] == sorted(made[:grown])
        assert all(b - a <= 1 for a, b in itertools.pairwise(made))
        assert min(made[grown:]) >= 15
        assert samplers.asked < 1.03 * sum(made)  # Now and then one more than there is room for.


def test_a_large_request_is_the_samplers_to_turn_away():
    @run
    async def _test():
        window, samplers = Window(), Samplers(room=10)
        await ask_at_once(window, samplers, 11 * [1])
        assert window.limit < 12
        samplers.room = 66
        assert await ask_at_once(window, samplers, [1, 64]) == [1, 64]
        assert await ask_at_once(window, samplers, [1, 1, 65]) == [1, 1, 0.5]
        assert window.limit > 10  # Those that are small are let through as before.


def test_one_that_was_too_large_leaves_room_for_small_ones():
    @run
    async def _test():
        window, samplers = Window(), Samplers(room=10)
        assert await ask_at_once(window, samplers, [2, 64]) == [2, 0.5]
        assert await ask_at_once(window, samplers, 10 * [1]) == 10 * [1]


def test_little_use_does_not_widen_it():
    @run
    async def _test():
        window, samplers = Window(), Samplers(room=10)
        await ask_at_once(window, samplers, [8, 8])
        before = window.limit
        for _ in range(100):
            await ask_at_once(window, samplers, [1])
        assert window.limit == before


def test_an_error_leaves_nothing_asked():
    @run
    async def _test():
        async def broken():
            raise ConnectionError

        window = Window()
        with pytest.raises(ConnectionError):
            await window.ask(4, broken)
        assert window.asked == 0
