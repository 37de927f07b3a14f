"""The model store, and what moves `best`."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from conftest import add_imported, tiny, train_here
from PIL import Image
from safetensors.torch import load_file

import biggan
from biggan import claim as claims
from biggan import promotion as promotions
from biggan.candidates import load_checkpoint
from biggan.claim import ClaimError
from biggan.config import ModelConfig
from biggan.errors import UserError
from biggan.metrics.report import Evaluation, Measure
from biggan.models import CARD, ModelStore, find_model, load_card, split_reference
from biggan.networks import Generator
from biggan.parallel import CPU
from biggan.promotion import best_trial
from biggan.runs import best_checkpoint
from biggan.storage import Folder, StorageError, locate


@pytest.fixture(scope="module")
def worse_run(digits):
    """A run whose generator hardly learns."""
    run = locate("runs", "worse")
    train_here(tiny(optim__lr_g=1e-6, total_kimg=0.256), run, digits)
    return run


def test_a_version_is_what_the_store_promises(tiny_model):
    folder, card = tiny_model.folder, tiny_model.card
    assert set(folder.children()) >= {
        "card.json",
        "config.json",
        "model.safetensors",
        "samples.png",
    }
    assert card.run == "runs/tiny"
    assert card.fid_protocol["extractor"] == "classifier"
    assert card.fid_protocol["standing_statistics"] == 16_384
    assert card.fid_protocol["num_samples"] == 64
    assert card.fid_protocol["tables"] is None
    assert folder.read_json("config.json")["tables"] == {
        "truncations": [0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0],
        "convention": "threshold",
        "images": 2048,
    }
    assert card.hyperparameters == tiny()
    assert Image.open(f"{folder.path}/samples.png").size[0] > 160
    assert tiny_model.is_best
    assert json.loads((folder.parent).read_bytes("aliases.json")) == {"best": "v1"}


def test_the_weights_are_the_best_checkpoints_average(tiny_run, tiny_model):
    candidate = load_checkpoint(best_checkpoint(tiny_run)[0], CPU)
    exported = load_file(f"{tiny_model.folder.path}/model.safetensors")
    for name, expected in candidate.G.state_dict().items():
        moments = name.endswith(("mean", "var"))  # Standing statistics are collected anew.
        assert moments or torch.equal(exported[name], expected), name
    loaded = biggan.load_generator("tiny@v1")
    assert not loaded.training
    assert loaded.class_names == [str(i) for i in range(10)]


def test_a_checkpoint_is_not_exported_twice(tiny_model):
    before = ModelStore("tiny").versions()
    again = biggan.promote(run="tiny", name="tiny")
    assert again.card.model_copy(update={"evaluations": []}) == tiny_model.card
    assert again.reason == "it is tiny@best already"
    assert ModelStore("tiny").versions() == before


def test_a_licence_can_be_stated_later(tiny_model):
    assert tiny_model.card.licence == ""
    assert biggan.promote(run="tiny", name="tiny", licence="MIT").card.licence == "MIT"
    assert load_card(tiny_model.folder).licence == "MIT"


def test_a_run_whose_dataset_has_changed_is_not_promoted(tiny_run, tmp_path):
    run = Folder(str(tmp_path / "moved-on"))
    run.upload(tiny_run.path)
    record = run.read_json("config.json")
    record["dataset"]["fingerprint"] = "0" * 64
    run.write_json("config.json", record)
    with pytest.raises(StorageError, match="was trained on other images than dataset digits"):
        biggan.promote(run=run.uri)


def test_two_promotions_at_once_do_not_overwrite_each_other(tiny_model):
    G, card = biggan.load_generator("tiny"), tiny_model.card
    with pytest.raises(StorageError, match="v1 has come into being meanwhile"):
        ModelStore("tiny").add(G, card, G.sample([0]), 1)


def test_best_moves_only_to_a_lower_fid_unless_forced(tiny_run, worse_run):
    store = ModelStore("contest")
    worse = biggan.promote(run="worse", name="contest")
    assert (worse.is_best, worse.reason) == (True, "the first version")
    card = worse.folder.read_json("card.json")
    del card["fid_protocol"]["tables"]  # As cards were before there were any: None, that is.
    worse.folder.write_json("card.json", card)
    better = biggan.promote(run="tiny", name="contest")
    assert better.card.fid < worse.card.fid
    assert better.is_best
    assert "is lower than the" in better.reason
    assert store.aliases() == {"best": "v2"}
    back = biggan.promote(run="worse", name="contest")
    assert not back.is_best
    assert "is not lower than" in back.reason
    assert store.aliases() == {"best": "v2"}
    assert biggan.promote(run="worse", name="contest", force=True).is_best
    assert store.aliases() == {"best": "v1"}


def test_fids_of_different_protocols_are_not_compared(tiny_run, digits):
    run = locate("runs", "otherwise")
    train_here(tiny(eval__num_samples=128, seed=2), run, digits)
    biggan.promote(run="tiny", name="protocols")
    other = biggan.promote(run="otherwise", name="protocols")
    assert not other.is_best
    assert "is not comparable with that of v1 (num_samples: 64 and 128)" in other.reason


def test_an_imported_model_without_an_fid_is_not_compared(tiny_model):
    add_imported("unmeasured", biggan.load_generator("tiny@v1"))
    promotion = biggan.promote(run="tiny", name="unmeasured")
    assert not promotion.is_best
    assert promotion.reason == "v1 has no FID; --force moves it all the same"
    forced = biggan.promote(run="tiny", name="unmeasured", force=True)
    assert (forced.is_best, forced.reason) == (True, "forced")


def test_the_best_trial_of_a_sweep_is_promoted(tiny_run, worse_run, tmp_path):
    sweep = Folder(str(tmp_path / "sweep"))
    for trial, run in (("trial_00000", worse_run), ("trial_00001", tiny_run)):
        (sweep / trial).upload(run.path)
    assert best_trial(sweep.uri, None).name == "trial_00001"


def test_what_names_a_model(tiny_model):
    folder = tiny_model.folder
    for reference in ("tiny", "tiny@best", "tiny@v1", folder.uri, folder.parent.uri):
        assert find_model(reference).uri == folder.uri
    assert split_reference("s3://bucket/models/a@v2") == ("s3://bucket/models/a", "v2")
    assert split_reference("s3://me@bucket/models/a") == ("s3://me@bucket/models/a", "best")


@pytest.mark.parametrize("reference", ["tiny@v9", "tiny@", "nothing", "tiny@../tiny", "../tiny"])
def test_a_model_that_is_not_there(tiny_model, reference):
    with pytest.raises(StorageError, match=r"is not in the store|use letters"):
        find_model(reference)


def test_aliases_name_whole_versions_only(tiny_model):
    store = ModelStore("tiny")
    with pytest.raises(StorageError, match="model tiny has no version v7"):
        store.set_alias("best", "v7")
    store.set_alias("stable", "v1")
    assert find_model("tiny@stable").name == "v1"


@pytest.mark.parametrize("alias", ["v1", "", "../best", "a@b"])
def test_aliases_that_could_be_taken_for_something_else(tiny_model, alias):
    with pytest.raises(StorageError):
        ModelStore("tiny").set_alias(alias, "v1")


def test_a_rollback_goes_back_the_way_that_an_alias_came(tiny_model, job_here):
    for _ in range(3):
        add_imported("backwards", biggan.load_generator("tiny@v1"))
    store = ModelStore("backwards")
    for version in ("v1", "v2", "v2", "v3", "v1"):
        store.set_alias("stable", version)
    # Whoever means the canary must not take production back.
    wrong = ("--rollback", "backwards", "--alias", "stable", "--force")
    status, said = job_here("promote", *wrong)
    assert (status, "leave --alias, --force out" in said) == (2, True)
    _, back = job_here("promote", "--rollback", "backwards@stable")
    assert back == "backwards@stable: back from v1 to v3\n"
    assert store.roll_back("stable") == ("v3", "v2")
    assert store.roll_back("stable") == ("v2", "v1")
    assert store.aliases() == {"best": "v3", "stable": "v1"}
    for alias, said in (("stable", "was never another"), ("old", "no alias 'old'")):
        with pytest.raises(StorageError, match=said):
            store.roll_back(alias)
    (store.folder / "v2").delete()
    assert store.roll_back("best") == ("v3", "v1")  # v2 is gone.


def test_aliases_that_are_set_at_once_do_not_undo_each_other(storage, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.8)  # Who waits looks again every 0.1 s.
    for _ in range(2):
        add_imported("contended", tiniest())
    store = ModelStore("contended")
    store.set_alias("best", "v2")
    together = threading.Barrier(2)

    def move(alias):
        for version in ("v1", "v2") * 4:
            together.wait(60)
            while True:
                with suppress(ClaimError):  # Told, and not lost.
                    ModelStore("contended").set_alias(alias, version)
                    break

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(move, ["best", "candidate"]))
    assert store.aliases() == {"best": "v2", "candidate": "v2"}
    for alias, moves in (("best", 8), ("candidate", 7)):
        for _ in range(moves):
            store.roll_back(alias)
    assert store.aliases() == {"best": "v2", "candidate": "v1"}


def tiniest():
    config = ModelConfig(ch_g=1, ch_d=1)
    return Generator(config, resolution=16, channels=1, n_classes=2).eval()


def with_fids(name, *fids):
    """A store of versions with these FIDs, of one protocol, the first of which is best."""
    store = ModelStore(name)
    for fid in fids:
        folder = add_imported(name, tiniest())
        card = load_card(folder).model_copy(update={"fid": fid, "fid_protocol": {"images": 64}})
        folder.write_json(CARD, card.model_dump(mode="json"))
    store.set_alias("best", "v1")
    return store


def test_of_promotions_at_once_the_better_is_best(storage, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.8)
    store = with_fids("raced", 10.0, 5.0, 7.0)
    met = threading.Barrier(2)

    def load_late(folder):
        """For v3's promotion, of what is best: the other is done by the time that it has it."""
        card = load_card(folder)
        if threading.current_thread().name.startswith("late"):
            with suppress(threading.BrokenBarrierError):
                met.wait(2)
        return card

    monkeypatch.setattr(promotions, "load_card", load_late)

    def promoted(version):
        while True:
            with suppress(ClaimError):
                return promotions._move_best(store, load_card(store.folder / version), force=False)

    with ThreadPoolExecutor(1, "late") as late:
        third = late.submit(promoted, "v3")
        second, _ = promoted("v2")
        with suppress(threading.BrokenBarrierError):
            met.wait(2)
        third.result()
    assert second
    assert store.aliases()["best"] == "v2"


