"""Every item is dealt once, neighbours stay together, and a plan's name says what it writes."""

import numpy as np
import pytest
from PIL import Image

from biggan.data.plan import SHARD_BYTES, SHARD_IMAGES, Plan, Preparation, plan_key
from biggan.data.sources import open_source
from biggan.latents import Stream, rng


@pytest.mark.parametrize("run", [1, 7, 100, 1024, 1025, 3000, 10_000])
@pytest.mark.parametrize("n", [1, 999, 5000, 10_001])
def test_every_item_is_dealt_once_in_shards_of_bounded_size(n, run):
    plan = Plan(n, run, 100)
    shards = [plan.items(i) for i in range(len(plan))]
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(n))
    assert max(map(len, shards)) <= SHARD_IMAGES
    assert min(map(len, shards)) >= 1
    whole = min(run, 500)  # Neighbours are read together, in order, up to the border of a run.
    for items in shards:
        breaks = np.flatnonzero(np.diff(items) != 1) + 1
        for piece in np.split(items, breaks)[:-1] if run <= SHARD_IMAGES else []:
            assert piece[-1] % run == run - 1 or piece[-1] == n - 1 or len(piece) >= whole


def test_single_items_come_in_the_order_that_they_always_had():
    plan = Plan(3000, 1, 100)
    dealt = np.concatenate([plan.items(i) for i in range(len(plan))])
    assert np.array_equal(dealt, rng(0, Stream.DATA_ORDER).permutation(3000))


def test_a_shard_of_large_images_is_short():
    plan = Plan(10_000, 1, 512 * 512 * 3)
    assert len(plan.items(0)) * 512 * 512 * 3 <= SHARD_BYTES


def test_a_sample_is_from_all_over():
    sample = Plan(100_000, 1000, 100).sample(256)
    assert len(np.unique(sample)) == 256
    assert len(np.unique(sample // 1000)) == 8
    assert len(Plan(5, 1, 100).sample(256)) == 5


def test_the_key_follows_whatever_changes_what_is_written(tmp_path):
    for name in ("a/0", "a/1", "b/0", "b/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")

    def key(**changes):
        choices = {"resolution": 8, "channels": 1} | changes
        return plan_key(Preparation(str(tmp_path), **choices), open_source(str(tmp_path)))

    first = key()
    assert key(max_rejected=0.5, min_class_images=1, allow=("gaps",)) == first
    changed = [
        key(resolution=16),
        key(channels=3),
        key(fit="pad"),
        key(held_out=0.1),
        key(held_out=0.1, seed=1),
        key(drop_duplicates=True),
        key(allow=("empty-images",)),
    ]
    Image.new("L", (8, 8), 1).save(tmp_path / "a/0.png")
    changed.append(key())
    (tmp_path / "a/0.png").rename(tmp_path / "b/2.png")
    changed.append(key())
    assert len({first, *changed}) == len(changed) + 1
