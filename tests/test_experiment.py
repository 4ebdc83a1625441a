"""From a configuration to a run, in this process: what is resolved, what is refused, what a user's own code may be."""

import io
import json
import math
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image as Picture
from typer.testing import CliRunner

from distfit import cli, experiment, models
from distfit import config as configuration
from distfit.config import load
from distfit.data.description import Description, Shard, Split
from distfit.data.plan import Order
from distfit.errors import InputError, RunError
from distfit.experiment import run, trial
from distfit.experiment.features import Reader
from distfit.experiment.job import prepare
from distfit.experiment.losses import loss_of
from distfit.experiment.names import named
from distfit.experiment.optimizers import optimizer_maker
from distfit.models import digits_cnn, four_convolutions, resnet50

IMAGES = {"image": "bytes", "filename": "bytes", "label": "int64"}
TABLE = {"inputs": "float32[4]", "label": "int64"}


@pytest.fixture
def config_of(tmp_path):
    """A configuration with overrides; images have a size, so that none needs to be read."""

    def make(*overrides):
        path = tmp_path / "x.yaml"
        path.write_text("data: {path: d, image: {size: [8, 8]}}\n")
        return load(path, overrides)

    return make


def description(features=IMAGES, classes=("cat", "dog")):
    per_class = tuple([100 // len(classes)] * len(classes))
    split = Split(records=100, per_class=per_class, shards=(Shard("a-00000-of-00001.tfrecord", 100, 9),))
    return Description(
        version=1,
        source="none",
        seed=0,
        validation_fraction=0.5,
        classes=classes,
        image_format="png",
        pixels="gray",
        features=features,
        splits={"train": split, "validation": split},
        folder="d",
    )


@pytest.fixture
def data():
    return description()


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """A function that makes a module `mine` of a user, found as `distfit train` finds it."""
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # tests count the files that are left
    (tmp_path / "code").mkdir()

    def write(text):
        (tmp_path / "code" / "mine.py").write_text(text)
        sys.modules.pop("mine", None)
        return tmp_path / "code" / "mine.py"

    yield write
    sys.modules.pop("mine", None)


def refusal(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The model and how it is compiled.


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


def test_files_of_a_split_are_read(config_of, data):
    job = prepare(config_of(), data)
    assert job.records("train").files == job.records("validation").files == ["d/a-00000-of-00001.tfrecord"]


def test_the_number_of_classes_may_be_stated(config_of, data):
    assert prepare(config_of("data.classes=2"), data).build().output_shape == (None, 2)
    message = refusal(prepare, config_of("data.classes=257"), data)
    assert "Expected a data set of 257 classes, as data.classes states, received 2 in 'd'" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=distfit.models:digits_cn", "did you mean 'digits_cnn'?"),
        ("model=distfit.no_models:f", "No module named 'distfit.no_models'"),
        ("model=no_package.models:f", "No module named 'no_package'"),
        ("model_options.unit=3", "unexpected keyword argument 'unit'. It takes input_shape, classes, filters"),
        ("loss=mean_square_error", "did you mean 'mean_squared_error'?"),
        ("loss=distfit.models:no_loss", f"Expected loss to name a function of distfit.models ({models.__file__})"),
        (
            "loss_options.label_smoothing=0.1",
            "sparse_categorical_crossentropy to take the loss_options, received: got an",
        ),
        ("model=distfit.experiment:smoke", "smoke to take input_shape and classes and the model_options, received: "),
        ("loss_options.label_smoothing=0.1", "unexpected keyword argument 'label_smoothing'. It takes from_logits"),
        ("data.one_hot=true", "Expected data.one_hot=false for loss=sparse_categorical_crossentropy"),
        ("loss=categorical_crossentropy", "Expected data.one_hot=true for loss=categorical_crossentropy"),
        ("metrics=[acuracy]", "did you mean 'accuracy'?"),
        ("optimizer.momentum=0.9", "Expected settings that Keras' Adam has, received optimizer.momentum=0.9"),
        ("optimizer.warmup_epochs=10", "to be less than epochs, received 10 of 10, 40 of 40 updates"),
        ("optimizer.no_weight_decay=[bias]", "Expected optimizer.weight_decay above 0 beside"),
        ("data.train=trian", "did you mean 'train'?"),
        ("data.validation=valid", "Expected a split of the data set in 'd', received 'valid'"),
        ("data.inputs=imag", "Expected data.inputs to be a feature of the data set in 'd', received 'imag'"),
        ("data.transform=distfit.models:none", "Expected data.transform to name a function of distfit.models"),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_refused(config_of, data, override, message):
    assert message in refusal(prepare, config_of(override), data)


# A user's own code.


def test_model_of_a_module_in_the_current_folder(config_of, data, write_module):
    write_module(
        "import keras\n"
        "def build(input_shape, classes, units):\n"
        "    return keras.Sequential([keras.Input(input_shape), keras.layers.Flatten(),\n"
        "                             keras.layers.Dense(units), keras.layers.Dense(classes)])\n"
    )
    model = prepare(config_of("model=mine:build", "model_options.units=7"), data).build()
    assert [tuple(weight.shape) for weight in model.weights] == [(64, 7), (7,), (7, 2), (2,)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def build(input_shape, classes):\n    return 3 / 0\n",
            "ZeroDivisionError from {file}:2 (build): division by",
        ),
        (
            "def build(input_shape, classes):\n    pass\n",
            "Expected mine:build to return a keras.Model, received NoneType",
        ),
        (
            "import keras\ndef build(input_shape, classes):\n"
            "    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(classes)])\n",
            "Expected mine:build to take inputs of the shape (8, 8, 1), as the data have them, received ValueError: ",
        ),
        (
            "import keras\nclass Net(keras.Model):\n    def call(self, x):\n        return x.shapes\n"
            "def build(input_shape, classes):\n    return Net()\n",
            "received AttributeError from {file}:4 (call): ",
        ),
        (
            "import keras\ndef build(input_shape, classes):\n    x = keras.Input(input_shape)\n"
            "    return keras.Model(x, keras.layers.Dense(1)(keras.layers.Flatten()(x)))\n",
            "Expected mine:build to end in 2 outputs, one for each class of the data, received 1.",
        ),
        (
            "import keras\ndef build(input_shape, classes):\n    x = keras.Input(input_shape)\n"
            "    return keras.Model(x, keras.ops.sum(x))\n",
            "Expected mine:build to end in 2 outputs, one for each class of the data, received 1.",
        ),
        (
            "import keras\ndef build(input_shape, classes):\n    return keras.layers.Conv2D(3, 0)\n",
            "ValueError from {file}:3 (build): The `kernel_size` argument",
        ),
    ],
)
def test_model_function_that_fails_is_told_by_its_line(config_of, data, write_module, code, message):
    file = write_module(code)
    assert message.format(file=file) in refusal(prepare(config_of("model=mine:build"), data).build)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import no_such_library\n",
            "ModuleNotFoundError from {file}:1 (<module>): No module named 'no_such_library'.",
        ),
        ("x = 1\ny = x.z\n", "AttributeError from {file}:2 (<module>): 'int' object has no attribute 'z'."),
        ("def build(:\n", "SyntaxError from {file}:1: invalid syntax"),
    ],
)
def test_module_that_cannot_be_imported_is_told_by_its_line(write_module, code, message):
    file = write_module(code)
    received = refusal(named, "model", "mine:build")
    assert received.startswith("Expected the module mine that model names to be imported, received ")
    assert message.format(file=file) in received


