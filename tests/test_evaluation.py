"""Evaluations: the same for any number of workers, kept with their protocol, never mixed."""

import json
import math
import statistics

import pandas as pd
import pytest
import torch
from conftest import add_imported, job, tiny, train_here

import biggan
from biggan.candidates import load_checkpoint
from biggan.checkpoint import CheckpointInfo
from biggan.config import ConfigError
from biggan.errors import UserError
from biggan.evaluation import evaluate
from biggan.metrics.extractors import load_extractor
from biggan.metrics.fid import EVALUATION_SEED, REPEAT_SEEDS, Draw, Evaluator
from biggan.metrics.protocol import differences, digest
from biggan.models import load_card, load_generator
from biggan.parallel import ALONE, CPU
from biggan.pixels import to_uint8
from biggan.promotion import best_trial, promote
from biggan.runs import best_checkpoint, checkpoints, read_metrics
from biggan.search import Search, _noise
from biggan.storage import StorageError, locate
from biggan.trials import INSIDE_NOISE, _standings, difference_within

MEASURES = {
    *("fid", "kid", "inception_score", "precision", "recall", "density", "coverage"),
    *("intra_class_fid", "class_accuracy"),
}


@pytest.fixture(scope="module")
def alone(tiny_run):
    """Three draws of 600 images, measured in this process."""
    return evaluate(run="tiny", num_samples=600, repeats=3)


def test_one_pass_gives_every_measure_with_its_protocol(alone, digits):
    assert set(alone.measures) == MEASURES
    for measure in alone.measures.values():
        assert math.isfinite(measure.value)
        assert measure.protocol["extractor"] == "classifier"
        assert len(measure.protocol["extractor_fingerprint"]) == 64
        assert measure.protocol["reference_fingerprint"] == digits.info.fingerprint
        assert measure.protocol["reference_split"] == "train"
        assert measure.protocol["reference_count"] == 1797
        assert measure.protocol["num_samples"] == 600
        assert measure.protocol["resize"] == "none"
        assert measure.protocol["rounding"] == "to nearest"
        assert measure.protocol["truncation"] is None
        assert measure.protocol["standing_statistics"] == 0
    assert alone.measures["kid"].protocol["subset_size"] == 600
    for name in ("precision", "recall", "coverage", "class_accuracy"):
        assert 0 <= alone.measures[name].value <= 1


def test_repetitions_are_other_draws_of_which_mean_and_deviation_are_told(alone):
    fid = alone.measures["fid"]
    assert len(set(fid.values)) == 3
    assert fid.value == pytest.approx(statistics.fmean(fid.values))
    assert fid.deviation == pytest.approx(statistics.stdev(fid.values))
    assert f"+- {fid.deviation:.3f}" in str(alone)
    once = evaluate(run="tiny", num_samples=600)
    assert once.value == fid.values[0]
    assert once.measures["fid"].deviation is None


@pytest.mark.parametrize("workers", [1, 2, 0])
def test_the_result_is_the_same_for_any_number_of_workers(alone, workers):
    said = []
    spread = evaluate(run="tiny", num_samples=600, repeats=3, workers=workers, progress=said.append)
    for name, measure in alone.measures.items():
        assert spread.measures[name].values == measure.values, name
    assert "evaluated 600/600 images" in said[-1]


def test_a_draw_is_the_same_images_in_whatever_batches(tiny_run, tiny_model):
    G = load_generator("tiny@best")
    draw = Draw(counts=(1,) * 10, num_samples=25, batch_size=10, repeat=1)
    images = torch.cat([draw.images(G, batch) for batch in range(len(draw))])
    assert [draw.part(2).start, draw.part(2).stop] == [20, 25]
    seeds = range(EVALUATION_SEED + REPEAT_SEEDS, EVALUATION_SEED + REPEAT_SEEDS + 25)
    with torch.inference_mode():
        expected = to_uint8(G(G.latents(seeds), draw.labels))
    assert abs(images.int() - expected.int()).max() <= 1
    assert torch.bincount(draw.labels).tolist() == [2, 3, 2, 3, 2, 3, 2, 3, 2, 3]


