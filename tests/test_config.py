import doctest
import subprocess
import sys

import jsonschema
import pydantic
import pytest

from distfit import config
from distfit.config import RunConfig, descriptions, load, save
from distfit.errors import InputError


@pytest.fixture
def written(tmp_path):
    """A function that writes a YAML text and returns its path."""

    def write(text):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def minimal(written):
    return written("data: {path: d}\n")


def refused(path, *overrides):
    with pytest.raises(InputError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_minimal_configuration_has_defaults(minimal):
    run = load(minimal)
    assert (run.data.path, run.data.train, run.batch_size, run.dtype) == ("d", "train", 32, "float32")


def test_configuration_is_frozen(minimal):
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        load(minimal).epochs = 3


def test_unknown_key_gets_nearest_name_and_its_meaning(written):
    path = written("data: {path: d}\nbach_size: 3\n")
    assert refused(path) == (
        f"unknown key 'bach_size' in {path}: did you mean 'batch_size'? (the records of one step over all replicas)"
    )


def test_misspelt_required_key_is_called_unknown_not_missing(written):
    assert "did you mean 'data'?" in refused(written("dat: {path: d}\n"))


def test_unknown_nested_key_gets_its_dotted_name(minimal):
    message = refused(minimal, "optimizer.learnin_rate=1")
    assert "unknown key 'optimizer.learnin_rate' in the override 'optimizer.learnin_rate=1'" in message
    assert "did you mean 'optimizer.learning_rate'?" in message


def test_key_at_the_wrong_level_is_found_where_it_belongs(minimal):
    assert "did you mean 'optimizer.learning_rate'?" in refused(minimal, "learning_rate=0.1")


def test_unknown_key_near_nothing_lists_its_siblings(minimal):
    assert refused(minimal, "data.image.zzz=1").endswith(
        "known are data.image.size, data.image.fit, data.image.channels, data.image.standardise."
    )


@pytest.mark.parametrize(
    ("override", "expected", "received"),
    [
        ("epochs=two", "valid integer", "'two'"),
        ("epochs='2'", "valid integer", "'2'"),
        ("epochs=true", "valid integer", "True"),
        ("epochs=2.0", "valid integer", "2.0"),
        ("batch_size=0", "greater than or equal to 1", "0"),
        ("optimizer.learning_rate=fast", "valid number", "'fast'"),
        ("optimizer.learning_rate=.nan", "finite number", "nan"),
        ("optimizer.name=sdg", "'sgd'", "'sdg'"),
        ("optimizer=sgd", "a group of `field: value` lines", "'sgd'"),
        ("data.image.channels=2", "1 or 3", "2"),
        ("data.image.fit=cut", "'stretch', 'pad' or 'crop'", "'cut'"),
        ("data.classes=0", "greater than or equal to 1", "0"),
        ("data.transform=halves", "of the form package.module:function", "'halves'"),
        ("optimizer.warmup_epochs=-1", "greater than or equal to 0", "-1"),
        ("optimizer.no_weight_decay=bias", "a list", "'bias'"),
        ("steps_per_epoch=0", "greater than or equal to 1", "0"),
        ("data.image.size=8", "a list", "8"),
        ("data.image.size=[8]", "a list of two", "[8]"),
        ("data.image.size=[8, 8, 1]", "a list of two", "[8, 8, 1]"),
        ("data.image.size=[8, x]", "valid integer", "'x'"),
        ("metrics=accuracy", "a list", "'accuracy'"),
        ("model=digits_cnn", "of the form package.module:function", "'digits_cnn'"),
        ("model_options=3", "a group of `field: value` lines", "3"),
        ("dtype=float16", "'float32', 'float64', 'mixed_bfloat16' or 'mixed_float16'", "'float16'"),
        ("stall_limit_s=0", "greater than 0", "0"),
        ("verbose=loud", "'auto', 0, 1 or 2", "'loud'"),
        ("verbose=true", "'auto', 0, 1 or 2", "'True'"),
        ("data.image.channels=1.0", "1 or 3", "'1.0'"),
        ("seed.x=1", "valid integer", "{'x': 1}"),
    ],
)
def test_wrong_value_names_field_source_expected_received_and_meaning(minimal, override, expected, received):
    field = override.split("=")[0].removesuffix(".x")
    message = refused(minimal, override)
    assert message.startswith(f"Expected {field} in the override {override!r} to be ")
    assert expected in message
    assert f"received {received}." in message
    assert message.endswith(f"Its meaning: {dict(descriptions())[field]}.")


def test_wrong_value_in_the_file_names_the_file(written):
    path = written("data: {path: d}\nepochs: many\n")
    assert refused(path).startswith(f"Expected epochs in {path} to be a valid integer, received 'many'.")


def test_missing_field_is_named_with_its_meaning(written):
    assert "Expected the field 'data.path'" in refused(written("data: {train: x}\n"))


def test_overrides_replace_and_later_ones_win(minimal):
    run = load(minimal, ["epochs=3", "epochs=4", "data.image.size=[28, 32]", "model_options.units=8"])
    assert (run.epochs, run.data.image.size, run.model_options) == (4, (28, 32), {"units": 8})


def test_override_without_a_value_is_null(written):
    assert load(written("data: {path: d}\ndevices: 2\n"), ["devices="]).devices is None


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001"])
def test_numbers_with_exponents_are_numbers(minimal, text):
    assert load(minimal, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 0.001


@pytest.mark.parametrize("text", ["epochs", "=3", "a..b=3", "--epochs", ""])
def test_override_that_is_no_assignment_is_refused(minimal, text):
    message = refused(minimal, text)
    assert f"received {text!r}" in message
    assert "epochs=5" in message


def test_override_with_broken_yaml_is_refused(minimal):
    assert "Expected a value in YAML after metrics=, received '[a'" in refused(minimal, "metrics=[a")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("epochs: 1\nmetrics: [a\n", "line 3"),
        ("epochs: 1\nepochs: 2\n", "line 2: the key 'epochs' a second time"),
        ("1: 2\n", "line 1: a key that is no name"),
        ("\tepochs: 1\n", "line 1"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(written, text, problem):
    path = written(text)
    message = refused(path)
    assert f"Expected YAML in {str(path)!r}" in message
    assert problem in message


@pytest.mark.parametrize("text", ["", "- 1\n", "just words\n"])
def test_yaml_without_fields_is_refused(written, text):
    assert "Expected a configuration of `field: value` lines" in refused(written(text))


def test_missing_file_is_refused(tmp_path):
    assert "No such file" in refused(tmp_path / "none.yaml")


def test_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xff")
    assert "not UTF-8 text" in refused(tmp_path / "x.yaml")


def test_saved_configuration_loads_as_itself(minimal, tmp_path):
    run = load(minimal, ["data.image.size=[28, 28]", "metrics=[accuracy, mae]", "optimizer.clipnorm=1"])
    save(run, tmp_path / "saved.yaml", header="one\ntwo")
    assert load(tmp_path / "saved.yaml") == run
    assert (tmp_path / "saved.yaml").read_text().startswith("# one\n# two\ndata:\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved.yaml", "x.yaml"]


def test_every_field_says_what_it_means():
    meanings = dict(descriptions())
    assert set(RunConfig.model_fields) <= set(meanings)
    assert all(meaning != "None" and not meaning.endswith(".") for meaning in meanings.values())


def test_schema_says_what_every_field_means_and_takes_no_other():
    text = config.schema()
    sections = [text, *text["$defs"].values()]
    described = {
        name: field.get("description") for section in sections for name, field in section["properties"].items()
    }
    meanings = {name.rpartition(".")[2]: meaning for name, meaning in descriptions()}
    assert described == meanings
    assert all(section["additionalProperties"] is False for section in sections)


def test_schema_refuses_what_loading_refuses():
    validator = jsonschema.Draft202012Validator(config.schema())
    assert validator.is_valid({"data": {"path": "d"}, "epochs": 3})
    for wrong in ({}, {"data": {"path": "d"}, "epoch": 3}, {"data": {"path": "d"}, "epochs": "3"}):
        assert not validator.is_valid(wrong)


def test_the_strategies_in_the_description_are_those_that_exist():
    from distfit.backends import STRATEGIES

    meaning = dict(descriptions())["strategy"]
    assert all(name in meaning for name in STRATEGIES)


def test_examples_in_the_module_run():
    assert doctest.testmod(config).failed == 0


def test_importing_it_loads_no_tensorflow():
    code = "import sys, distfit.config; sys.exit(any(m in sys.modules for m in ('tensorflow', 'keras')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
