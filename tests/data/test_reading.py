"""Reading: every image once an epoch, in an order of seed and epoch alone, however it is read."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny, train_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import biggan
from biggan.candidates import load_checkpoint
from biggan.checkpoint import STATE
from biggan.config import ConfigError, RunConfig
from biggan.data import decoded
from biggan.data.batches import Batches, Prefetch
from biggan.data.dataset import Dataset, DatasetInfo, open_dataset, read_info
from biggan.data.order import BalancedOrder, WindowedOrder, quotas
from biggan.data.parts import encode
from biggan.data.reading import with_settled_mode
from biggan.data.stream import StreamReader
from biggan.distributed import Scaling
from biggan.errors import UserError
from biggan.parallel import ALONE, CPU, Workers
from biggan.runs import best_checkpoint, checkpoints, read_metrics
from biggan.storage import Folder, StorageError, locate

COUNTS = {"common": 60, "rare": 33, "scarce": 10}
PARTS = [25, 25, 0, 25, 25, 3]
N = 103


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """103 images of 8 pixels in uneven parts; the first pixel is the number."""
    folder = Folder(str(tmp_path_factory.mktemp("numbered")))
    pixels = np.random.default_rng(0).integers(256, size=(N, 8, 8, 1), dtype=np.uint8)
    pixels[:, 0, 0, 0] = range(N)
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], list(COUNTS.values())))
    start = 0
    for k, size in enumerate(PARTS):
        rows = slice(start, start + size)
        columns = {
            "image": pa.array([encode(image) for image in pixels[rows]], pa.binary()),
            "label": pa.array(labels[rows], pa.int32()),
            "source": pa.array([""] * size, pa.string()),
        }
        file = f"{folder.path}/part-{k:06d}.parquet"
        pq.write_table(pa.table(columns), file, row_group_size=10)
        start += size
    info = DatasetInfo(
        classes=list(COUNTS),
        resolution=8,
        channels=1,
        counts=list(COUNTS.values()),
        fingerprint="f" * 64,
        source={},
        rejected=[],
    )
    folder.write_json("dataset.json", info.model_dump())
    return folder, torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, in which even the smallest dataset gets a file."""
    monkeypatch.setenv("BIGGAN_CACHE", str(tmp_path))
    monkeypatch.setattr(decoded, "IN_MEMORY", 0)
    return tmp_path / "decoded"


def reading(**changes):
    return tiny(optim__batch_size=24, optim__accumulation=2, seed=5, **changes)


def numbers(images):
    """Which images of `numbered` these are."""
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


def shown(config, dataset, size, steps, first=0, stream=None):
    """Image numbers at all positions of some steps, put together from all workers."""
    batches = [Batches(config, dataset, Workers(rank, size, CPU), stream) for rank in range(size)]
    order = []
    for step in range(first, first + steps):
        d = [b.inputs(step).d for b in batches]
        for k in range(config.optim.num_D_steps):
            for micro in range(config.optim.accumulation):
                order += [i for inputs in d for i in numbers(inputs[k][micro][0].images)]
    for b in batches:
        b.close()
    return order


class WithoutRay(StreamReader):
    """Runs the stream's tasks in place, one window after the other."""

    def _windows(self, first):
        task = self._task()
        while True:
            yield task({"window": np.array([first])})
            first += 1


WINDOW = 30 * 64 / 2**20  # 30 of these images: parts of 25 come one by one.


@pytest.mark.parametrize("mode", ["memory", "stream"])
def test_every_image_once_an_epoch_whatever_the_workers(numbered, mode):
    folder, _, _ = numbered
    config = reading(data__mode=mode, data__window_mib=WINDOW, optim__num_D_steps=2)
    dataset = Dataset.open(folder.uri, mode=mode)
    orders = [shown(config, dataset, size, 7, stream=WithoutRay) for size in (1, 2, 3, 6)]
    assert orders[1:] == orders[:1] * 3
    order = orders[0]  # 7 * 48 = 336 positions, three epochs of 103 and a bit.
    epochs = [order[i : i + N] for i in range(0, 3 * N, N)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(N))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    # From any step on, it is the same.
    assert shown(config, dataset, 2, 3, first=3, stream=WithoutRay) == order[144 : 144 + 144]
    other = shown(config.override({"seed": 6}), dataset, 1, 7, stream=WithoutRay)
    assert other != order