def test_own_transform_gives_a_model_several_inputs(config_of, write_module):
    write_module(
        "import keras\n"
        "def halves(inputs, label):\n"
        "    return {'left': inputs[:1], 'right': inputs[1:]}, label\n"
        "def build(input_shape, classes):\n"
        "    parts = {name: keras.Input(shape, name=name) for name, shape in input_shape.items()}\n"
        "    x = keras.layers.Concatenate()(list(parts.values()))\n"
        "    return keras.Model(parts, keras.layers.Dense(classes)(x))\n"
    )
    own = ["model=mine:build", "data.transform=mine:halves", "data.inputs=inputs", "data.image={}"]
    job = prepare(config_of(*own), description(TABLE))
    assert job.reader.input_shape == {"left": (1,), "right": (3,)}
    assert [tuple(weight.shape) for weight in job.build().weights] == [(4, 2), (2,)]


def test_transform_that_returns_no_pair_is_refused(config_of, write_module):
    write_module(
        "def half(inputs, label):\n    return inputs\ndef bad(inputs, label):\n    return inputs + 'x', label\n"
    )
    settings = ["data.inputs=inputs", "data.image={}"]
    message = refusal(prepare, config_of("data.transform=mine:half", *settings), description(TABLE))
    assert "Expected mine:half that data.transform names to return (input, label)" in message
    message = refusal(prepare, config_of("data.transform=mine:bad", *settings), description(TABLE))
    assert message.startswith("Expected mine:bad that data.transform names to return, received TypeError: ")
    assert 'mine.py", line 4, in bad' in message


