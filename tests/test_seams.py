"""The private parts of Keras and TensorFlow that distfit stands on: which version broke which one.

`distfit.backends.seams` is their table. Each one is looked for, taken away and missed; below that, what the parts
*do* is pinned, for a name may stay and mean something else. Every failure shows the versions.
"""

import dataclasses
import importlib.metadata
import inspect
import re
import sys
import tomllib
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.losses.loss import apply_mask, squeeze_or_expand_to_same_rank
from packaging.requirements import Requirement

from distfit.backends import seams
from distfit.backends.hooks import replaced
from distfit.errors import InputError
from distfit.training import moving, terms
from tests import oldest
from tests.ranks import ROOT, launch

VERSIONS = f"TensorFlow {tf.__version__}, Keras {keras.__version__}"
each_hook = pytest.mark.parametrize("hook", seams.HOOKS, ids=lambda hook: hook.path)


@pytest.fixture(autouse=True)
def _versions():
    """Shown beside every failure."""
    print(VERSIONS)


@pytest.fixture
def generated(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generated

    return generated


@pytest.fixture
def model():
    keras.utils.set_random_seed(0)
    x = keras.Input((3,))
    outputs = [keras.layers.Dense(2, name="a")(x), keras.layers.Dense(1, name="b")(x)]
    model = keras.Model(x, outputs)
    model.compile("adam", ["mse", keras.losses.MeanSquaredError(reduction="sum")], loss_weights=[1.0, 0.5])
    spec = (
        tf.TensorSpec([None, 3], tf.float32),
        (tf.TensorSpec([None, 2], tf.float32), tf.TensorSpec([None, 1], tf.float32)),
    )
    model._symbolic_build(data_batch=spec)
    return model


@each_hook
def test_every_private_part_is_there(hook):
    assert seams.missing([hook]) == [], f"gone in {VERSIONS}"


def test_each_part_is_in_the_table_once():
    paths = [hook.path for hook in seams.HOOKS]
    assert sorted(set(paths)) == sorted(paths)


def test_what_is_replaced_is_asked_by_somebody():
    private = [hook for hook in seams.REPLACED if re.match("_[a-z]", hook.name)]
    assert [hook.path for hook in private if not hook.asked_by] == []
    assert len(private) > 5


def test_the_table_has_no_part_that_the_source_no_longer_uses(generated):
    assert [hook.path for hook in seams.HOOKS if not generated.used_in(hook)] == []


def test_the_versions_page_shows_the_table(generated):
    page = generated.VERSIONS_PAGE.read_text()
    assert "`keras.Model._compute_loss`" in page
    assert generated.with_hooks(page) == page, "type: python docs/generated.py"


def take_away(hook, monkeypatch):
    """As if this Keras had another name for it: no module, no member, no method that sets it."""
    owner = seams._find(hook.path.rpartition(".")[0])
    if inspect.ismodule(owner):
        monkeypatch.delattr(owner, hook.name)
        monkeypatch.setitem(sys.modules, hook.path, None)
    elif inspect.isfunction(owner):
        rename(inspect.unwrap(owner), hook.name, monkeypatch)
    for one in getattr(owner, "__mro__", ()):
        if hook.name in vars(one):
            monkeypatch.delattr(one, hook.name)
        for member in list(vars(one).values()):
            if inspect.isfunction(member):
                rename(inspect.unwrap(member), hook.name, monkeypatch)


def rename(function, name, monkeypatch):
    """The function asks for something else in place of `name`."""

    def renamed(code):
        names = tuple("renamed" if each == name else each for each in code.co_names)
        inner = tuple(renamed(each) if isinstance(each, types.CodeType) else each for each in code.co_consts)
        return code.replace(co_names=names, co_consts=inner)

    monkeypatch.setattr(function, "__code__", renamed(function.__code__))


@each_hook
def test_a_part_that_is_taken_away_is_missed(hook, monkeypatch):
    take_away(hook, monkeypatch)
    assert hook.path in seams.missing()


@pytest.mark.parametrize("hook", [hook for hook in seams.HOOKS if hook.asked_by], ids=lambda hook: hook.path)
def test_a_part_that_nobody_asks_for_any_more_is_missed(hook, monkeypatch):
    asking = seams._find(hook.asked_by)
    rename(inspect.unwrap(getattr(asking, "fget", asking)), hook.name, monkeypatch)
    assert f"{hook.path} in {hook.asked_by}" in seams.missing()
    gone = dataclasses.replace(hook, asked_by="keras.Model.no_such_method")
    assert seams.missing([gone]) == [f"{hook.path} in {gone.asked_by}"]


class Layer:
    """Like one of Keras: some attributes are its instances' alone."""

    @property
    def sum(self):
        return self._given + self._lost

    def build(self):
        self._given = [1 for _ in range(self._counted())]


def test_an_attribute_of_instances_is_there_if_a_method_gives_it():
    paths = [f"{__name__}.Layer.{name}" for name in ("build", "_given", "_lost", "_counted")]
    assert seams.missing([seams.Hook(path, "") for path in paths]) == paths[2:]
    asked = seams.Hook(paths[1], "", asked_by=f"{__name__}.Layer.sum")
    assert seams.missing([asked]) == []
    assert seams.missing([dataclasses.replace(asked, asked_by=paths[0])]) == []
    assert seams.missing([seams.Hook(f"{__name__}.Layer.build._counted", "")]) == []
    assert seams.missing([seams.Hook(f"{__name__}.Layer.build._lost", "")]) == [f"{__name__}.Layer.build._lost"]


def installed_as(monkeypatch, *needs):
    """distfit as if it had been installed with these needs; not at all without any."""
    found = [types.SimpleNamespace(requires=list(needs))] if needs else []
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: found)