def test_evaluating_a_run_leaves_a_file_beside_it(tiny_run):
    said = job("evaluate", "--run", "tiny", "--num-samples", "64", "--workers", "1").stdout
    kept = tiny_run.read_json("evaluation.json")
    [line] = [line for line in said.splitlines() if line.startswith("{")]
    assert json.loads(line) == kept
    assert kept["subject"] == f"runs/tiny/{best_checkpoint(tiny_run)[0].name}"
    assert kept["measures"]["fid"]["protocol"]["num_samples"] == 64
    assert "class accuracy" in said
    assert f"FID {kept['measures']['fid']['value']:.3f} (classifier features, 64 samples" in said


def test_evaluating_a_model_updates_its_card(tiny_run):
    promoted = promote(run="tiny", name="carded")
    evaluation = evaluate(model="carded@v1", num_samples=70)
    card = load_card(promoted.folder)
    assert card.fid == promoted.card.fid  # That of its promotion.
    assert evaluation in card.evaluations
    assert promoted.folder.read_json("evaluation.json")["measures"].keys() == MEASURES
    again = evaluate(model="carded@v1", num_samples=70)
    kept = load_card(promoted.folder).evaluations
    assert [e for e in kept if e.protocol == again.protocol] == [again]
    imported = add_imported("measured-later", load_generator("carded@v1"))
    first = evaluate(model="measured-later", dataset="digits", num_samples=64)
    assert load_card(imported).fid == first.value
    assert load_card(imported).fid_protocol == first.protocol


@pytest.mark.parametrize(
    "asked,said",
    [
        ({"repeats": 0}, "repeats is 0, must be 1 or more"),
        ({"workers": -1}, "workers is -1, must be 1 or more, or 0"),
        ({"reference": "held_out"}, "digits has no held-out images.*--held-out 0.1"),
        ({"extractor": "vgg"}, "'vgg'"),
    ],
)
def test_what_cannot_be_measured(tiny_run, asked, said):
    with pytest.raises(UserError, match=said):
        evaluate(run="tiny", **asked)


def test_weights_that_cannot_be_had_are_told_in_a_line(tiny_run, job_here):
    flags = ["--extractor", "inception", "--inception-weights", "http://127.0.0.1:9/weights.pth"]
    status, said = job_here("evaluate", "--run", "tiny", *flags)
    assert status == 2
    # Ray may say something too: it tells every driver what befalls processes of other tests.
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    [line] = lines
    assert "Traceback" not in said
    assert line.startswith("error: the Inception weights")
    for mend in ("127.0.0.1:9/weights.pth", "put the file at", "--inception-weights PATH"):
        assert mend in line
    assert "--extractor classifier" in line


def test_protocols_differ_where_one_entry_does():
    a = {"extractor": "inception", "num_samples": 50_000, "truncation": None}
    assert differences(a, dict(reversed(a.items()))) == ""
    assert digest(a) == digest({k: v for k, v in a.items() if v is not None})
    b = a | {"num_samples": 10_000}
    assert differences(a, b) == "num_samples: 50000 and 10000"
    assert digest(a) != digest(b)
    # Cards of before there were splits mean the training images.
    assert differences(a, a | {"reference_split": "train", "rounding": "to nearest"}) == ""
    assert "reference_split" in differences(a, a | {"reference_split": "held_out"})


def test_promotion_compares_what_was_measured_alike(digits, storage):
    """v2 was trained with another number of samples; both are then evaluated with one."""
    for seed, samples in ((1, 64), (2, 80)):
        run = locate("runs", f"alike{seed}")
        train_here(tiny(seed=seed, eval__num_samples=samples), run, digits)
        last = promote(run=run.name, name="alike")
    assert not last.is_best
    assert last.reason.startswith("its FID is not comparable with that of v1 (num_samples: 64 and")
    fids = [evaluate(model=f"alike@v{k}", num_samples=200).value for k in (1, 2)]
    again = promote(run="alike2", name="alike")
    assert again.is_best == (fids[1] < fids[0])
    assert f"FID {fids[1]:.3f} is" in again.reason
    assert f"{fids[0]:.3f} of v1" in again.reason


def with_other_protocol(checkpoint, fid):
    """Make a checkpoint's FID one of another protocol."""
    info = CheckpointInfo.read(checkpoint)
    protocol = info.fid_protocol | {"extractor_fingerprint": "another"}
    changed = info.model_copy(update={"fid": fid, "fid_protocol": protocol})
    checkpoint.write_bytes("checkpoint.json", changed.model_dump_json().encode())


