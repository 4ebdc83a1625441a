"""The private hooks of Keras and TensorFlow that distfit stands on: which version broke which one.

docs/versions.md says where each is used and why.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.losses.loss import apply_mask, squeeze_or_expand_to_same_rank
from keras.src.trainers.epoch_iterator import EpochIterator

from distfit.training import moving, terms

VERSIONS = f"TensorFlow {tf.__version__}, Keras {keras.__version__}"


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


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (keras.Model, "_symbolic_build"),
        (keras.Model, "_compute_loss"),
        (keras.Model, "_get_metrics_result_or_logs"),
        (keras.Model, "_flatten_metrics_in_order"),
        (keras.Model, "_should_eval"),
        (keras.Model, "_flatten_layers"),
        (keras.Model, "_get_own_losses"),
        (keras.Model, "_get_regularization_losses"),
        (keras.optimizers.Optimizer, "_all_reduce_sum_gradients"),
        (keras.optimizers.Optimizer, "_var_key"),
        (EpochIterator, "_get_iterator"),
        (EpochIterator, "catch_stop_iteration"),
        (tf.distribute.MirroredStrategy, "num_replicas_in_sync"),
    ],
)
def test_a_method_is_still_there(owner, name):
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone in {VERSIONS}"


def test_building_from_specs_makes_losses_metrics_and_optimizer(model):
    assert [entry._fields for entry in model._compile_loss._flat_losses] == [
        ("path", "loss", "loss_weights", "name")
    ] * 2
    assert len(model._compile_loss.metrics) == 2
    assert model.optimizer.built
    assert len(model.optimizer._trainable_variables_indices) == 4


def test_a_given_list_takes_the_place_of_the_models_losses(model):
    model._losses_override = [tf.constant(3.0)]
    assert [float(loss) for loss in model.losses] == [3.0]


def test_a_variable_takes_another_value_object(model):
    kernel = model.layers[1].kernel
    kernel._value = tf.Variable(tf.ones((3, 2)))
    assert (model.layers[1].kernel.numpy() == 1).all()
    np.testing.assert_allclose(model(np.ones((1, 3)))[0], [[3.0, 3.0]])


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
