"""What an endpoint knows of its models, while the store changes."""

import asyncio
import itertools
import threading
import time

import pytest
from conftest import add_imported
from local_endpoint import random_generator

from biggan.directions import NAMES, write_names
from biggan.models import CARD, WEIGHTS, WEIGHTS_SHA256, ModelStore
from biggan.recipe import Recipe
from biggan.storage import storage_root
from serving import catalogue as catalogue_module
from serving.catalogue import Catalogue
from serving.loading import load_model
from serving.problems import ProblemError
from serving.sampler import Sampler

NAMES_OF_MODELS = (f"changing{i}" for i in itertools.count())


@pytest.fixture
def folder(storage):
    """The only version of a new model."""
    return add_imported(next(NAMES_OF_MODELS), random_generator(2))


@pytest.fixture
def catalogue(folder, monkeypatch):
    """It looks ten times a second."""
    monkeypatch.setattr(catalogue_module, "FRESH_SECONDS", 0.1)

    async def warm(reference):
        """Nothing has to be loaded."""

    return Catalogue([folder.parent.name], {}, None, warm)


async def ask_until(ask, wanted):
    """What `ask` gives once it is `wanted` of it, within seconds."""
    began = time.monotonic()
    while not wanted(found := await ask()):
        assert time.monotonic() - began < 10, found
        await asyncio.sleep(0.02)
    return found


async def of_all(catalogue):
    [(model, _, _)] = await catalogue.all()
    return model


@pytest.mark.parametrize("reference", [None, "{}", "{}@best", "{}@v1", "all"])
def test_a_changed_card_and_new_names_are_noticed_without_the_weights(folder, catalogue, reference):
    chosen = reference and reference.format(folder.parent.name)

    def ask():
        return of_all(catalogue) if reference == "all" else catalogue.find(chosen)

    async def change():
        before = await ask()
        assert (before.card.licence, before.direction_names[0]) == ("", "0")
        folder.delete_file(WEIGHTS)
        folder.delete_file(WEIGHTS_SHA256)
        ModelStore(folder.parent.name).relicense(folder.name, "CC0-1.0")
        relicensed = await ask_until(ask, lambda model: model.card.licence == "CC0-1.0")
        write_names(folder, {0: "thickness"})
        named = await ask_until(ask, lambda model: model.direction_names[0] == "thickness")
        assert named.weights == relicensed.weights == before.weights
        assert named.config == before.config
        write_names(folder, {0: ""})
        assert await ask_until(ask, lambda model: model.direction_names == before.direction_names)

    asyncio.run(change())


def test_requests_do_not_wait_for_what_is_read_again(catalogue, monkeypatch):
    read = threading.Event()

    async def ask():
        before = await catalogue.find(None)
        monkeypatch.setattr(catalogue, "_read", lambda _chosen: read.wait(60) and before)
        for _ in range(3):  # The first finds that it is time to look, others that it is being done.
            await asyncio.sleep(0.15)
            assert await catalogue.find(None) is before
            assert not read.is_set()
        read.set()

    began = time.monotonic()
    asyncio.run(ask())
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("file", [CARD, NAMES])
def test_a_version_whose_card_is_damaged_meanwhile_is_served_as_it_was(folder, catalogue, file):
    async def damage():
        before = await catalogue.find(None)
        good = folder.read_bytes(file) if folder.exists(file) else b"{}"
        folder.write_bytes(file, b"{")
        for _ in range(4):
            await asyncio.sleep(0.1)
            assert await catalogue.find(None) == before
            assert await of_all(catalogue) == before
        folder.write_bytes(file, good)
        ModelStore(folder.parent.name).relicense(folder.name, "CC0-1.0")
        await ask_until(lambda: catalogue.find(None), lambda model: model.card.licence)

    asyncio.run(damage())


def test_an_alias_is_followed_as_it_moves(folder, catalogue):
    async def move():
        assert (await catalogue.find(None)).card.version == folder.name
        newer = add_imported(folder.parent.name, random_generator(3)).name
        await ask_until(lambda: catalogue.find(None), lambda model: model.card.version == newer)

    asyncio.run(move())


def test_what_is_served_by_default_is_loaded_first_of_all(folder, grey):
    name = folder.parent.name
    ModelStore(name).set_alias("candidate", "v1")
    config = {
        "models": [name, "missing", "grey@best"],
        "canary": {f"{name}@candidate": 5, f"{name}@other": 5},
        "max_models": 1,
    }

    async def load():
        sampler = Sampler(storage_root())
        await sampler.reconfigure(config)
        first = list(sampler._models)
        await sampler.reconfigure(config | {"max_models": 3})
        return first, list(sampler._models)

    first, all_of_them = asyncio.run(load())
    assert first == [f"{name}@v1"]
    assert all_of_them == [f"{name}@v1", "grey@v1"]


def test_a_sampler_loads_what_an_alias_moves_to_before_it_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr(catalogue_module, "FRESH_SECONDS", 0.1)
    monkeypatch.setattr(catalogue_module, "KEEP_SECONDS", 0.1)
    name = folder.parent.name
    config = {"models": [name, "missing"], "canary": {}, "max_models": 1}

    async def move():
        sampler = Sampler(storage_root())
        await sampler.reconfigure(config)
        first = sampler._following
        await sampler.reconfigure(config)
        newer = add_imported(name, random_generator(3)).name

        async def loaded():
            return list(sampler._models)

        await ask_until(loaded, lambda models: models == [f"{name}@v1", f"{name}@{newer}"])
        assert first.cancelled()
        assert not sampler._following.done()

    asyncio.run(move())