def test_checkpoints_and_trials_of_other_protocols_are_not_compared(digits):
    sweep = locate("sweeps", "mixed")
    for trial in ("trial_00000", "trial_00001"):
        train_here(tiny(), sweep / trial, digits)
    first = sweep / "trial_00000"
    earlier, later = (name for name, info in checkpoints(first).items() if info.fid is not None)
    with_other_protocol(first / earlier, 0.001)
    assert best_checkpoint(first)[0].name == later  # However low the other is.
    assert best_trial("mixed", None).name.startswith("trial_0000")
    with_other_protocol(first / later, 0.001)
    with pytest.raises(StorageError, match=r"trial_00000 and trial_00001 are not comp"):
        best_trial("mixed", None)


def test_differences_inside_the_noise_are_marked():
    # Two FIDs of standard deviation 1 differ by less than 2 sqrt(2) in 95% of all cases.
    assert difference_within(1.0) == pytest.approx(2.828, abs=1e-3)
    fids = pd.Series([10.0, 12.0, 12.9, 1e6])
    assert _standings(fids, 1.0) == ["best", INSIDE_NOISE, "worse", "worse"]
    assert _standings(fids, None) == ["best", "", "", ""]


def test_the_noise_is_of_the_protocol_that_the_trials_have(tiny_run, monkeypatch):
    checkpoint = best_checkpoint(tiny_run)[0].uri
    evaluate(checkpoint=checkpoint, num_samples=200, repeats=2)  # Not what the sweep asks for.
    noise = _noise(Search(noise_repeats=2), None)(tiny_run)
    assert noise == evaluate(run="tiny", repeats=2).measures["fid"].deviation
    assert evaluate(checkpoint=checkpoint, repeats=2).measures["fid"].deviation == noise
    monkeypatch.setattr("biggan.search.evaluate", None)  # It is read, not measured again.
    assert _noise(Search(noise_repeats=2), None)(tiny_run) == noise


def test_evaluation_beside_training_finds_what_inline_finds(tiny_run, digits):
    result = biggan.train(tiny(eval__mode="async"), "beside")
    assert result.stop_reason == "finished"
    rows, inline = (
        [row for row in read_metrics(run) if "fid" in row] for run in (result.folder, tiny_run)
    )
    for key in ("step", "fid_extractor", "fid_protocol"):
        assert [row[key] for row in rows] == [row[key] for row in inline]
    saved = {info.step: name for name, info in checkpoints(result.folder).items()}
    evaluator = Evaluator(digits, load_extractor("classifier", digits.folder, CPU))
    for row in rows:
        # Measured again as the loop does it.
        checkpoint = result.folder / saved[row["step"]]
        G = load_checkpoint(checkpoint, CPU).G
        again = evaluator.fid(G, ALONE, num_samples=64, batch_size=256)
        info = CheckpointInfo.read(checkpoint)
        assert row["fid"] == info.fid == pytest.approx(again.value, rel=1e-6)
        assert info.fid_protocol == again.protocol.as_dict()
    assert result.best[1].fid == min(row["fid"] for row in rows)
    sheets = [(run / "samples").children() for run in (result.folder, tiny_run)]
    assert sheets[0] == sheets[1] != []


def test_a_held_out_reference_wants_held_out_images(digits):
    with pytest.raises(ConfigError, match=r"eval.reference = 'held_out': dataset digits has no"):
        biggan.train(tiny(eval__reference="held_out"), "held-out")


def test_async_is_refused_where_nobody_evaluates(digits):
    with pytest.raises(ConfigError, match=r"eval.mode = 'async': only Ray Train evaluates beside"):
        train_here(tiny(eval__mode="async"), locate("runs", "nobody"), digits)
    with pytest.raises(ConfigError, match=r"eval.patience 3 stops a run on its last FIDs"):
        tiny(eval__mode="async", eval__patience=3)
    with pytest.raises(ConfigError, match=r"eval.mode = 'async': a sweep stops trials on FIDs"):
        biggan.sweep(tiny(eval__mode="async"), "beside")
