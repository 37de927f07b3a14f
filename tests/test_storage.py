"""Names, places, and files that are written whole or not at all."""

import threading

import pytest

from biggan.errors import UserError
from biggan.storage import (
    Folder,
    StorageError,
    UnavailableError,
    insist,
    locate,
    storage_root,
    training_patience,
)


def test_names_paths_and_uris(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGGAN_STORAGE", str(tmp_path))
    assert locate("runs", "first").uri == f"{tmp_path}/runs/first"
    assert locate("runs", "first", "/elsewhere").uri == "/elsewhere/runs/first"
    assert locate("runs", "/some/where").uri == "/some/where"
    assert locate("runs", "s3://bucket/runs/a").uri == "s3://bucket/runs/a"
    monkeypatch.delenv("BIGGAN_STORAGE")
    monkeypatch.chdir(tmp_path)
    assert storage_root() == f"{tmp_path}/storage"
    assert storage_root("x") == f"{tmp_path}/x"


def test_a_submitted_job_leaves_nothing_in_its_own_copy_of_the_working_directory(monkeypatch):
    monkeypatch.delenv("BIGGAN_STORAGE", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert storage_root() == "/home/somebody/storage"
    assert storage_root("s3://bucket/x") == "s3://bucket/x"


@pytest.mark.parametrize("name", ["", "a b", "-x", "a@b", "ä", ".hidden"])
def test_names_that_cannot_be(name):
    with pytest.raises(StorageError, match=r"use letters, digits"):
        locate("runs", name)


def test_a_child_comes_before_the_query():
    folder = Folder("s3://bucket/runs?region=x&endpoint_override=y")
    assert (folder / "a").uri == "s3://bucket/runs/a?region=x&endpoint_override=y"
    assert (folder / "a").parent == folder


def test_unknown_scheme():
    with pytest.raises(StorageError, match="ftp"):
        Folder("ftp://host/x").exists()


def test_readers_never_see_half_a_file(tmp_path):
    folder = Folder(str(tmp_path))
    folder.write_json("a.json", ["x"] * 50_000)
    done = threading.Event()

    def write():
        for i in range(30):
            folder.write_json("a.json", [str(i)] * 50_000)
        done.set()

    threading.Thread(target=write).start()
    while not done.is_set():
        assert len(folder.read_json("a.json")) == 50_000
    assert folder.children() == ["a.json"]


def test_a_folder_comes_into_being_whole_or_not_at_all(tmp_path):
    folder = Folder(str(tmp_path / "new"))
    with pytest.raises(RuntimeError), folder.created_whole("done") as draft:
        raise RuntimeError(draft.write_bytes("part", b"1"))
    assert Folder(str(tmp_path)).children() == []
    with folder.created_whole("done") as draft:
        draft.write_bytes("part", b"1")
        assert not folder.exists()
    assert folder.read_bytes("part") == b"1"
    with folder.created_whole("done") as draft:  # Replaces what was there.
        draft.write_bytes("other", b"2")
    assert folder.children() == ["other"]
    assert Folder(str(tmp_path)).children() == ["new"]


def test_a_draft_with_a_key_outlives_all_but_a_verdict(tmp_path):
    folder = Folder(str(tmp_path / "new"))
    with pytest.raises(KeyboardInterrupt), folder.created_whole("done", key="abc") as draft:
        raise KeyboardInterrupt(draft.write_bytes("part", b"1"))
    assert Folder(str(tmp_path)).children() == [".new.abc.partial"]
    with folder.created_whole("done", key="abc") as draft:
        assert draft.read_bytes("part") == b"1"
        draft.write_bytes(".records/0", b"not to be taken along")
    assert folder.children() == ["part"]
    with pytest.raises(UserError), folder.created_whole("done", key="abc") as draft:
        raise UserError(draft.write_bytes("part", b"2"))
    assert Folder(str(tmp_path)).children() == ["new"]


def test_drafts_of_that_name_alone_are_deleted(tmp_path):
    others = [".a.b.0123456789ab.partial", ".ab.0123.partial", ".a.claim", "a", "a.0123.partial"]
    for name in [".a.0123456789ab.partial", ".a.89abcdef.old", *others]:
        (tmp_path / name).mkdir()
    Folder(str(tmp_path / "a")).delete_drafts()
    assert Folder(str(tmp_path)).children() == sorted(others)


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(StorageError, match=r"a.json is damaged"):
        Folder(str(tmp_path)).read_json("a.json")


def test_infinities_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        Folder(str(tmp_path)).write_json("a.json", {"fid": float("nan")})


def failing(times, error):
    """An operation that fails so often, and then gives how often it was tried."""
    tried = []

    def operation():
        tried.append(error)
        if len(tried) <= times:
            raise error
        return len(tried)

    return operation


def test_what_is_refused_is_tried_again(capsys):
    assert insist("storage x", 5, failing(2, OSError("slow down"))) == 3
    assert capsys.readouterr().out.count("storage x: slow down; trying again for ") == 2


def test_patience_has_an_end():
    with pytest.raises(UnavailableError, match=r"^storage x failed for 0.5 s: slow down$"):
        insist("storage x", 0.5, failing(99, OSError("slow down")))


@pytest.mark.parametrize(
    "patience,error", [(5, FileNotFoundError("a")), (5, IsADirectoryError("b")), (0, OSError("c"))]
)
def test_what_is_no_refusal_or_not_to_be_waited_for_is_raised_at_once(patience, error):
    with pytest.raises(type(error)):
        insist("storage x", patience, failing(1, error))


def test_folders_hand_their_patience_on():
    folder = Folder("/a/b", 7)
    assert ((folder / "c").patience, folder.parent.patience) == (7, 7)
    assert folder == Folder("/a/b")


@pytest.mark.parametrize("given", ["soon", "-1", "inf"])
def test_patience_is_a_number_of_seconds(monkeypatch, given):
    monkeypatch.setenv("BIGGAN_STORAGE_PATIENCE", given)
    with pytest.raises(StorageError, match="must be a number of seconds, 0 or more"):
        training_patience()