def refused(monkeypatch):
    monkeypatch.setattr(seams, "missing", lambda: [f"keras.Model._part_{number}" for number in range(6)])
    with pytest.raises(InputError, match=r"Expected the private parts.*received") as caught:
        seams.check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_keras_outside_the_range_is_refused_with_what_to_type(monkeypatch):
    installed_as(monkeypatch, "keras>=3.99,<4", "tensorflow>=2.21", 'tensorflow[and-cuda]<2; extra == "cuda"', "numpy")
    said = refused(monkeypatch)
    assert "(made for: keras<4,>=3.99, tensorflow>=2.21)" in said
    assert f"received tensorflow {tf.__version__} and keras {keras.__version__} without keras.Model._part_0, " in said
    assert "_part_3 and 2 more." in said
    assert said.endswith(f"Type: {sys.executable} -m pip install 'keras<4,>=3.99' 'tensorflow>=2.21'")


def test_a_damaged_keras_of_the_right_version_is_installed_again(monkeypatch):
    installed_as(monkeypatch, "keras>=3", "tensorflow>=2")
    again = f"--force-reinstall --no-deps tensorflow=={tf.__version__} keras=={keras.__version__}"
    assert refused(monkeypatch).endswith(again)


def test_a_source_folder_says_how_to_get_its_versions(monkeypatch):
    installed_as(monkeypatch)
    assert refused(monkeypatch).endswith(f"in that folder, type: {sys.executable} -m pip install -e .")


FRESH = """
import sys
import keras, tensorflow as tf
from distfit.backends import seams
seams.check()
# Refused once TensorFlow has started.
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()])
del keras.src.trainers.trainer.Trainer._compute_loss, keras.src.trainers.epoch_iterator
sys.modules["keras.src.trainers.epoch_iterator"] = None
import distfit
for name in ("fit", "init"):
    try:
        getattr(distfit, name)()
    except distfit.InputError as error:
        print(f"distfit.{name}: {error}")
from distfit import cli
sys.argv = ["distfit", "train", "configs/digits.yaml", f"run_dir={sys.argv[1]}"]
cli.main()
"""


@pytest.mark.slow
def test_a_fresh_process_says_what_is_missing_before_anything_is_made(tmp_path):
    job = launch(["-c", FRESH, str(tmp_path / "run")], cwd=ROOT)
    assert job.code == 2, job.report()
    by_fit, by_init = job.output.splitlines()
    (by_train,) = re.findall("^distfit: error: .*$", job.errors, re.MULTILINE)
    for said, by in ((by_fit, "distfit.fit"), (by_init, "distfit.init"), (by_train, "distfit: error")):
        assert said.startswith(f"{by}: Expected the private parts of TensorFlow and Keras"), job.report()
        assert "keras.Model._compute_loss" in said
        assert "keras.src.trainers.epoch_iterator.EpochIterator" in said
    assert "Traceback" not in job.errors, job.report()
    assert not list(tmp_path.iterdir())


