"""Requests that go together: which do, and that each gets what is its own."""

import asyncio
from contextvars import ContextVar

import pytest

from serving import background
from serving.coalescing import PATIENCE_SECONDS, Coalescer

WHO = ContextVar("who", default="nobody")


class Callee:
    """Doubles numbers, once it is let; refuses what is negative. Remembers its calls."""

    def __init__(self):
        self.calls, self.let = [], asyncio.Semaphore(0)

    async def __call__(self, items):
        self.calls.append(items)
        await self.let.acquire()
        if 13 in items:
            raise ConnectionError("gone")
        return [ValueError(item) if item < 0 else 2 * item for item in items]


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def ask(coalescer, *items):
    return [asyncio.create_task(coalescer.ask(item)) for item in items]


def test_requests_wait_for_each_other_while_two_calls_are_under_way(monkeypatch):
    monkeypatch.setattr("serving.coalescing.PATIENCE_SECONDS", 60)

    async def run():
        callee = Callee()
        coalescer = Coalescer(callee)
        asked = ask(coalescer, 1, 2, 3, -4, 5)
        await settle()
        assert callee.calls == [[1], [2]]
        callee.let.release()
        await settle()
        assert callee.calls == [[1], [2], [3, -4, 5]]
        callee.let.release()
        callee.let.release()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert answers[:3] + answers[4:] == [2, 4, 6, 10]
        assert isinstance(answers[3], ValueError)
        assert not any((coalescer._waiting, coalescer._calls, coalescer._timer))

    asyncio.run(run())


def test_where_calls_are_slow_requests_do_not_wait_for_them():
    async def run():
        callee = Callee()
        asked = ask(Coalescer(callee), 1, 2, 3, 4)
        await asyncio.sleep(10 * PATIENCE_SECONDS)
        assert callee.calls == [[1], [2], [3, 4]]
        for _ in callee.calls:
            callee.let.release()
        assert await asyncio.gather(*asked) == [2, 4, 6, 8]

    asyncio.run(run())


def test_a_call_that_fails_fails_for_those_in_it_alone():
    async def run():
        callee = Callee()
        coalescer = Coalescer(callee)
        asked = ask(coalescer, 1, 2, 13, 4)
        await settle()
        for _ in range(4):
            callee.let.release()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert answers[:2] == [2, 4]
        assert [str(error) for error in answers[2:]] == ["gone", "gone"]
        assert await coalescer.ask(5) == 10

    asyncio.run(run())


def test_whoever_gives_up_is_not_asked_for():
    async def run():
        callee = Callee()
        coalescer = Coalescer(callee)
        asked = ask(coalescer, 1, 2, 3, 4)
        await settle()
        for gone in (asked[0], asked[2]):  # One is under way, the other waits.
            gone.cancel()
        await settle()
        for _ in range(3):
            callee.let.release()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers] == [asyncio.CancelledError, int] * 2
        assert callee.calls == [[1], [2], [4]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.coalescing.PATIENCE_SECONDS", 60)
        asyncio.run(run())


def test_a_call_is_nobodys_and_all_hear_of_its_end():
    """Serve cancels what is called on behalf of a request whose client leaves."""
    who, callers, calls = ContextVar("who", default="nobody"), [], []

    async def call(items):
        callers.append(who.get())
        calls.append(asyncio.current_task())
        await asyncio.sleep(60)

    async def run():
        coalescer = Coalescer(call)

        async def request(name):
            who.set(name)
            return await coalescer.ask(name)

        asked = [asyncio.create_task(request(name)) for name in ("a", "b", "c", "d")]
        await asyncio.sleep(10 * PATIENCE_SECONDS)
        assert callers == ["nobody"] * 3
        for under_way in calls:
            under_way.cancel()
        async with asyncio.timeout(5):
            answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers] == [ConnectionError] * 4

    asyncio.run(run())


def test_work_is_finished_for_those_who_stay():
    done = []

    async def work():
        await asyncio.sleep(0.1)
        done.append(WHO.get())
        return 7

    async def run():
        WHO.set("who leaves")
        left = asyncio.create_task(background.finish(work()))
        await settle()
        left.cancel()
        assert await background.finish(work()) == 7
        assert left.cancelled()

    asyncio.run(run())
    assert done == ["nobody"] * 2
