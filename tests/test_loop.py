"""The loop: what it writes, when it stops, and that a resumed run is the uninterrupted one."""

import json
import re
from itertools import pairwise

import pytest
import torch
from conftest import tiny, train_here
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import biggan
from biggan.checkpoint import STATE, Standing
from biggan.config import ConfigError
from biggan.loop import WORST_FID, TrainingLoop, crosses, non_finite_weight
from biggan.parallel import CPU, Workers
from biggan.runs import (
    RECORD,
    SIGNALS,
    RunRecord,
    best_checkpoint,
    bring_in_unsaved,
    checkpoints,
    latest_checkpoint,
    open_run,
    read_metrics,
    read_rows,
    unsaved,
)
from biggan.storage import Folder, StorageError
from biggan.training import build


def last_state(run):
    name = list(checkpoints(run))[-1]
    return torch.load(f"{run.path}/{name}/{STATE}", weights_only=True)


def assert_equal(a, b, where=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def test_an_interrupted_run_ends_bit_for_bit_as_an_undisturbed_one(digits, tiny_run, tmp_path):
    run = Folder(str(tmp_path / "tiny"))
    for reports in (1, 2):  # Broken off twice, at different places.
        with pytest.raises(InterruptedError):
            train_here(tiny(), run, digits, stop_after=reports)
    assert train_here(tiny(), run, digits) == "finished"
    assert_equal(last_state(run), last_state(tiny_run))
    keys = ("step", "kimg", "loss_D", "loss_G", "fid")
    rows, undisturbed = (
        [{k: row[k] for k in keys if k in row} for row in read_metrics(r)] for r in (run, tiny_run)
    )
    assert rows == undisturbed


def test_a_machine_that_is_about_to_go_is_left_after_the_step_in_hand(digits, tiny_run, tmp_path):
    run, steps = Folder(str(tmp_path / "tiny")), []

    def must_leave():
        steps.append(len(steps) + 1)
        return len(steps) in (6, 7)

    assert train_here(tiny(), run, digits, must_leave=must_leave) == "preempted"
    assert latest_checkpoint(run).name == "checkpoint_000000006"
    assert train_here(tiny(), run, digits) == "finished"
    assert_equal(last_state(run), last_state(tiny_run))


def test_what_was_not_written_to_its_end_is_named_and_deleted(digits, tmp_path, caplog):
    run = Folder(str(tmp_path / "tiny"))
    train_here(tiny(total_kimg=0.256), run, digits)
    torn = tmp_path / "tiny" / "checkpoint_000000009"
    torn.mkdir()
    (torn / STATE).write_bytes(b"half of it")
    train_here(tiny(), run, digits)
    assert f"{torn} was not written to its end; it is deleted" in caplog.text
    assert not torn.exists()


def test_half_a_row_does_not_count(tmp_path):
    run = Folder(str(tmp_path))
    run.write_bytes(SIGNALS, b'{"step": 1}\n{"step": 2}\n{"st')
    assert read_rows(run, SIGNALS) == [{"step": 1}, {"step": 2}]


def test_a_kept_state_counts_until_others_have_gone_on(digits, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("BIGGAN_CACHE", str(tmp_path / "cache"))
    run = Folder(str(tmp_path / "tiny"))
    train_here(tiny(total_kimg=0.256), run, digits)
    for name in list(checkpoints(run))[-1:]:  # As if storage had refused the last.
        unsaved(run).parent.filesystem.create_dir(unsaved(run).path)
        (tmp_path / "tiny" / name).rename(f"{unsaved(run).path}/{name}")
    before = latest_checkpoint(run).name
    bring_in_unsaved(run)
    assert latest_checkpoint(run).name == name > before
    assert not unsaved(run).exists()
    (unsaved(run) / before).upload(tmp_path / "tiny" / before)
    bring_in_unsaved(run)  # Of a step that the run is beyond.
    assert latest_checkpoint(run).name == name
    of_this_one = unsaved(run)
    run.delete()
    open_run(run, tiny(), digits.info)
    run.write_json(RECORD, run.read_json(RECORD) | {"created": "another time"})
    assert unsaved(run) != of_this_one  # A run of the same name, begun anew.


LITTLE_DATA = {
    "loss__r1": 0.1,
    "loss__r1_every": 3,
    "loss__lecam": 0.3,
    "loss__consistency": 1.0,
    "loss__consistency_fake": 1.0,
    "loss__topk": 0.5,
    "loss__topk_kimg": 0.4,
    "loss__ortho_d": 1e-4,
    "augment__name": "ada",
    "augment__ada_kimg": 1.0,
    "augment__ada_target": 0.01,
    "model__attention": [8],
    "model__channel_attention": [8],
    "speed__recompute": True,
    "collapse__window_kimg": 0.3,
}
DEEP = {
    "model__architecture": "biggan-deep",
    "model__ch_g": 4,
    "model__ch_d": 4,
    "loss__name": "bce",
    "loss__ortho_variant": "full",
    "augment__name": "diffaugment",
    "speed__precision_g": "bfloat16",
    "speed__precision_d": "float16",
    "speed__reuse_fakes": True,
    "speed__channels_last": False,
    "speed__fused_optimizer": False,
}
UNSHARED = {
    "model__shared": False,
    "model__hierarchical": False,
    "optim__accumulation": 2,
    "loss__name": "wasserstein",
    "augment__name": "ada",
}


@pytest.mark.parametrize(
    "changes", [LITTLE_DATA, DEEP, UNSHARED], ids=["little data", "deep in half", "unshared"]
)
def test_resuming_is_bit_exact_with_everything_switched_on(digits, tmp_path, changes):
    config = tiny(total_kimg=0.768, **changes)
    whole, broken = (Folder(str(tmp_path / name)) for name in ("whole", "broken"))
    assert train_here(config, whole, digits) == "finished"
    with pytest.raises(InterruptedError):
        train_here(config, broken, digits, stop_after=1)
    assert train_here(config, broken, digits) == "finished"
    assert_equal(last_state(broken), last_state(whole))
    assert read_rows(broken, SIGNALS) == read_rows(whole, SIGNALS)
    if changes is LITTLE_DATA:
        assert last_state(whole)["running"]["p"] > 0  # ADA has done something.


def test_what_a_run_leaves_behind(tiny_run):
    rows = read_metrics(tiny_run)
    assert [row["kimg"] for row in rows] == [0.256, 0.512]
    assert all(row["fid"] > 0 and row["fid_extractor"] == "classifier" for row in rows)
    assert all(row["images_per_second"] > 0 for row in rows)
    sheets = sorted(f for f in (tiny_run / "samples").children())
    assert sheets == ["0000000.3kimg.png", "0000000.5kimg.png"]
    assert Image.open(f"{tiny_run.path}/samples/{sheets[0]}").size == (10 * 34 + 2, 8 * 34 + 2)
    events = EventAccumulator(tiny_run.path).Reload()
    assert [e.step for e in events.Scalars("fid/classifier")] == [8, 16]
    record = RunRecord.read(tiny_run)
    assert record.config == tiny()
    assert record.dataset.classes == [str(i) for i in range(10)]
    assert record.packages["torch"].startswith("2.")
    # Evaluated at 8 and 16; saved at 4, 8, 12 and 16; kept: the two best, and the two latest.
    assert [info.step for info in checkpoints(tiny_run).values()] == [8, 12, 16]
    folder, info = best_checkpoint(tiny_run)
    assert info.fid == min(row["fid"] for row in rows)
    assert folder.name == f"checkpoint_{info.step:09d}"


def test_patience_ends_a_run_whose_fid_no_longer_falls(digits, tmp_path):
    # With a learning rate of all but nothing, G_ema and its FID stay as they are.
    config = tiny(
        total_kimg=10, eval__patience=2, optim__lr_g=1e-12, ema__decay=0.999, eval__every_kimg=0.064
    )
    run = Folder(str(tmp_path / "flat"))
    assert train_here(config, run, digits) == "patience"
    rows = read_metrics(run)
    fids = [row["fid"] for row in rows]
    assert len(fids) < 50
    assert min(fids) not in fids[-2:]
    assert train_here(config, run, digits) == "patience"  # Started again, it is still over.
    assert read_metrics(run) == rows


def test_divergence_names_step_and_cause_and_reports_a_large_fid(digits, tmp_path):
    run = Folder(str(tmp_path / "run"))
    train_here(tiny(total_kimg=0.256), run, digits)
    kept, _ = best_checkpoint(run)
    reports = []
    loop = TrainingLoop(
        tiny(optim__lr_g=1e30, optim__lr_d=1e30),
        digits,
        run,
        Workers(0, 1, CPU),
        lambda metrics, folder: reports.append((metrics, folder)),
        say=None,
    )
    reason = loop.run()
    assert re.fullmatch(r"diverged: (loss_\w|D_\w+) is (nan|inf|-inf) at step \d+", reason)
    metrics, folder = reports[-1]
    assert (metrics["fid"], metrics["stop_reason"], folder) == (WORST_FID, reason, None)
    assert metrics["best_fid"] < WORST_FID
    assert best_checkpoint(run)[0] == kept


def test_a_weight_that_is_not_finite_is_found_and_named(digits):
    state = build(tiny(), **digits.info.shape, device=CPU)
    assert non_finite_weight(state.G) is None
    with torch.no_grad():
        state.G.blocks[1].conv2.weight[0, 0, 0, 0] = float("inf")
    assert non_finite_weight(state.G) == "blocks.1.conv2.weight"


def test_a_resumed_run_must_be_the_same_run(digits, tiny_run):
    with pytest.raises(ConfigError, match=r"optim.lr_g was 0.001, is 0.5"):
        open_run(tiny_run, tiny(optim__lr_g=0.5), digits.info)
    other = digits.info.model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(ConfigError, match="other images"):
        open_run(tiny_run, tiny(), other)


def test_a_run_can_be_made_longer(digits, tmp_path):
    run = Folder(str(tmp_path / "longer"))
    train_here(tiny(total_kimg=0.256), run, digits)
    assert train_here(tiny(total_kimg=0.512), run, digits) == "finished"
    assert RunRecord.read(run).config.total_kimg == 0.512
    assert [row["kimg"] for row in read_metrics(run)] == [0.256, 0.512]


def test_a_damaged_checkpoint_is_named_and_not_used(digits, tmp_path, caplog):
    run = Folder(str(tmp_path / "damaged"))
    train_here(tiny(total_kimg=0.256, eval__every_kimg=0.128), run, digits)
    before, latest = list(checkpoints(run))[-2:]
    state = tmp_path / "damaged" / latest / STATE
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StorageError, match=rf"{latest}/state.pt is damaged"):
        biggan.evaluate(checkpoint=f"{run}/{latest}")
    assert latest_checkpoint(run).name == before
    assert f"{latest} is damaged; resuming from the checkpoint before" in caplog.text
    assert best_checkpoint(run)[0].name == before
    (state.parent / "checkpoint.json").write_text("{")
    assert latest not in checkpoints(run)
    with pytest.raises(StorageError, match=r"checkpoint.json is damaged"):
        biggan.evaluate(checkpoint=f"{run}/{latest}")


def test_a_checkpoint_half_written_is_passed_over(digits, tmp_path):
    run = Folder(str(tmp_path / "truncated"))
    train_here(tiny(total_kimg=0.256), run, digits)
    before, latest = list(checkpoints(run))[-2:]
    state = tmp_path / "truncated" / latest / STATE
    state.write_bytes(state.read_bytes()[:-100])
    assert latest_checkpoint(run).name == before
    assert train_here(tiny(total_kimg=0.256), run, digits) == "finished"
    assert latest_checkpoint(run).name.startswith(latest)  # Beside the one that is not whole.


def test_a_run_that_was_over_says_so_again(tiny_run, digits):
    reports = []
    alone = Workers(0, 1, CPU)
    loop = TrainingLoop(
        tiny(),
        digits,
        tiny_run,
        alone,
        lambda metrics, folder: reports.append((metrics, folder)),
        say=None,
    )
    assert loop.run() == "finished"
    [(metrics, folder)] = reports
    assert folder is None
    assert (metrics["kimg"], metrics["stop_reason"]) == (0.512, "finished")
    last = read_metrics(tiny_run)[-1]
    assert metrics["fid"] == last["fid"]


def test_a_checkpoint_holds_all_that_the_next_step_depends_on(tiny_run):
    state = last_state(tiny_run)
    networks = {"G", "D", "G_ema", "optim_G", "optim_D"}
    assert set(state) == networks | {"scaler_G", "scaler_D", "running"}
    info = list(checkpoints(tiny_run).values())[-1]
    # Seed and step are the state of every random stream, and the position in the data.
    assert (info.step, info.images_seen, info.seed) == (16, 512, 0)
    assert isinstance(info.standing, Standing)


def test_metrics_are_json_lines(tiny_run):
    for line in tiny_run.read_bytes("metrics.jsonl").splitlines():
        json.loads(line, parse_constant=pytest.fail)  # No NaN, no infinity.


def test_what_is_due_is_done_once():
    """3.2 kimg and steps of 0.032 are not exact in binary."""
    steps = [step for step in range(1, 2189) if crosses(3.2, step * 32, 32)]
    assert len(steps) == 21  # 70.016 kimg / 3.2
    assert all(b - a in (99, 100, 101) for a, b in pairwise(steps))
