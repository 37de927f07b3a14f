"""FID against a computation done again. Its parts have tests of their own in `metrics/`."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import add_imported, tiny

from biggan.config import EvalConfig
from biggan.errors import UserError
from biggan.evaluation import evaluate
from biggan.latents import sample_z
from biggan.metrics.extractors import load_extractor
from biggan.metrics.fid import EVALUATION_SEED, Evaluator, measure
from biggan.metrics.frechet import Moments, frechet_distance
from biggan.metrics.reference import Reference
from biggan.models import load_generator
from biggan.parallel import CPU, Workers
from biggan.pixels import from_uint8, to_uint8


@pytest.mark.parametrize("truncation", [None, 0.5])
def test_fid_done_again(digits, tiny_model, truncation):
    G = load_generator("tiny@best")
    fid = measure(G, digits, EvalConfig(), num_samples=300, truncation=truncation)
    extractor = load_extractor("classifier", digits.folder, CPU)
    z = sample_z([EVALUATION_SEED + i for i in range(300)], G.z_dim, truncation)
    labels = digits.class_sampler.spread(300)
    if truncation:
        for norm in G.batch_norms():  # The moments that were collected at it.
            i = G.tables.truncations.index(truncation)
            norm.running_mean, norm.running_var = norm.table_mean[i], norm.table_var[i]
    with torch.inference_mode():
        images = to_uint8(G(z, labels))
        fakes = extractor.network.features(from_uint8(images)).double().numpy()
        reals = extractor.network.features(from_uint8(digits.images)).double().numpy()
    c1, c2 = np.cov(fakes.T), np.cov(reals.T)
    gap = ((fakes.mean(0) - reals.mean(0)) ** 2).sum()
    expected = gap + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert fid.value == pytest.approx(expected, rel=1e-3)
    assert fid.protocol.num_samples == 300
    assert fid.protocol.reference_count == 1797
    assert "classifier" in str(fid)


def test_real_images_have_a_low_fid_and_noise_a_high_one(digits):
    extractor = load_extractor("classifier", digits.folder, CPU)
    reference = Reference.of(digits, extractor)

    def distance(images):
        moments = Moments(extractor.dim)
        moments.update(extractor(images).features)
        return frechet_distance(
            moments.mean, moments.covariance, reference.mean, reference.covariance
        )

    noise = torch.randint(0, 256, (600, 1, 16, 16), dtype=torch.uint8)
    assert distance(digits.images[::3]) < 0.05 * distance(noise)


def test_shares_of_workers_add_up(digits, tiny_model):
    G = load_generator("tiny@best")
    evaluator = Evaluator(digits, load_extractor("classifier", digits.folder, CPU))
    whole = evaluator.fid(G, Workers(0, 1, CPU), num_samples=101, batch_size=10)
    odd = evaluator.fid(G, Workers(0, 1, CPU), num_samples=101, batch_size=37)
    assert whole.value == pytest.approx(odd.value, rel=1e-4)


def test_other_moments_are_another_protocol(digits, tiny_model):
    with_tables, without = load_generator("tiny@best"), load_generator("tiny@best")
    without.tables = None
    at = {"num_samples": 64, "standing": 16_384}
    config = EvalConfig()
    assert measure(with_tables, digits, config, **at) == measure(without, digits, config, **at)
    theirs, ours = (
        measure(G, digits, config, **at, truncation=0.6) for G in (without, with_tables)
    )
    assert theirs.value != pytest.approx(ours.value, rel=1e-3)
    theirs, ours = theirs.protocol.as_dict(), ours.protocol.as_dict()
    assert theirs["tables"] is None
    assert ours["tables"]["images"] == 2048
    assert theirs | {"tables": ours["tables"]} == ours
    assert json.loads(json.dumps(ours)) == ours  # As a card gives it back.


def test_an_imported_model_has_to_be_told_its_dataset(digits, tiny_model):
    folder = add_imported("no-run", load_generator("tiny@v1"))
    with pytest.raises(UserError, match=r"model no-run@v1 was imported.*name a prepared one"):
        evaluate(model="no-run@v1")
    fid = evaluate(model=folder.uri, dataset="digits")
    assert fid.protocol["num_samples"] == 10_000
    assert fid.protocol["standing_statistics"] == 0
    again = evaluate(model="tiny@v1", num_samples=10_000)
    assert fid.value == pytest.approx(again.value, rel=1e-4)


def test_evaluating_runs_checkpoints_and_models(tiny_run, tiny_model):
    of_run = evaluate(run="tiny")
    assert of_run.protocol["num_samples"] == tiny().eval.num_samples
    checkpoint = tiny_run / tiny_model.card.checkpoint
    assert evaluate(checkpoint=checkpoint.uri).value == pytest.approx(of_run.value)
    of_model = evaluate(model="tiny@best")
    assert of_model.value == pytest.approx(tiny_model.card.fid, rel=1e-6)
    assert of_model.protocol == tiny_model.card.fid_protocol
    assert evaluate(run="tiny", num_samples=100).protocol["num_samples"] == 100
    truncated = evaluate(model="tiny", truncation=0.2, num_samples=32)
    assert truncated.protocol["truncation"] == 0.2
    assert truncated.value != of_model.value
    with pytest.raises(UserError, match="num_samples is 1, must be 2 or more"):
        evaluate(model="tiny", num_samples=1)
    with pytest.raises(UserError, match="exactly one"):
        evaluate(run="tiny", model="tiny")
