"""One configuration: frozen, typed, with errors that say what is wrong and how to mend it."""

import pydantic
import pytest
import yaml

from biggan import presets
from biggan.config import FIELD_NAMES, ConfigError, RunConfig


def test_override_by_dotted_name():
    config = RunConfig().override({"optim.lr_g": 3e-4, "model.attention": [16], "total_kimg": 7})
    assert (config.optim.lr_g, config.model.attention, config.total_kimg) == (3e-4, (16,), 7.0)
    assert RunConfig().optim.lr_g != 3e-4


def test_frozen():
    with pytest.raises(pydantic.ValidationError):
        RunConfig().seed = 3


@pytest.mark.parametrize(
    "typo,meant",
    [
        ("optim.lr_gg", "optim.lr_g"),
        ("optim.batchsize", "optim.batch_size"),
        ("optimm.lr_g", "optim"),
        ("lr_g", "optim.lr_g"),
        ("model.lr_d", "optim.lr_d"),
    ],
)
def test_a_typo_suggests_the_nearest_name(typo, meant):
    with pytest.raises(ConfigError, match=f"did you mean {meant}"):
        RunConfig().override({typo: 1})


@pytest.mark.parametrize(
    "field,value,said",
    [
        ("optim.lr_g", -1, "greater than 0"),
        ("optim.lr_g", "fast", "valid number"),
        ("optim.batch_size", 1, "greater than or equal to 2"),
        ("loss.name", "hinged", "'hinge', 'bce', 'least_squares' or 'wasserstein'"),
        ("eval.patience", -3, "greater than or equal to 0"),
    ],
)
def test_a_bad_value_is_named_with_its_limit(field, value, said):
    with pytest.raises(ConfigError) as error:
        RunConfig().override({field: value})
    assert field in str(error.value)
    assert repr(value) in str(error.value)
    assert said in str(error.value)


def test_accumulation_must_divide_the_batch():
    with pytest.raises(ConfigError, match=r"batch_size 64 is not a multiple.*accumulation 3"):
        RunConfig().override({"optim.batch_size": 64, "optim.accumulation": 3})


def test_yaml_round_trip(tmp_path):
    config = presets.imagenet128()
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert RunConfig.from_yaml(file) == config
    file.write_text("optim: {lr_g: 1e-4}")  # YAML 1.1 reads this as text.
    assert RunConfig.from_yaml(file).optim.lr_g == 1e-4
    file.write_text("- 1")
    with pytest.raises(ConfigError, match="list"):
        RunConfig.from_yaml(file)


def test_every_field_has_a_dotted_name_and_a_description():
    assert {"optim.lr_g", "loss.ortho_g", "eval.every_kimg", "seed"} <= set(FIELD_NAMES)
    for section in (RunConfig, *(type(getattr(RunConfig(), s)) for s in ("model", "loss", "eval"))):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_build(name):
    assert presets.get(name) == presets.PRESETS[name]()
    assert presets.PRESETS[name].__doc__


def test_unknown_preset():
    with pytest.raises(ValueError, match="'digit' is not known; there are: digits"):
        presets.get("digit")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(value):
    with pytest.raises(ConfigError, match=r"total_kimg = .*finite"):
        RunConfig().override({"total_kimg": value})


def test_yaml_that_is_none_is_named(tmp_path):
    file = tmp_path / "run.yaml"
    for content in (b"a: [1", b"\xff\xfe\x00"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"run.yaml is no readable YAML"):
            RunConfig.from_yaml(file)


def test_a_bare_off_in_yaml_is_the_word(tmp_path):
    file = tmp_path / "off.yaml"
    file.write_text("guard: off\nspeed:\n  compile: off\n")  # A boolean to YAML 1.1.
    config = RunConfig.from_yaml(file)
    assert (config.guard, config.speed.compile) == ("off", "off")
    file.write_text("guard: rollback\n")
    assert RunConfig.from_yaml(file).guard == "rollback"