# The optimizer.


def rates(settings, updates_per_epoch, epochs):
    optimizer = optimizer_maker(settings, updates_per_epoch, epochs)()
    rate = optimizer._learning_rate
    return [float(rate(step)) for step in range(updates_per_epoch * epochs + 1)] if callable(rate) else float(rate)


def test_cosine_falls_to_zero_at_the_end_of_the_run(config_of, data):
    job = prepare(config_of("optimizer.schedule=cosine", "epochs=3", "batch_size=32"), data)
    assert job.build().optimizer._learning_rate.get_config()["decay_steps"] == 3 * 4
    job = prepare(config_of("optimizer.schedule=cosine", "epochs=3", "steps_per_epoch=7"), data)
    assert job.build().optimizer._learning_rate.get_config()["decay_steps"] == 3 * 7


def test_warm_up_rises_in_a_line_then_the_cosine_falls(config_of):
    shown = rates(config_of("optimizer={learning_rate: 0.4, schedule: cosine, warmup_epochs: 2}").optimizer, 4, 6)
    assert shown[:9] == pytest.approx([0.05 * step for step in range(9)])
    assert shown[16] == pytest.approx(0.2)
    assert shown[-1] == pytest.approx(0, abs=1e-7)
    assert shown[8:] == sorted(shown[8:], reverse=True)


def test_warm_up_of_all_updates_is_refused(config_of):
    settings = config_of("optimizer={schedule: cosine, warmup_epochs: 0.9}").optimizer
    assert "received 0.9 of 1, 1 of 1 updates" in refusal(optimizer_maker, settings, 1, 1)


def test_warm_up_alone_keeps_the_learning_rate(config_of):
    shown = rates(config_of("optimizer={learning_rate: 0.4, warmup_epochs: 0.5}").optimizer, 4, 3)
    assert shown == pytest.approx([0, 0.2] + [0.4] * 11)


def test_without_schedule_the_learning_rate_is_a_number(config_of):
    assert rates(config_of("optimizer.learning_rate=0.4").optimizer, 4, 3) == pytest.approx(0.4)


def test_every_optimizer_of_the_configuration_is_one_of_keras(config_of):
    names = configuration.schema()["$defs"]["Optimizer"]["properties"]["name"]["enum"]
    made = {name: optimizer_maker(config_of(f"optimizer.name={name}").optimizer, 1, 1)() for name in names}
    assert {name: type(optimizer).__name__.lower() for name, optimizer in made.items()} == {
        name: name for name in names
    }


def test_weight_decay_leaves_out_what_is_named(config_of, data):
    sgd = "optimizer={name: sgd, learning_rate: 0.5, momentum: 0.9, weight_decay: 0.1, no_weight_decay: [bias]}"
    model = prepare(config_of(sgd), data).build()
    for variable in model.trainable_variables:
        variable.assign(tf.ones(variable.shape))
    model.optimizer.apply(
        [tf.zeros(variable.shape) for variable in model.trainable_variables], model.trainable_variables
    )
    values = {variable.name: np.unique(variable.numpy()) for variable in model.trainable_variables}
    assert values == {"kernel": pytest.approx(0.95), "bias": pytest.approx(1.0)}


def test_name_of_weights_that_no_weight_has_is_refused(config_of, data):
    sgd = "optimizer={name: sgd, weight_decay: 0.1, no_weight_decay: [bias, gama]}"
    message = refusal(prepare(config_of(sgd), data).build)
    assert "received 'gama', which is in none of bias, kernel." in message


# The loss.


def test_label_smoothing_is_keras_own():
    loss = loss_of("categorical_crossentropy", {"label_smoothing": 0.1})
    expected = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    assert (type(loss), loss.get_config()) == (type(expected), expected.get_config())


@pytest.mark.parametrize("name", ["binary_crossentropy", "mse", "kl_divergence", "log_cosh", "huber", "poisson"])
def test_losses_of_keras_are_found_by_name(name):
    loss = loss_of(name, {})
    assert isinstance(loss, keras.losses.Loss)
    assert loss.get_config().get("from_logits", True) is True


