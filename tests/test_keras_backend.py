import pytest

from distfit.errors import InputError
from distfit.keras_backend import configured, refuse_others
from tests.ranks import launch
from tests.test_failing import errors


@pytest.fixture
def keras_home(tmp_path):
    def with_file(text):
        (tmp_path / "keras.json").write_text(text)
        return {"KERAS_HOME": str(tmp_path)}

    return with_file


def test_nothing_said_means_tensorflow(tmp_path):
    assert configured({"KERAS_HOME": str(tmp_path)}) == ("tensorflow", "")


def test_the_file_counts_and_the_variable_wins(keras_home):
    environment = keras_home('{"backend": "torch"}')
    assert configured(environment)[0] == "torch"
    assert configured({**environment, "KERAS_BACKEND": "tensorflow"}) == ("tensorflow", "KERAS_BACKEND")


def test_a_user_without_a_home_is_no_trouble(monkeypatch):
    # As a user number that nobody knows, which is what some clusters start containers with.
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert configured({}) in {("tensorflow", ""), ("tensorflow", "/tmp/.keras/keras.json")}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_file_that_says_nothing_is_ignored_as_keras_does(keras_home, text):
    refuse_others(keras_home(text))


def test_another_backend_is_refused_with_the_place_that_names_it(keras_home):
    with pytest.raises(
        InputError, match=r"received the backend 'torch' from .*keras\.json\. Type: export KERAS_BACKEND"
    ):
        refuse_others(keras_home('{"backend": "torch"}'))


def test_the_command_refuses_a_backend_that_is_not_installed():
    job = launch(["-m", "distfit", "train", "configs/digits.yaml"], env={"KERAS_BACKEND": "jax"})
    assert job.code == 2, job.report()
    (paragraph,) = errors(job).splitlines()
    assert "received the backend 'jax' from KERAS_BACKEND" in paragraph