def test_what_is_noted_at_once_is_all_on_the_card(storage, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.8)
    store = with_fids("noted", 10.0)
    protocols = [{"images": n} for n in range(4)]

    def note(protocol):
        while True:
            with suppress(ClaimError):
                fid = Measure(value=1.0, deviation=None, values=[1.0], protocol=protocol)
                about = {"subject": "noted@v1", "created": "now", "repeats": 1}
                return store.note("v1", Evaluation(measures={"fid": fid}, **about))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(note, protocols))
    noted = load_card(store.folder / "v1").evaluations
    assert sorted(e.protocol["images"] for e in noted) == [0, 1, 2, 3]


def test_a_candidate_leaves_best_alone(tiny_run, tiny_model, worse_run):
    biggan.promote(run="tiny", name="with-candidate")
    promotion = biggan.promote(run="worse", name="with-candidate", alias="candidate")
    assert not promotion.is_best
    assert ModelStore("with-candidate").aliases() == {"best": "v1", "candidate": "v2"}


@pytest.mark.parametrize(
    "file,content,said",
    [
        ("config.json", b"{", "config.json is damaged"),
        ("config.json", b"{}", "config.json is damaged"),
        ("model.safetensors", b"\x80\x04junk", "model.safetensors does not fit its config.json"),
        ("card.json", b"[]", "card.json is damaged"),
    ],
)
def test_a_damaged_file_is_named(tiny_model, tmp_path, file, content, said):
    copy = Folder(str(tmp_path / "v1"))
    copy.upload(tiny_model.folder.path)
    copy.write_bytes(file, content)
    read = load_card if file == "card.json" else lambda folder: biggan.load_generator(folder.uri)
    with pytest.raises(StorageError, match=re.escape(said)):
        read(copy)


def test_what_cannot_be_promoted(digits, tmp_path):
    with pytest.raises(UserError, match="either run or sweep"):
        biggan.promote()
    with pytest.raises(StorageError, match="no run at"):
        biggan.promote(run="never-was")
    with pytest.raises(StorageError, match="no sweep at"):
        biggan.promote(sweep="never-was")