def test_who_leaves_while_a_model_is_loaded_does_not_have_it_loaded_twice(folder, monkeypatch):
    version, loads = f"{folder.parent.name}@v1", []

    def load(*given):
        loads.append(given)
        time.sleep(0.5)
        return load_model(*given)

    monkeypatch.setattr("serving.sampler.load_model", load)

    async def leave(ask):
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await ask()

    async def run():
        sampler = Sampler(storage_root())
        recipe = Recipe(classes={1: 1.0}, seed=0)
        await leave(lambda: sampler.directions(version))
        await leave(lambda: sampler.synthesize_all(version, [[recipe]]))
        [made] = await sampler.synthesize_all(version, [[recipe]])
        assert made.shape == (1, 16, 16, 1)

    asyncio.run(run())
    assert len(loads) == 1


def test_what_cannot_be_loaded_is_tried_again_after_a_while(folder, monkeypatch):
    monkeypatch.setattr(catalogue_module, "FRESH_SECONDS", 0.05)
    monkeypatch.setattr(catalogue_module, "AGAIN_SECONDS", 1.0)
    name, tried = folder.parent.name, []

    async def warm(reference):
        tried.append(reference)
        if tried.count(f"{name}@v2") < 2 or reference == f"{name}@v3":
            raise OSError(reference)

    async def move():
        catalogue = Catalogue([name], {}, None, warm)
        assert (await catalogue.find(None)).card.version == "v1"
        began = time.monotonic()
        add_imported(name, random_generator(3))
        await ask_until(lambda: catalogue.find(None), lambda model: model.card.version == "v2")
        assert time.monotonic() - began > 1
        add_imported(name, random_generator(4))  # It never loads; another is not kept from it.
        await ask_until(lambda: catalogue.find(None), lambda _: f"{name}@v3" in tried)
        add_imported(name, random_generator(5))
        await ask_until(lambda: catalogue.find(None), lambda model: model.card.version == "v4")

    asyncio.run(move())
    assert tried == [f"{name}@v2"] * 2 + [f"{name}@v3", f"{name}@v4"]


def test_a_damaged_model_is_in_no_other_models_way(folder, grey, caplog):
    folder.delete_file(WEIGHTS)

    async def load():
        sampler = Sampler(storage_root())
        await sampler.reconfigure(
            {"models": [folder.parent.name, "grey"], "canary": {}, "max_models": 3}
        )
        return list(sampler._models)

    assert asyncio.run(load()) == ["grey@v1"]
    assert f"{folder.parent.name}@v1 is not loaded" in caplog.text


def test_nobody_waits_long_for_what_takes_long_to_load(folder, monkeypatch):
    monkeypatch.setattr(catalogue_module, "FRESH_SECONDS", 0.1)
    monkeypatch.setattr(catalogue_module, "STALE_SECONDS", 0.4)
    loading = asyncio.Event()

    async def warm(reference):
        await loading.wait()

    async def move():
        catalogue = Catalogue([folder.parent.name], {}, None, warm)
        assert (await catalogue.find(None)).card.version == folder.name
        newer = add_imported(folder.parent.name, random_generator(3)).name
        for pause in (0.2, 0.6, 0.3, 0.3):  # The second finds it stale.
            await asyncio.sleep(pause)
            began = time.monotonic()
            assert (await catalogue.find(None)).card.version == folder.name
            assert time.monotonic() - began < 5  # And not until it is loaded.
        loading.set()
        await ask_until(lambda: catalogue.find(None), lambda model: model.card.version == newer)

    asyncio.run(move())


def test_a_store_that_hangs_stops_nobody_for_long(catalogue, monkeypatch):
    monkeypatch.setattr(catalogue_module, "STALE_SECONDS", 0.3)
    hangs = threading.Event()

    async def ask():
        before = await catalogue.find(None)
        monkeypatch.setattr(catalogue, "_read", lambda _chosen: hangs.wait(30) and before)
        for _ in range(3):
            await asyncio.sleep(0.4)  # It is stale by then.
            began = time.monotonic()
            assert await catalogue.find(None) is before
            assert time.monotonic() - began < 10
        hangs.set()

    asyncio.run(ask())


def test_a_damaged_version_leaves_the_others_listed(folder, catalogue):
    bad = add_imported(folder.parent.name, random_generator(3))
    bad.write_bytes(CARD, b"{")
    [(model, aliases, share)] = asyncio.run(catalogue.all())
    assert (model.card.version, aliases, share) == (folder.name, [], 0)


@pytest.mark.parametrize(
    "reference",
    ["{}@x/../../{}/v1", "{}@/{}@v1", "{}@..", "{}@a/\0b", "{}@", "{}@v9", "{}@v1/", "other"],
)
def test_no_reference_leads_elsewhere_or_tells_where_the_store_is(folder, catalogue, reference):
    name = folder.parent.name
    with pytest.raises(ProblemError) as refused:
        asyncio.run(catalogue.find(reference.format(name, name)))
    assert refused.value.status == 404
    assert folder.uri.split("/")[1] not in str(refused.value.errors)
    assert not catalogue._followed