def test_own_losses_are_functions_or_classes(write_module):
    write_module(
        "import keras\n"
        "def plain(y, y_pred):\n    return y_pred\n"
        "class Scaled(keras.losses.Loss):\n"
        "    def __init__(self, factor):\n        super().__init__()\n        self.factor = factor\n"
    )
    assert loss_of("mine:plain", {}).__name__ == "plain"
    assert loss_of("mine:Scaled", {"factor": 3}).factor == 3
    assert "received ['factor'] for the function mine:plain" in refusal(loss_of, "mine:plain", {"factor": 3})
    assert "missing a required argument: 'factor'" in refusal(loss_of, "mine:Scaled", {})


# Records.


def png(pixels):
    file = io.BytesIO()
    Picture.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def read(config, features, classes=("cat", "dog")):
    reader = Reader.of(
        config.data, description({name: IMAGES.get(name, TABLE.get(name)) for name in features}, classes)
    )
    inputs, label = reader.transform({name: tf.constant(value) for name, value in features.items()})
    assert tuple(inputs.shape) == reader.input_shape
    return inputs.numpy(), label.numpy()


WIDE = np.full((4, 8, 3), 255, np.uint8)
WIDE[:, 2:6] = 51


@pytest.mark.parametrize(
    ("fit", "middle_row", "top_row"),
    [
        ("stretch", [1, 1, 0.2, 0.2, 0.2, 0.2, 1, 1], [1, 1, 0.2, 0.2, 0.2, 0.2, 1, 1]),
        ("pad", [1, 1, 0.2, 0.2, 0.2, 0.2, 1, 1], [0] * 8),
        ("crop", [0.2] * 8, [0.2] * 8),
    ],
)
def test_images_of_other_proportions_are_stretched_padded_or_cut(config_of, fit, middle_row, top_row):
    config = config_of(f"data.image={{size: [8, 8], channels: 3, fit: {fit}}}")
    pixels, label = read(config, {"image": png(WIDE), "label": 1})
    assert pixels.shape == (8, 8, 3)
    assert pixels[4, :, 0] == pytest.approx(middle_row)
    assert pixels[0, :, 0] == pytest.approx(top_row)
    assert label == 1


def test_standardised_images_have_mean_0_and_variance_1(config_of):
    config = config_of("data.image={size: [8, 8], channels: 3, fit: pad, standardise: true}")
    pixels, _ = read(config, {"image": png(WIDE), "label": 1})
    assert (pixels.mean(), pixels.var()) == pytest.approx((0, 1), abs=1e-5)


def test_labels_may_be_one_hot(config_of):
    _, label = read(config_of("data.one_hot=true"), {"image": png(WIDE), "label": 2}, ("a", "b", "c", "d"))
    assert label.tolist() == [0, 0, 1, 0]


def test_numbers_are_inputs_as_they_are(config_of):
    config = config_of("data={path: d, inputs: inputs}")
    inputs, label = read(config, {"inputs": np.array([1, 2, 3, 1e6], np.float32), "label": 1})
    assert (inputs.tolist(), label) == ([1, 2, 3, 1e6], 1)


def test_image_settings_for_numbers_are_refused(config_of):
    message = refusal(prepare, config_of("data.inputs=inputs"), description(TABLE))
    assert "Expected no data.image for the feature 'inputs', which is no image" in message


def test_mean_and_variance_of_images_are_refused(config_of, data, write_module):
    write_module("def build(input_shape, classes, mean):\n    raise AssertionError\n")
    message = refusal(prepare(config_of("model=mine:build"), data).measured)
    assert "Expected numbers for a model that asks for their mean and variance, received encoded images" in message


def test_dtype_policy_is_set_and_given_back():
    before = keras.config.floatx(), keras.config.dtype_policy().name
    for dtype, floatx, compute in [("float64", "float64", "float64"), ("mixed_bfloat16", "float32", "bfloat16")]:
        with run.dtype_policy(dtype):
            assert (keras.config.floatx(), keras.config.dtype_policy().compute_dtype) == (floatx, compute)
        assert (keras.config.floatx(), keras.config.dtype_policy().name) == before


def test_a_file_of_mixed_float16_says_that_its_loss_was_scaled(config_of, data):
    """Keras' own wrapping in `compile` is not written: a process of another policy would drop the optimizer's state."""
    with run.dtype_policy("mixed_float16"):
        model = prepare(config_of("dtype=mixed_float16", "optimizer.gradient_accumulation_steps=2"), data).build()
    assert model.get_compile_config()["optimizer"]["class_name"] == "LossScaleOptimizer"
    assert model.optimizer.inner_optimizer.gradient_accumulation_steps == 2


