import json

import keras
import pytest

from distfit import experiment
from distfit.config import load
from distfit.data.description import Description, Shard, Split
from distfit.errors import InputError
from distfit.experiment import prepare
from distfit.models import digits_cnn


@pytest.fixture
def config_of(tmp_path):
    """A configuration with overrides; images have a size, so that none needs to be read."""

    def make(*overrides):
        path = tmp_path / "x.yaml"
        path.write_text("data: {path: d, image: {size: [8, 8]}}\n")
        return load(path, overrides)

    return make


@pytest.fixture
def data():
    split = Split(records=100, per_class=(50, 50), shards=(Shard("a-00000-of-00001.tfrecord", 100, 9),))
    return Description(
        version=1,
        source="none",
        seed=0,
        validation_fraction=0.5,
        classes=("cat", "dog"),
        image_format="png",
        pixels="gray",
        features={},
        splits={"train": split, "validation": split},
        folder="d",
    )


def test_model_is_compiled_for_the_data_and_the_configuration(config_of, data):
    job = prepare(config_of("model_options.units=5", "optimizer={name: sgd, momentum: 0.5, clipnorm: 2}"), data)
    model = job.build()
    assert model.input_shape == (None, 8, 8, 1)
    assert model.output_shape == (None, 2)
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    assert (model.optimizer.momentum, model.optimizer.clipnorm) == (0.5, 2.0)
    assert model.loss.get_config()["from_logits"] is True


def test_every_built_model_has_an_optimizer_of_its_own(config_of, data):
    job = prepare(config_of(), data)
    assert job.build().optimizer is not job.build().optimizer


def test_cosine_falls_to_zero_at_the_end_of_the_run(config_of, data):
    job = prepare(config_of("optimizer.schedule=cosine", "epochs=3", "batch_size=32"), data)
    schedule = job.build().optimizer._learning_rate
    assert schedule.get_config()["decay_steps"] == 3 * 4


def test_files_of_both_splits_are_read_and_validation_can_be_left_out(config_of, data):
    job = prepare(config_of(), data)
    assert job.train.files == job.validation.files == ["d/a-00000-of-00001.tfrecord"]
    assert prepare(config_of("data.validation=null"), data).validation is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=distfit.models:digits_cn", "did you mean 'digits_cnn'?"),
        ("model=distfit.no_models:f", "No module named 'distfit.no_models'"),
        (
            "model_options.unit=3",
            "unexpected keyword argument 'unit'. It takes input_shape, classes, filters",
        ),
        ("loss=mean_square_error", "did you mean 'mean_squared_error'?"),
        ("loss=distfit.models:no_loss", "Expected loss to name a function of distfit.models"),
        ("metrics=[acuracy]", "did you mean 'accuracy'?"),
        ("optimizer.momentum=0.9", "Expected settings that Keras' Adam has, received optimizer.momentum=0.9"),
        ("data.train=trian", "did you mean 'train'?"),
        ("data.validation=valid", "Expected a split of the data set in 'd', received 'valid'"),
    ],
)
def test_names_that_are_not_there_are_refused(config_of, data, override, message):
    with pytest.raises(InputError) as caught:
        prepare(config_of(override), data)
    assert message in str(caught.value)


def test_digits_cnn_refuses_images_that_are_too_small():
    with pytest.raises(InputError, match="at least 4x4 pixels for digits_cnn, received 8x3"):
        digits_cnn((8, 3, 1))


def test_digits_cnn_has_nothing_that_differs_between_engines():
    kinds = {type(layer).__name__ for layer in digits_cnn().layers}
    assert not kinds & {"BatchNormalization", "Dropout", "MaxPooling2D", "ReLU"}


@pytest.mark.parametrize(
    ("dtype", "floatx", "compute"),
    [("float64", "float64", "float64"), ("mixed_bfloat16", "float32", "bfloat16")],
)
def test_dtype_policy_is_set_and_given_back(dtype, floatx, compute):
    before = keras.config.floatx(), keras.config.dtype_policy().name
    with experiment._dtype_policy(dtype):
        assert (keras.config.floatx(), keras.config.dtype_policy().compute_dtype) == (floatx, compute)
    assert (keras.config.floatx(), keras.config.dtype_policy().name) == before


def test_history_is_whole_json_with_full_precision(tmp_path):
    history = keras.callbacks.History()
    history.history = {"loss": [1.0, 0.1 + 0.2]}
    experiment._save_history(history, tmp_path / "history.json")
    assert json.loads((tmp_path / "history.json").read_text()) == {
        "history": {"loss": [1.0, 0.1 + 0.2]},
        "final": {"loss": 0.1 + 0.2},
    }
