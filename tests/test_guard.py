"""The guard: its signals by hand, and runs that are made to collapse."""

import pytest
import torch
from conftest import tiny, train_here

from biggan.checkpoint import DESCRIPTION, STATE, Rollback
from biggan.guard import READINGS, Guard, GuardState, Reading, sigma_growth, singular_values
from biggan.parallel import ALONE
from biggan.runs import (
    SIGNALS,
    checkpoints,
    good_checkpoint,
    latest_checkpoint,
    read_metrics,
    read_rows,
    remember_rollbacks,
)
from biggan.storage import Folder
from biggan.training import build


def reading(kimg, sigma=1.0, accuracy=0.7, variance=1.0):
    return Reading(
        kimg=kimg,
        sigma={"G.linear": 1.0, "D.blocks.0.conv1": sigma},
        accuracy_real=accuracy,
        accuracy_fake=accuracy,
        class_variance=variance,
    )


def signal(digits, readings):
    guard = Guard(tiny(collapse__window_kimg=1.0, collapse__sigma_growth=3.0), digits, ALONE)
    return guard._signal(readings)


def test_a_singular_value_that_runs_away_is_named(digits):
    calm = [reading(2 + k / 10, sigma=1 + k / 10) for k in range(READINGS)]
    assert signal(digits, calm) == ""
    said = signal(digits, [*calm, reading(3, sigma=3.2)])
    assert said.startswith("the largest singular value of D.blocks.0.conv1 grew 3.2 times over")
    assert sigma_growth(calm) == ("D.blocks.0.conv1", pytest.approx(1.9))


def test_a_D_that_never_errs_must_not_err_for_a_whole_window(digits):
    perfect = [reading(2 + k / 10, accuracy=1.0) for k in range(READINGS)]
    assert "D told real from fake in 100.00% of all cases" in signal(digits, perfect)
    assert "D told" in signal(digits, [perfect[0], perfect[-1]])  # A window of two steps.
    assert signal(digits, perfect[2:]) == ""
    assert signal(digits, [reading(1.9), *perfect]) == ""


def test_images_of_a_class_that_are_all_alike(digits):
    said = signal(digits, [reading(2, variance=0.01)])
    assert said.startswith("images of a class vary 0.0100 times as much as the real ones")


def test_the_first_window_is_a_respite(digits):
    assert signal(digits, [reading(0.5, sigma=1), reading(0.9, sigma=50, variance=0)]) == ""


def test_singular_values_are_those_of_the_decomposition(digits):
    config = tiny()
    state = build(config, **digits.info.shape, device=torch.device("cpu"))
    for layer in (state.G.blocks[0].conv1, state.D.linear):
        torch.nn.init.normal_(layer.weight)
        for _ in range(500):
            layer.normalized_weight()
    values = singular_values(state, ALONE)
    for name, layer in (
        ("G.blocks.0.conv1", state.G.blocks[0].conv1),
        ("D.linear", state.D.linear),
    ):
        exact = torch.linalg.svdvals(layer.weight.flatten(1).double())[0]
        assert values[name] == pytest.approx(exact.item(), rel=1e-5)


def test_the_variance_within_classes_by_hand(digits):
    config = tiny()
    guard = Guard(config, digits, ALONE)
    assert guard.classes == [0, 1, 2, 3, 5, 6, 7, 8]  # Eight of ten, evenly.
    real = 0.0
    for k in guard.classes:
        images = digits.images[(digits.labels == k).nonzero()[:256, 0]].double() / 127.5 - 1
        real += images.var(0, correction=0).mean().item() / 8
    assert guard.real_variance == pytest.approx(real, rel=1e-4)
    state = build(config, **digits.info.shape, device=torch.device("cpu"))
    with torch.no_grad():
        state.G.bn_out.gain.zero_()  # A constant image.
    memory = GuardState()
    guard.count(memory, {"accuracy_real": 0.5, "accuracy_fake": 1.0})
    guard.count(memory, {"accuracy_real": 1.0, "accuracy_fake": 1.0})
    guard.read(state, memory)
    assert memory.readings[0].class_variance == pytest.approx(0, abs=1e-12)
    assert memory.readings[0].accuracy_real == 0.75
    assert state.G.training


COLLAPSING = {
    # A thousand times what is good: in a few steps every image of a class is the same.
    "optim__lr_g": 1.0,
    "optim__lr_d": 1.0,
    "total_kimg": 2.0,
    "eval__every_kimg": 1.0,
    "collapse__window_kimg": 0.32,
}
SOON = {"collapse__sigma_growth": 3.0}