def test_a_batch_is_labelled_as_its_images_are(numbered):
    folder, _, labels = numbered
    for mode in ("memory", "stream"):
        dataset = Dataset.open(folder.uri, mode=mode)
        inputs = Batches(reading(), dataset, ALONE, WithoutRay).inputs(3)
        for real, _ in inputs.d[0]:
            assert real.labels.tolist() == labels[numbers(real.images)].tolist()


def test_windows_are_whole_parts_in_turn():
    order = WindowedOrder(PARTS, 60, seed=1)  # Two parts of 25 go into 60, three do not.
    assert order.windows_per_epoch == 3
    part_of = np.repeat(range(6), PARTS)
    position = 0
    for number in range(9):
        start, images = order.window(number)
        assert start == position
        assert len(images) <= 60
        assert all(np.sum(part_of[images] == p) == PARTS[p] for p in set(part_of[images]))
        assert {order.window_at(p) for p in range(start, start + len(images))} <= {number}
        position += len(images)
    assert position == 3 * N
    assert WindowedOrder(PARTS, 1, seed=1).windows_per_epoch == 6  # One part at least.


def test_images_are_those_of_the_parts_however_they_are_held(numbered, cache, monkeypatch):
    folder, pixels, labels = numbered
    mapped, stored = Dataset.open(folder.uri), Dataset.open(folder.uri, mode="stream")
    assert torch.equal(mapped.images, pixels)
    assert len(list(cache.glob("*.u8"))) == 1
    monkeypatch.setattr(decoded, "IN_MEMORY", 2**20)
    plain = Dataset.open(folder.uri)
    some = torch.tensor([102, 0, 99, 100, 26, 0, 24])
    for dataset in (mapped, stored, plain):
        assert len(dataset) == len(dataset.images) == N
        assert dataset.images.shape == (N, 1, 8, 8)
        assert torch.equal(dataset.labels, labels)
        assert torch.equal(dataset.images[some], pixels[some])
        assert torch.equal(dataset.images[20:55:2], pixels[20:55:2])
        assert torch.equal(dataset.images[-3:], pixels[-3:])
        split = dataset.images.split(40)
        assert all(torch.equal(a, b) for a, b in zip(split, pixels.split(40), strict=True))


def test_what_was_decoded_is_used_again_and_made_again_where_damaged(numbered, cache):
    folder, pixels, _ = numbered
    said = []
    for _ in range(2):
        assert torch.equal(Dataset.open(folder.uri, progress=said.append).images, pixels)
    assert len(said) == 1
    assert "103/103 images" in said[0]
    (file,) = cache.glob("*.u8")
    file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(Dataset.open(folder.uri, progress=said.append).images, pixels)
    assert len(said) == 2
    (cache / f"{file.stem}.partial").write_bytes(b"left by a writer that was killed")
    file.unlink()
    assert torch.equal(Dataset.open(folder.uri).images, pixels)
    assert {path.suffix for path in cache.iterdir()} == {".u8", ".lock"}


def test_the_processes_of_a_machine_decode_once(numbered, cache):
    folder, pixels, _ = numbered
    code = f"""
import time
from biggan.data import decoded
from biggan.data.dataset import Dataset
from biggan.data.parts import StoredImages
decoded.IN_MEMORY = 0
parts = StoredImages.parts
def slowly(self):
    time.sleep(1)
    return parts(self)
StoredImages.parts = slowly
print(int(Dataset.open({folder.uri!r}, progress=print).images.sum()))
"""
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0].splitlines() for process in both]
    assert [lines[-1] for lines in said] == [str(int(pixels.sum()))] * 2
    assert sorted(len(lines) for lines in said) == [1, 2]  # One told of decoding.


