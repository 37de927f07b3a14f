"""Copies are found, classes keep their share on both sides of the split, and labels their order."""

import hashlib
import json

import numpy as np
import pytest

from biggan.data.dataset import Rejected
from biggan.data.plan import Preparation
from biggan.data.selection import Copies, Selection, Tally, hold_out
from biggan.data.shards import Record
from biggan.data.sources.digits import DigitsSource


class Labelled(DigitsSource):
    """A source of nothing but labels."""

    def __init__(self, labels, held_out=None):
        self.labels = np.array(labels, dtype=np.int32)
        self.classes = [f"class {i}" for i in range(max(labels) + 1)]
        self.held_out = held_out


def images(pixels):
    """A record of images that are equal where their numbers are; None is a rejected one."""
    record = Record.blank(len(pixels))
    for row, value in enumerate(pixels):
        if value is not None:
            record.kept[row] = True
            record.pixels[row, 3] = value
            record.digests[row, 31] = row
            record.sizes[row] = (row + 1, 10)
    return record


def choose(source, pixels, **choices):
    return Selection.choose(Preparation("digits", 8, **choices), source, images(pixels))


def test_a_record_survives_its_file():
    record = images([1, None, 2])
    record.rejected.append(Rejected(path="a", reason="ü"))
    again = Record.from_bytes(record.to_bytes())
    assert again.rejected == record.rejected
    for key, value in record.arrays().items():
        assert np.array_equal(value, again.arrays()[key]), key


def test_copies_are_those_beyond_the_first():
    copies = Copies.find(images([5, 7, 5, None, 7, 5, 9]))
    assert list(zip(copies.items, copies.firsts, strict=True)) == [(2, 0), (4, 1), (5, 0)]
    assert len(Copies.find(images([1, 2, 3]))) == 0
    assert len(Copies.find(images([]))) == 0


def test_copies_are_dropped_on_demand_only():
    source = Labelled([0, 1, 0, 1, 0, 0])
    chosen = choose(source, [5, 5, 5, 6, 7, None])
    assert chosen.train.tolist() == [True] * 5 + [False]
    assert (len(chosen.copies), chosen.conflicting) == (2, 1)
    chosen = choose(source, [5, 5, 5, 6, 7, None], drop_duplicates=True)
    assert chosen.train.tolist() == [True, False, False, True, True, False]
    assert chosen.counts(chosen.train) == [2, 1]


def test_a_class_without_images_to_train_on_leaves_no_gap():
    source = Labelled([0, 1, 2, 1, 2, 0])
    chosen = choose(source, [1, None, 2, None, 3, 4])
    assert chosen.classes == ["class 0", "class 2"]
    assert chosen.renumbered[[0, 2]].tolist() == [0, 1]
    assert chosen.counts(chosen.train) == [2, 2]
    copies = choose(Labelled([0, 1, 0]), [1, 1, 2], drop_duplicates=True)
    assert copies.classes == ["class 0"]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_each_class_keeps_its_share_on_both_sides(fraction):
    labels = np.random.default_rng(0).choice(5, 3000, p=[0.5, 0.3, 0.19, 0.008, 0.002])
    every = np.ones(len(labels), dtype=bool)
    held_out = hold_out(labels, every, every, fraction, seed=0)
    sizes = np.bincount(labels)
    taken = np.bincount(labels[held_out], minlength=5)
    assert np.array_equal(taken, np.maximum(np.rint(sizes * fraction), 1).astype(int))
    assert np.array_equal(held_out, hold_out(labels, every, every, fraction, seed=0))
    assert not np.array_equal(held_out, hold_out(labels, every, every, fraction, seed=1))


def test_two_of_a_class_are_left_to_train_on():
    labels = np.array([0, 0, 1, 1, 1, 2])
    every = np.ones(6, dtype=bool)
    held_out = hold_out(labels, every, every, 0.5, seed=0)
    assert np.bincount(labels[held_out], minlength=3).tolist() == [0, 1, 0]


def test_copies_never_stand_on_both_sides():
    pixels = [i // 2 if i < 40 else i for i in range(100)]  # Twenty pairs, sixty single ones.
    source = Labelled([0] * 100)
    held_out = choose(source, pixels, held_out=0.5).held_out
    assert held_out.sum() == 50
    assert not held_out[:40].any()
    dropped = choose(source, pixels, held_out=0.5, drop_duplicates=True)
    assert (dropped.train.sum(), dropped.held_out.sum()) == (40, 40)


def test_a_split_of_the_source_is_kept():
    test_part = np.array([False, True, False, True, True, False])
    chosen = choose(Labelled([0, 0, 1, 1, 2, 1], test_part), range(6), held_out=0.5)
    assert np.flatnonzero(chosen.train).tolist() == [0, 2, 5]
    assert np.flatnonzero(chosen.held_out).tolist() == [1, 3]  # Class 2 has nothing to train on.
    assert chosen.classes == ["class 0", "class 1"]


def test_the_fingerprint_is_of_sorted_digests():
    chosen = choose(Labelled([0, 0, 0]), [3, 1, 2])
    digests = sorted(row.tobytes() for row in chosen.images.digests)
    assert chosen.fingerprint("8x1", chosen.train) == (
        hashlib.sha256(b"8x1" + b"".join(digests)).hexdigest()
    )
    assert chosen.sizes() == {"width": [1, 2, 3], "height": [10, 10, 10]}
    json.dumps([chosen.sizes(), chosen.counts(chosen.train)])


def test_rejects_are_counted_by_reason_and_come_in_order():
    tally = Tally(6)
    for shard, items in ((1, [3, 4, 5]), (0, [0, 1, 2])):
        record = Record.blank(3)
        record.rejected = [
            Rejected(path=f"{i}", reason=f"truncated ({i + 7} bytes)") for i in items
        ]
        tally.add(shard, np.array(items), record)
    assert [entry.path for entry in tally.rejected] == list("012345")
    assert dict(tally.reasons) == {"truncated (N bytes)": 6}
    assert tally.bad == tally.done == 6