@pytest.mark.parametrize(
    "deaf_to,said",
    [
        ({"collapse__sigma_growth": 1e6}, "images of a class vary 0.0"),
        (
            {"collapse__class_variance": 0.0, **SOON},
            "the largest singular value of D.blocks.1.conv2 grew",
        ),
    ],
)
def test_a_run_that_collapses_is_stopped_and_says_why(digits, tmp_path, deaf_to, said):
    run = Folder(str(tmp_path / "stop"))
    reason = train_here(tiny(**COLLAPSING, **deaf_to), run, digits)
    assert reason.startswith(f"collapsed: {said}")
    assert reason.endswith("at 0.352 kimg")  # The first reading after the respite.


def test_a_run_that_collapses_is_left_alone_if_wanted(digits, tmp_path):
    run = Folder(str(tmp_path / "off"))
    assert train_here(tiny(**COLLAPSING, guard="off"), run, digits) == "finished"
    rows = read_rows(run, SIGNALS)
    assert min(row["class_variance"] for row in rows) < 0.02
    assert set(rows[0]["sigma"]) == set(rows[-1]["sigma"])


def test_a_run_that_collapses_goes_back_and_on_with_smaller_learning_rates(digits, tmp_path):
    run = Folder(str(tmp_path / "rollback"))
    config = tiny(**COLLAPSING, **SOON, guard="rollback", collapse__lr_factor=1e-3)
    said = []
    assert train_here(config, run, digits, say=said.append) == "finished"
    (line,) = [line for line in said if "rolled back" in line]
    assert "rolled back from 0.352 to 0 kimg, learning rates now x 0.001: the largest" in line
    final = list(checkpoints(run).values())[-1]
    (back,) = final.standing.rollbacks
    assert (back.from_step, back.to_step) == (11, 0)
    steps = [row["step"] for row in read_metrics(run)]
    assert steps == sorted(set(steps))  # What was undone is not told twice.
    weights = last_weights(run)
    train_here(config.override({"total_kimg": 3.0}), run, digits)  # The rates are remembered.
    for name, now in last_weights(run).items():
        assert (now - weights[name]).abs().max() < 0.2, name


def last_weights(run):
    folder = f"{run.path}/{list(checkpoints(run))[-1]}"
    state = torch.load(f"{folder}/{STATE}", weights_only=True)
    return {k: v for k, v in state["G"].items() if k.endswith("weight")}


def test_the_place_to_return_to_is_the_newest_that_was_calm(digits, tmp_path):
    run = Folder(str(tmp_path / "calm"))
    config = tiny(total_kimg=1.024, checkpoint__every_kimg=0.256, checkpoint__keep=9)
    train_here(config, run, digits)
    names = list(checkpoints(run))
    assert len(names) == 4
    assert good_checkpoint(run, before_step=1000) == names[-1]
    assert good_checkpoint(run, before_step=checkpoints(run)[names[2]].step) == names[1]
    for name in names[1:]:
        info = (run / name).read_json(DESCRIPTION)
        info["standing"]["guard"]["calm"] = False
        (run / name).write_json(DESCRIPTION, info)
    assert good_checkpoint(run, before_step=1000) == names[0]
    assert good_checkpoint(run, before_step=1) == ""


def test_what_a_rollback_left_behind_is_not_resumed_from(digits, tmp_path):
    """As when a run is killed before it saves anything after its rollback."""
    run = Folder(str(tmp_path / "left"))
    changes = {"checkpoint__every_kimg": 0.256, "checkpoint__keep": 9, "collapse__lr_factor": 0.1}
    train_here(tiny(total_kimg=1.024, **changes), run, digits)
    names = list(checkpoints(run))
    back = Rollback(from_step=30, to_step=checkpoints(run)[names[1]].step, signal="a test")
    remember_rollbacks(run, [back])
    assert latest_checkpoint(run) == run / names[1]
    said = []
    train_here(tiny(total_kimg=1.28, **changes), run, digits, say=said.append)
    assert "resuming at 0.512" in said[0]
    newest = latest_checkpoint(run)
    assert checkpoints(run)[newest.name].standing.rollbacks == [back]
    optimizer = torch.load(f"{newest.path}/{STATE}", weights_only=True)["optim_G"]
    lr = optimizer["param_groups"][0]["lr"]
    assert lr == pytest.approx(0.1 * tiny().optim.lr_g)