def test_history_is_whole_json_with_full_precision(tmp_path):
    history = keras.callbacks.History()
    history.history = {"loss": [1.0, 0.1 + 0.2], "val_loss": [math.inf, math.nan]}
    run._save_history(history, tmp_path / "history.json")
    assert json.loads((tmp_path / "history.json").read_text()) == {
        "history": {"loss": [1.0, 0.1 + 0.2], "val_loss": [None, None]},
        "final": {"loss": 0.1 + 0.2, "val_loss": None},
    }


def test_history_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "history.json").mkdir()
    with pytest.raises(RunError, match=r"Expected to write .*history\.json, received: Is a directory\. Make room"):
        run._save_history(keras.callbacks.History(), tmp_path / "history.json")
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


# The models of the examples.


def test_digits_cnn_refuses_images_that_are_too_small():
    with pytest.raises(InputError, match="at least 4x4 pixels for digits_cnn, received 8x3"):
        digits_cnn((8, 3, 1))


def test_four_convolutions_refuse_images_that_are_too_small():
    assert four_convolutions((31, 31, 3)).output_shape == (None, 257)
    with pytest.raises(InputError, match="at least 31x31 pixels for four_convolutions, received 31x30"):
        four_convolutions((31, 30, 3))


def test_digits_cnn_has_nothing_that_differs_between_engines():
    kinds = {type(layer).__name__ for layer in digits_cnn().layers}
    assert not kinds & {"BatchNormalization", "Dropout", "MaxPooling2D", "ReLU"}


def test_resnet50_refuses_images_smaller_than_its_crop():
    with pytest.raises(InputError, match="at least 224x224 pixels to crop, received 200x300"):
        resnet50((200, 300, 3))


# Whole runs on a table, which take a second or two.


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "wine"
    built = CliRunner().invoke(cli.app, ["data", "build", "--from", "wine", str(folder)])
    assert built.exit_code == 0, built.output
    return folder


@pytest.fixture
def table(wine, tmp_path):
    """A function from overrides to the configuration of a short run on the wines."""
    path = tmp_path / "table.yaml"
    path.write_text(
        f"data: {{path: {wine}, inputs: inputs}}\nmodel: distfit.models:table_network\n"
        f"run_dir: {tmp_path / 'run'}\nepochs: 2\nverbose: 0\nstrategy: single\n"
    )
    return lambda *overrides: load(path, overrides)


def test_the_network_normalises_by_the_training_data(table):
    from distfit.data.description import load as load_description

    job = prepare(table(), load_description(table().data.path))
    job = job.knowing(job.measured())
    rows = np.concatenate([inputs.numpy() for inputs, _ in _batches(job.records("train"))]).astype(np.float64)
    assert job.arguments["mean"] == pytest.approx(rows.mean(0).tolist(), rel=1e-9)
    assert job.arguments["variance"] == pytest.approx(rows.var(0).tolist(), rel=1e-9)
    normalised = job.build().layers[1](rows.astype(np.float32)).numpy()
    assert normalised.mean(0) == pytest.approx(np.zeros(13), abs=1e-4)


def _batches(records):
    order = Order(records.records, shuffle=False)
    return [data for _, _, data in records.process_batches(order=order, global_batch=50)]


def test_evaluation_is_the_last_validation_of_the_training(table, tmp_path):
    history = experiment.train(table()).history
    found = experiment.evaluate(table(), verbose=0)
    assert found.metrics == {name: history[f"val_{name}"][-1] for name in ("loss", "accuracy")}
    assert (found.split, found.records) == ("validation", 36)
    other = experiment.evaluate(table("metrics=[sparse_top_k_categorical_accuracy]"), "train", found.model, verbose=0)
    assert other.metrics["sparse_top_k_categorical_accuracy"] == 1
    assert other.records == 142


def test_validation_of_some_steps_is_evaluated_alike(table):
    history = experiment.train(table("validation_steps=1", "batch_size=8")).history
    found = experiment.evaluate(table("validation_steps=1", "batch_size=8"), verbose=0)
    assert (found.metrics["loss"], found.records) == (history["val_loss"][-1], 8)