def test_what_was_not_used_for_longest_makes_room(numbered, cache, monkeypatch):
    folder, _, _ = numbered
    size = N * 64
    monkeypatch.setenv("BIGGAN_CACHE_GIB", str(2.5 * size / 2**30))
    cache.mkdir()
    for age, name in enumerate(("newer", "older")):
        (cache / f"{name}.u8").write_bytes(bytes(size))
        os.utime(cache / f"{name}.u8", (1e9 - age, 1e9 - age))
    Dataset.open(folder.uri).images  # noqa: B018
    assert not (cache / "older.u8").exists()
    assert (cache / "newer.u8").exists()
    monkeypatch.setenv("BIGGAN_CACHE_GIB", str(0.5 * size / 2**30))
    rare = Dataset.open(folder.uri, classes=["rare"])
    assert len(rare.images) == 33  # That many still fit.
    monkeypatch.setenv("BIGGAN_CACHE_GIB", str(0.1 * size / 2**30))
    with pytest.raises(StorageError, match=r"set BIGGAN_CACHE to a larger disk.*data.mode"):
        Dataset.open(folder.uri, classes=["common"]).images  # noqa: B018


def test_auto_reads_from_memory_what_fits(numbered, cache, monkeypatch, tmp_path):
    folder, _, _ = numbered
    config, info = reading(dataset=folder.uri), DatasetInfo.read(folder)
    assert Dataset.open(folder.uri, mode="auto").mode == "memory"
    for variable in ("BIGGAN_MEMORY_GIB", "BIGGAN_CACHE_GIB"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1e-9")
            assert Dataset.open(folder.uri, mode="auto").mode == "stream"
            patch.setenv(variable, "plenty")
            with pytest.raises(UserError, match=f"{variable} is 'plenty': must be a number"):
                decoded.fits(1)
    run = Folder(str(tmp_path / "run"))
    monkeypatch.setenv("BIGGAN_MEMORY_GIB", "1e-9")
    with pytest.raises(ConfigError, match=r"data.balance = 'sqrt' needs the dataset in memory"):
        with_settled_mode(config.override({"data.balance": "sqrt"}), info, run, ALONE)
    assert with_settled_mode(config, info, run, ALONE).data.mode == "stream"
    monkeypatch.delenv("BIGGAN_MEMORY_GIB")
    # A run that goes on reads as it began; another one, and one that was told, do not.
    assert with_settled_mode(config, info, run, ALONE).data.mode == "stream"
    other = Folder(str(tmp_path / "other"))
    assert with_settled_mode(config, info, other, ALONE).data.mode == "memory"
    told = config.override({"data.mode": "memory"})
    assert with_settled_mode(told, info, run, ALONE).data.mode == "memory"


def test_a_stream_needs_ray_and_no_balance(numbered):
    folder, _, _ = numbered
    dataset = Dataset.open(folder.uri, mode="stream")
    with pytest.raises(ConfigError, match=r"data.mode is stream, which reads with Ray Data: train"):
        Batches(reading(), dataset, ALONE)
    with pytest.raises(ConfigError, match=r"data.balance 'uniform' picks images from all"):
        reading(data__mode="stream", data__balance="uniform")


def test_a_stream_shows_what_its_windows_say_also_from_the_middle(numbered, cluster):
    folder, _, _ = numbered
    config = reading(data__window_mib=WINDOW)
    dataset = Dataset.open(folder.uri, mode="stream")
    order = WindowedOrder(PARTS, 30, config.seed)
    expected = np.concatenate([order.window(number)[1] for number in range(12)]).tolist()
    assert shown(config, dataset, 2, 8, stream=StreamReader) == expected[: 8 * 24]
    # Position 120 is in the second epoch, and where no window begins.
    assert order.window(order.window_at(120))[0] < 120
    assert shown(config, dataset, 1, 3, first=5, stream=StreamReader) == expected[120:192]


def test_a_stream_reads_no_further_than_a_few_windows(numbered, cluster, tmp_path, monkeypatch):
    folder, _, _ = numbered
    log = tmp_path / "windows"
    task = StreamReader._task

    def noted(self):
        read = task(self)

        def note(batch):
            with log.open("a") as file:
                file.write("x")
            return read(batch)

        return note

    monkeypatch.setattr(StreamReader, "_task", noted)
    config = reading(data__window_mib=WINDOW)
    reader = Batches(config, Dataset.open(folder.uri, mode="stream"), ALONE, StreamReader)
    reader.inputs(0)
    time.sleep(1)
    assert len(log.read_text()) <= 16  # Of 512 planned. These are tiny: Ray counts in kilobytes.
    reader.close()


STREAMED = tiny(dataset="sliced", data__mode="stream", data__window_mib=1e-3, optim__accumulation=2)
"""16 steps of 32: five windows of one part, which borders of steps do not meet."""


@pytest.fixture(scope="module")
def sliced(digits):
    """The digits in parts of 100."""
    folder = locate("datasets", "sliced")
    with digits.folder.local_copy() as local:
        folder.upload(local)
        parts = sorted(local.glob("part-*.parquet"))
        table = pa.concat_tables([pq.read_table(part) for part in parts])
    for k in range(18):
        pq.write_table(table.slice(100 * k, 100), f"{folder.path}/part-{k:06d}.parquet")
    return Dataset.open("sliced", mode="stream")


def final_state(run):
    name = list(checkpoints(run))[-1]
    return torch.load(f"{run.path}/{name}/{STATE}", weights_only=True)


def test_a_streamed_run_broken_off_ends_as_an_undisturbed_one(sliced, tmp_path):
    whole, broken = (Folder(str(tmp_path / name)) for name in ("whole", "broken"))
    assert train_here(STREAMED, whole, sliced, stream=StreamReader) == "finished"
    with pytest.raises(InterruptedError):
        train_here(STREAMED, broken, sliced, stop_after=1, stream=StreamReader)
    assert train_here(STREAMED, broken, sliced, stream=StreamReader) == "finished"
    for network in ("G", "D", "G_ema"):
        ours, theirs = final_state(broken)[network], final_state(whole)[network]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_streaming_workers_follow_one(sliced, tmp_path):
    config = STREAMED.override({"total_kimg": 0.256})
    two = biggan.train(config, "streamed", scaling=Scaling(workers=2, cpus_per_worker=1))
    assert two.stop_reason == "finished"
    dataset = open_dataset(config)
    one = Folder(str(tmp_path / "one"))
    assert train_here(config, one, dataset, stream=StreamReader) == "finished"
    ours, theirs = final_state(two.folder), final_state(one)
    for network in ("G", "D", "G_ema"):
        for name, expected in theirs[network].items():
            difference = (ours[network][name] - expected).norm() / expected.norm()
            assert difference < 1e-3, f"{network}.{name}"


def test_quotas_by_hand():
    counts = [100, 25, 4, 0, 1]  # Roots 10, 5, 2, 0 and 1 of 18; 130 images.
    assert quotas(counts, "off").tolist() == counts
    # 72.2, 36.1, 14.4 and 7.2 come to 129; the largest remainder is 0.4's.
    assert quotas(counts, "sqrt").tolist() == [72, 36, 15, 0, 7]
    # 32.5 each: the first two get what is left over.
    assert quotas(counts, "uniform").tolist() == [33, 33, 32, 0, 32]


@pytest.mark.parametrize("balance", ["off", "sqrt", "uniform"])
def test_classes_and_their_images_are_shown_evenly(numbered, balance):
    folder, _, labels = numbered
    dataset = Dataset.open(folder.uri)
    config = reading(data__balance=balance)
    order = shown(config, dataset, 1, 26)  # 624 positions: six epochs of 103.
    assert shown(config, dataset, 3, 5, first=7) == order[7 * 24 : 12 * 24]
    wanted = quotas(list(COUNTS.values()), balance)
    for epoch in range(6):
        of_epoch = torch.tensor(order[epoch * N : (epoch + 1) * N])
        assert torch.bincount(labels[of_epoch]).tolist() == wanted.tolist()
    times = Counter(order[: 5 * N])
    for k in range(3):
        of_class = [times[i] for i in range(N) if labels[i] == k]
        assert max(of_class) - min(of_class) <= 1
        assert sum(of_class) == 5 * wanted[k]


def test_fakes_are_as_often_of_a_class_as_reals(numbered):
    folder, _, _ = numbered
    dataset = Dataset.open(folder.uri)
    config = reading(data__balance="uniform")
    batches = Batches(config, dataset, ALONE)
    labels = torch.cat([f.labels for step in range(200) for f in batches.inputs(step).g])
    share = torch.bincount(labels).double() / len(labels)
    assert share.tolist() == pytest.approx([1 / 3] * 3, abs=0.03)
    # FID's labels are in the dataset's proportions.
    spread = torch.bincount(dataset.class_sampler.spread(N)).tolist()
    assert spread == list(COUNTS.values())


def test_a_class_of_one_image_among_thousands():
    labels = np.array([0] * 999 + [1])
    order = BalancedOrder(labels, "uniform", seed=0)
    indices = order.indices(0, 3000)
    assert (indices == 999).sum() == 1500
    assert np.bincount(indices, minlength=1000)[:999].tolist().count(1) == 498  # 1500 of 999.


def test_a_subset_of_the_classes(numbered):
    folder, pixels, labels = numbered
    whole = DatasetInfo.read(folder)
    dataset = Dataset.open(folder.uri, classes=["scarce", "common"])
    assert dataset.info.classes == ["common", "scarce"]  # In the dataset's order.
    assert dataset.info.counts == [60, 10]
    assert dataset.class_ids == [0, 2]
    assert dataset.info.fingerprint not in (whole.fingerprint, whole.subset(["rare"]).fingerprint)
    assert dataset.info == whole.subset(["common", "scarce"])
    assert dataset.info.source["subset_of"] == whole.fingerprint
    assert torch.equal(dataset.images, pixels[labels != 1])
    assert torch.equal(dataset.labels, labels[labels != 1] // 2)
    streamed = Dataset.open(folder.uri, classes=["scarce"], mode="stream")
    order = shown(reading(), streamed, 2, 5, stream=WithoutRay)  # 12 epochs of ten images.
    assert Counter(order) == dict.fromkeys(torch.nonzero(labels == 2)[:, 0].tolist(), 12)
    assert whole.subset([]) == whole.subset(["rare", "scarce", "common"]) == whole
    config = reading(dataset=folder.uri, data__classes=["rare"])
    assert open_dataset(config).info == read_info(config) == whole.subset(["rare"])


def test_mistakes_in_the_names_of_classes(numbered, digits):
    folder, _, _ = numbered
    with pytest.raises(ConfigError, match=r"has no class 'scarse': did you mean 'scarce'\?"):
        Dataset.open(folder.uri, classes=["rare", "scarse"])
    with pytest.raises(ConfigError, match=r"no class 'q'; it has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9$"):
        biggan.train(tiny(data__classes=["q"]), "nobody")
    with pytest.raises(ConfigError, match=r"data.classes.*'a' is named twice"):
        RunConfig().override({"data.classes": ["a", "b", "a"]})
    assert RunConfig.parse({"data": {"classes": [0, 7], "balance": False}}).data.classes == (
        "0",
        "7",
    )


def test_a_generator_of_a_subset_knows_those_classes_alone(digits):
    config = tiny(data__classes=["7", "3"], total_kimg=0.256)
    run = locate("runs", "subset")
    assert train_here(config, run, open_dataset(config)) == "finished"
    G = load_checkpoint(best_checkpoint(run)[0], CPU).G
    assert G.class_names == ["3", "7"]
    assert G.n_classes == 2
    with pytest.raises(ConfigError, match="other images"):
        train_here(
            config.override({"data.classes": ["3", "8"]}),
            run,
            Dataset.open("digits", classes=["3", "8"]),
        )
    assert biggan.evaluate(run="subset", num_samples=64).protocol["reference_fingerprint"] == (
        digits.info.subset(["3", "7"]).fingerprint
    )


def test_metrics_say_how_long_a_step_waited_for_its_inputs(digits, tiny_run, tmp_path, monkeypatch):
    assert all(0 <= row["data_wait"] < 1 for row in read_metrics(tiny_run))
    ready = Prefetch.inputs

    def late(self, step):
        time.sleep(0.2)
        return ready(self, step)

    monkeypatch.setattr(Prefetch, "inputs", late)
    monkeypatch.setattr("biggan.journal.LINE_EVERY_SECONDS", 0)
    run, said = Folder(str(tmp_path / "slow")), []
    train_here(tiny(total_kimg=0.256), run, digits, say=said.append)
    (row,) = read_metrics(run)
    seconds = 256 / row["images_per_second"]
    assert 8 * 0.2 <= row["data_wait"] * seconds < seconds  # In eight steps.
    assert any("% waiting for images" in line for line in said)
    tags = EventAccumulator(run.path).Reload().Tags()["scalars"]
    assert "data_wait" in tags
    for key in ("loss_D", "fid"):
        assert row[key] == read_metrics(tiny_run)[0][key]


def test_prefetching_changes_nothing_wherever_it_jumps(digits):
    batches = Batches(tiny(data__flip=True, augment__name="ada"), digits, ALONE)
    prefetch = Prefetch(batches, 0)
    for step in (0, 1, 2, 7, 8, 0, 1):
        ahead, alone = prefetch.inputs(step), batches.inputs(step)
        for (real, fake), (real_alone, fake_alone) in zip(ahead.d[0], alone.d[0], strict=True):
            assert torch.equal(real.images, real_alone.images)
            assert torch.equal(fake.z, fake_alone.z)
            assert torch.equal(real.noise, real_alone.noise)
    prefetch.close()


def test_what_goes_wrong_ahead_is_raised_in_the_loop(digits, tmp_path, monkeypatch):
    read = Batches.load

    def failing(self, step):
        if step == 5:
            raise OSError("the disk is gone")
        return read(self, step)

    monkeypatch.setattr(Batches, "load", failing)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        train_here(tiny(), Folder(str(tmp_path / "failing")), digits)
    assert "failing" in [entry.name for entry in caught.traceback]
    assert not [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_a_damaged_part_is_named(numbered, tmp_path):
    folder, _, _ = numbered
    copy = Folder(str(tmp_path / "copy"))
    copy.upload(tmp_path.__class__(folder.path))
    part = tmp_path / "copy" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"part-000001.parquet cannot be read"):
        Dataset.open(copy.uri)
    part.write_bytes(part.with_name("part-000000.parquet").read_bytes())
    with pytest.raises(StorageError, match="other numbers of images of some class"):
        Dataset.open(copy.uri)


def test_images_that_were_set_aside_are_read_by_themselves(numbered, tmp_path):
    folder, pixels, labels = numbered
    copy = Folder(str(tmp_path / "copy"))
    copy.upload(tmp_path.__class__(folder.path))
    (tmp_path / "copy" / "part-000005.parquet").rename(
        tmp_path / "copy" / "held_out-000000.parquet"
    )
    held_out = torch.bincount(labels[100:], minlength=3)
    description = json.loads((tmp_path / "copy" / "dataset.json").read_text())
    description["counts"] = (torch.tensor(description["counts"]) - held_out).tolist()
    description["held_out"] = held_out.tolist()
    copy.write_json("dataset.json", description)
    assert torch.equal(Dataset.open(copy.uri).images, pixels[:100])
    aside = Dataset.open(copy.uri, split="held_out")
    assert torch.equal(aside.images, pixels[100:])
    assert torch.equal(aside.labels, labels[100:])
