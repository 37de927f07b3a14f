"""How many images a batch should have, and how many may be in hand."""

import pytest
from local_endpoint import random_generator

from biggan.directions import find_directions
from serving.batching import MAX_EXCESS
from serving.loading import BATCH_SECONDS, MAX_BATCH_IMAGES, Loaded, Pace
from serving.rendering import DEFAULT, Renderer


def test_batches_become_what_a_model_makes_in_their_time():
    pace = Pace()  # As if one image took it all.
    for _ in range(100):  # A batch takes 4 ms, and each image of it 2 ms.
        pace.note(pace.limit, 0.004 + 0.002 * pace.limit)
    assert pace.limit == pytest.approx((BATCH_SECONDS - 0.004) / 0.002, abs=1)
    for _ in range(100):  # It becomes slower.
        pace.note(pace.limit, 0.004 + 0.01 * pace.limit)
    assert pace.limit == pytest.approx((BATCH_SECONDS - 0.004) / 0.01, abs=1)


def test_neither_chance_nor_small_batches_change_them_by_much():
    pace = Pace(cost=BATCH_SECONDS / 20.5)
    pace.note(20, 10 * BATCH_SECONDS)
    assert pace.limit >= 16
    for _ in range(50):
        pace.note(20, BATCH_SECONDS)
    assert pace.limit >= 19
    before = pace.limit
    for _ in range(50):  # An image alone is dear.
        pace.note(1, BATCH_SECONDS / 2)
    assert pace.limit == before


def test_they_have_bounds():
    slow, fast = Pace(), Pace()
    for _ in range(200):
        slow.note(1, 60.0)
        fast.note(fast.limit, 0.0)
    assert (slow.limit, fast.limit) == (1, MAX_BATCH_IMAGES)


def test_fewer_wait_where_many_are_turned_away():
    G = random_generator(0)
    loaded = Loaded(G, find_directions(G), Renderer(G, DEFAULT))
    loaded.pace = Pace(cost=BATCH_SECONDS / 10.5)
    assert loaded.room == 20  # A batch that is done, and another.
    loaded.threads = 2
    assert loaded.room == 50
    loaded.demand.excess = 1.0
    assert loaded.room == 50
    loaded.demand.excess = 2.0
    assert loaded.room == 10 * 2 + 15
    loaded.demand.excess = MAX_EXCESS
    assert loaded.room == 10 * 2 + 5