def test_evaluation_without_a_model_or_a_split_is_refused(table, tmp_path):
    message = refusal(experiment.evaluate, table())
    assert (
        f"Expected a trained model at '{tmp_path / 'run' / 'checkpoint' / 'model.keras'}', received no such" in message
    )
    assert "distfit train" in message
    (tmp_path / "text.keras").write_text("no model")
    assert "received another kind of file" in refusal(experiment.evaluate, table(), None, tmp_path / "text.keras")
    assert "Name one with --split" in refusal(experiment.evaluate, table("data.validation=null"))
    assert "received 'tset'" in refusal(experiment.evaluate, table(), "tset")


def test_evaluation_of_a_model_for_other_data_is_refused(table, tmp_path):
    path = tmp_path / "other.keras"
    keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)]).save(path)
    message = refusal(experiment.evaluate, table(), None, path)
    assert f"Expected {path} to take inputs of the shape (13,), as the data have them, received ValueError: " in message
    assert message.endswith("Name a model that was trained on such data, with the same input_shape.")


OWN_CLASS = """
import keras

class Twice(keras.layers.Layer):
    def call(self, x):
        return 2 * x

class Network(keras.Model):
    def __init__(self, classes):
        super().__init__()
        self.classes = classes
        self.twice, self.dense = Twice(), keras.layers.Dense(classes)

    def call(self, x):
        return self.dense(self.twice(x))

class Saved(Network):
    def get_config(self):
        return {"classes": self.classes}

def build(input_shape, classes):
    return Saved(classes)

def unsaved(input_shape, classes):
    return Network(classes)

def with_lambda(input_shape, classes):
    return keras.Sequential([
        keras.Input(input_shape), keras.layers.Lambda(lambda x: x / 1000), keras.layers.Dense(classes)
    ])

def nothing(y, y_pred):
    return keras.ops.sum(y_pred, axis=-1) * float("nan")
"""


def test_own_classes_load_back_and_lambdas_do_not(table, write_module):
    write_module(OWN_CLASS)
    history = experiment.train(table("model=mine:build")).history
    assert experiment.evaluate(table("model=mine:build"), verbose=0).metrics["loss"] == history["val_loss"][-1]
    message = refusal(experiment.train, table("model=mine:unsaved"))
    assert "Expected mine:unsaved to return a model that Keras can save, received Network: Object" in message
    experiment.train(table("model=mine:with_lambda", "resume=false"))
    message = refusal(experiment.evaluate, table("model=mine:with_lambda"))
    assert "Lambda layers hold code and do not: write them as classes." in message


def test_smoke_runs_two_steps_of_everything_and_leaves_nothing(table, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    verdict = experiment.smoke(table("optimizer={schedule: cosine, warmup_epochs: 1}"))
    assert verdict.passed, verdict.text()
    assert [finding.what for finding in verdict.findings] == ["training", "validation", "steps", "checkpoint", "logs"]
    assert sorted(tmp_path.rglob("*")) == before


def test_smoke_says_what_would_fail(table, tmp_path, write_module):
    write_module(OWN_CLASS)
    before = sorted(tmp_path.rglob("*"))
    verdict = experiment.smoke(table("model=mine:with_lambda", "loss=mine:nothing"))
    passed = {finding.what: finding.passed for finding in verdict.findings}
    assert passed == {"training": False, "validation": False, "steps": True, "checkpoint": False, "logs": True}
    assert not verdict.passed
    assert "FAILED  training    loss nan" in verdict.text()
    assert "Lambda" in verdict.text()
    assert sorted(tmp_path.rglob("*")) == before


def test_smoke_notices_another_model_and_missing_logs(table, tmp_path):
    history = keras.callbacks.History()
    history.history = {"loss": [1.0], "val_loss": [1.0]}
    finding = trial._logs(tmp_path, history)
    assert (finding.passed, finding.text) == (False, "no epoch_loss of train, validation in TensorBoard's events")
    ones = np.ones((2, 3))
    assert trial._close([ones], [ones * (1 + 1e-6)], "float32")
    assert not trial._close([ones], [ones * 1.01], "float32")
    assert trial._close([ones], [ones * 1.01], "bfloat16")


def test_smoke_forgives_young_averages_of_batch_normalization():
    history = keras.callbacks.History()
    history.history = {"loss": [1.0], "val_loss": [math.nan]}
    layers = [keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    passed = []
    for model in (keras.Sequential(layers), keras.Sequential([layers[0], layers[2]])):
        history.set_model(model)
        passed.append([finding.passed for finding in trial._losses(history)])
    assert passed == [[True, True], [True, False]]