def test_the_oldest_versions_are_the_lower_bounds():
    project = tomllib.loads(oldest.PROJECT.read_text())["project"]
    constraints = {need.name: str(need.specifier) for need in map(Requirement, oldest.constraints(project))}
    for need in map(Requirement, project["dependencies"]):
        lower = [bound.version for bound in need.specifier if bound.operator == ">="]
        assert constraints.get(need.name) == (f"=={lower[0]}" if lower else None)
    assert {"tensorflow", "keras", "numpy"} <= constraints.keys()


def test_a_package_that_is_named_twice_has_one_range():
    project = tomllib.loads(oldest.PROJECT.read_text())["project"]
    extras = [need for needs in project["optional-dependencies"].values() for need in needs]
    ranges: dict[str, set[str]] = {}
    for need in map(Requirement, [*project["dependencies"], *extras]):
        ranges.setdefault(need.name, set()).add(str(need.specifier))
    assert {name: found for name, found in ranges.items() if len(found) > 1} == {}


def test_building_from_specs_makes_losses_metrics_and_optimizer(model):
    assert [entry._fields for entry in model._compile_loss._flat_losses] == [
        ("path", "loss", "loss_weights", "name")
    ] * 2
    assert len(model._compile_loss.metrics) == 2
    assert model.optimizer.built


def test_a_given_list_takes_the_place_of_the_models_losses(model):
    model._losses_override = [tf.constant(3.0)]
    assert [float(loss) for loss in model.losses] == [3.0]


def test_a_variable_takes_another_value_object(model):
    kernel = model.layers[1].kernel
    kernel._value = tf.Variable(tf.ones((3, 2)))
    assert (model.layers[1].kernel.numpy() == 1).all()
    np.testing.assert_allclose(model(np.ones((1, 3)))[0], [[3.0, 3.0]])


def test_an_optimizer_asks_its_own_hooks_for_gradients_and_keys(model):
    optimizer, variables = model.optimizer, model.trainable_variables
    asked = []

    def own_key(variable, key=optimizer._var_key):
        asked.append("key")
        return key(variable)

    def own_sum(pairs):
        asked.append("sum")
        return pairs

    with replaced(optimizer, "_var_key", own_key), replaced(optimizer, "_all_reduce_sum_gradients", own_sum):
        optimizer.apply([tf.ones(variable.shape) for variable in variables], variables)
    assert {"key", "sum"} == set(asked)
    assert vars(optimizer).keys().isdisjoint({"_var_key", "_all_reduce_sum_gradients"})


def test_an_optimizer_keeps_a_running_sum_of_gradients_for_each_variable():
    first, second = keras.Variable([1.0]), keras.Variable([2.0])
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    optimizer.apply([tf.constant([3.0]), tf.constant([5.0])], [first, second])
    held = [optimizer._accumulated_gradients[optimizer._get_variable_index(variable)] for variable in (first, second)]
    assert [float(one.numpy()[0]) for one in held] == [3.0, 5.0]
    assert int(optimizer._iterations) == 1
    assert float(first.numpy()[0]) == 1.0


def test_a_layer_draws_from_its_streams_own_hook():
    dropout = keras.layers.Dropout(0.5, seed=3)
    draw, drawn = dropout.seed_generator.next, []

    def own(ordered=True):
        drawn.append(ordered)
        return draw(ordered)

    with replaced(dropout.seed_generator, "next", own):
        dropout(np.ones((2, 2)), training=True)
    assert drawn == [True]


def test_an_optimizer_without_merge_calls_updates_inside_a_replica():
    """`_use_merge_call` on the strategy's `extended` is what Keras' optimizer asks, through TensorFlow."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    asked = []
    strategy.extended._use_merge_call = lambda: asked.append(True)
    with strategy.scope():
        assert tf.__internal__.distribute.interim.maybe_merge_call(lambda strategy: "direct", strategy) == "direct"
    assert asked, f"maybe_merge_call no longer asks _use_merge_call in {VERSIONS}"


def test_keras_divides_a_loss_by_the_replicas_in_scope():
    """Why `num_replicas_in_sync` answers 1 inside a replica."""

    class Three(tf.distribute.MirroredStrategy):
        num_replicas_in_sync = 3

    with Three(["CPU:0"]).scope():
        loss = keras.losses.MeanSquaredError()(np.full((2, 1), 3.0), np.zeros((2, 1)))
    assert float(loss) == pytest.approx(3.0)


def _mean(loss, y_true, y_pred, sample_weight=None):
    return float(terms.normaliser(loss, y_true, y_pred, sample_weight))


Y, PREDICTED = np.zeros((4, 5), "float32"), np.ones((4, 5, 2), "float32")


def test_the_normaliser_of_a_mean_is_its_elements():
    assert _mean(keras.losses.MeanSquaredError(), PREDICTED * 0, PREDICTED) == 20


def test_the_normaliser_of_a_masked_mean_is_what_is_valid():
    predicted = tf.constant(PREDICTED)
    predicted._keras_mask = tf.constant([[True] * 2 + [False] * 3] * 4)
    assert _mean(keras.losses.MeanSquaredError(), PREDICTED * 0, predicted) == 8


def test_the_normaliser_of_ignored_classes_is_what_is_left():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    labels = np.array([[0, 1, 1, 0, 0]] * 4)
    assert _mean(loss, labels, PREDICTED) == 8


def test_the_normaliser_by_weight_is_the_sum_of_weights():
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    weight = np.array([0.5, 1.0, 0.0, 2.0], "float32")
    assert _mean(loss, np.zeros((4, 2)), np.ones((4, 2), "float32"), weight) == 3.5
    assert _mean(loss, np.zeros((4, 2)), np.ones((4, 2), "float32")) == 4


@pytest.mark.parametrize("reduction", ["sum", "none", None])
def test_a_sum_has_no_normaliser(reduction):
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    assert terms.normaliser(loss, PREDICTED * 0, PREDICTED, None) is terms.NO_NORMALISER


def test_a_loss_that_reduces_by_itself_counts_as_a_mean_over_rows():
    class Own(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return keras.ops.mean(y_pred)

    assert _mean(Own(), PREDICTED, PREDICTED) == 4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean", "mean_with_sample_weight"])
def test_parts_weighed_by_their_normalisers_are_the_whole(reduction, weighted, masked):
    """The property that the step stands on, for what Keras itself computes: sum(part * n / N) = whole."""
    rng = np.random.default_rng(0)
    y_true, y_pred = rng.random((7, 5, 2)), rng.random((7, 5, 2))
    mask, weight = rng.random((7, 5)) < 0.6, rng.random((7, 5)) if weighted else None
    loss = keras.losses.MeanSquaredError(reduction=reduction, dtype="float64")

    def of(rows):
        predicted = tf.constant(y_pred[rows])
        if masked:
            predicted._keras_mask = tf.constant(mask[rows])
        weights = None if weight is None else weight[rows]
        return (
            float(loss(y_true[rows], predicted, weights)),
            float(terms.normaliser(loss, y_true[rows], predicted, weights)),
        )

    whole, total = of(slice(None))
    parts = [of(slice(0, 3)), of(slice(3, 4)), of(slice(4, 7))]
    assert sum(own for _, own in parts) == pytest.approx(total, rel=1e-12)
    assert sum(value * own / total for value, own in parts) == pytest.approx(whole, rel=1e-12)


def test_measuring_keeps_nothing_and_undoes_itself(model):
    x, y = np.ones((4, 3), "float32"), [np.zeros((4, 2), "float32"), np.zeros((4, 1), "float32")]
    own = model._compile_loss._flat_losses
    with terms.installed(model):
        measured = terms.measure(model, y, model(x), None)
    assert model._compile_loss._flat_losses is own
    assert float(measured[0]) == 4
    assert measured[1] is terms.NO_NORMALISER
    assert all((variable.numpy() == 0).all() for variable in model._compile_loss.variables)


def test_moving_statistics_are_noted_and_a_frozen_layers_weights_are_not():
    norm, frozen = keras.layers.BatchNormalization(), keras.layers.Dense(3, trainable=False)
    model = keras.Sequential([keras.Input((3,)), norm, frozen])
    with moving.installed(model):
        with moving.noted() as moved:
            model(np.ones((2, 3)), training=True)
        with moving.noted() as unmoved:
            model(np.ones((2, 3)), training=False)
    assert {id(weight) for weight in moved} == {id(norm.moving_mean), id(norm.moving_variance)}
    assert unmoved == []
    assert "assign" not in vars(norm.moving_mean)


def test_helpers_of_keras_losses_have_their_signatures():
    assert apply_mask(None, None, dtype="float32", reduction="sum") is None
    first, second = squeeze_or_expand_to_same_rank(tf.ones((2, 3)), tf.ones((2,)))
    assert (first.shape.rank, second.shape.rank) == (2, 1)
