"""Every number is global: what becomes of a metric's states, how that is found, and what is refused.

The table of metrics and engines is tests/cases/metrics.py; here are the rules, and 200 rows over three real ranks.
"""

from __future__ import annotations

import inspect
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import metrics, ops

import distfit
from distfit.errors import InputError
from distfit.thread_ranks import run
from distfit.topology import Topology
from distfit.training import metric_rules
from distfit.training.metric_experiment import Given, found_rule
from distfit.training.metric_rules import Rule, names_of, reduced
from distfit.training.metric_updates import Here
from distfit.training.metrics import GlobalStates
from tests import metrics_script
from tests.cases.metrics import Averaged, Correlation, Counted, Largest, Lowest, Worst, merged, spread
from tests.ranks import launch

# Of those that cannot be made without.
ARGUMENTS = {
    "IoU": {"num_classes": 3, "target_class_ids": [0, 1], "sparse_y_pred": False},
    "MeanIoU": {"num_classes": 3, "sparse_y_pred": False},
    "OneHotIoU": {"num_classes": 3, "target_class_ids": [0, 1]},
    "OneHotMeanIoU": {"num_classes": 3},
    "PrecisionAtRecall": {"recall": 0.5, "num_thresholds": 5},
    "RecallAtPrecision": {"precision": 0.5, "num_thresholds": 5},
    "SensitivityAtSpecificity": {"specificity": 0.5, "num_thresholds": 5},
    "SpecificityAtSensitivity": {"sensitivity": 0.5, "num_thresholds": 5},
    "AUC": {"num_thresholds": 5},
    "TopKCategoricalAccuracy": {"k": 2},
    "SparseTopKCategoricalAccuracy": {"k": 2},
}
BINARY = ("AUC", "BinaryIoU", "FalseNegatives", "FalsePositives", "TrueNegatives", "TruePositives")
OF_KERAS = {
    name: kind
    for name, kind in vars(metrics).items()
    if inspect.isclass(kind) and issubclass(kind, metrics.Metric) and kind is not metrics.Metric
}


def given(*kinds, weights=False):
    """What a step gives: a tensor of each shape behind the rows and type, and a place for weights."""
    tensors = [tf.zeros((2, *shape), dtype) for *shape, dtype in kinds]
    args = (*tensors, *([None] if weights else []))
    return Given((args, {}), [True] * len(tensors) + [False] * weights, len(tensors) if weights else None)


def made(name):
    """A metric of Keras with its variables, and what it is tried out with."""
    if name == "MeanMetricWrapper":
        metric = metrics.MeanMetricWrapper(lambda y, y_pred: ops.mean(ops.abs(y - y_pred), axis=-1))
    else:
        metric = OF_KERAS[name](**ARGUMENTS.get(name, {}))
    if name in ("Mean", "Sum"):
        return metric, given(("float32",), weights=True)
    tried = given(*_kinds(name), weights=True)
    metric.update_state(
        *(tf.ones(leaf.shape, leaf.dtype) for leaf in tf.nest.flatten(tried.structure) if leaf is not None)
    )
    metric.reset_state()
    return metric, tried


def _kinds(name):
    """Shapes behind the rows, and types, of targets and predictions."""
    if name == "Accuracy":  # numbers that are equal
        return (3, "int32"), (3, "int32")
    if "Sparse" in name or name in ("IoU", "MeanIoU"):
        return ("int32",), (3, "float32")
    classes = 1 if name in BINARY or "At" in name or "Binary" in name else 3
    return (classes, "float32"), (classes, "float32")


@pytest.mark.parametrize("name", OF_KERAS)
def test_metrics_of_keras_are_sums_that_begin_at_zero_weighted_or_not(name):
    metric, tried = made(name)
    # Keras tells by a batch whether its labels are 0 and 1 or -1 and 1: of labels of both kinds, which trials have and
    # users do not, a part may be taken for the other.
    expected = None if name in ("Hinge", "SquaredHinge") else Rule(("sum",) * len(metric.variables))
    assert found_rule(metric, metric.update_state, tried) == expected
    assert all(not np.any(value) for value in metric_rules.after_reset(metric))


class Batches(metrics.Metric):
    """How many there were: of two replicas, of which each missed another one, neither knows."""

    def __init__(self):
        super().__init__()
        self.batches = self.add_variable((), "zeros", dtype="int32", name="batches")

    def update_state(self, y, y_pred):
        self.batches.assign_add(1)


class Unmoved(Batches):
    def update_state(self, y, y_pred):
        self.batches.assign_add(0)


class Fussy(Batches):
    def update_state(self, y, y_pred):
        raise ValueError("not such rows")


def valid(y, y_pred):
    """A mean over rows of all rows that it is tried with, and not of those with a label that is masked."""
    mask = ops.cast(y != -1.0, y_pred.dtype)
    return ops.sum(mask * ops.abs(y - y_pred)) / ops.sum(mask)


def of_function(function):
    return metrics.MeanMetricWrapper(function, name="function")


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (Counted(), "sum sum"),
        (Largest(), "max min sum"),
        (Averaged(), None),
        (of_function(lambda y, y_pred: ops.mean(ops.abs(y - y_pred))), None),
        (of_function(valid), None),
        (of_function(spread), None),
        (of_function(lambda y, y_pred: ops.max(y_pred)), None),
        (metrics.PearsonCorrelation(axis=0), None),
        (Worst(), None),
        (Correlation(), None),
        (Batches(), None),
        (Unmoved(), None),
        (Fussy(), None),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_rule_is_found_only_where_it_is_right_every_time(metric, expected):
    rule = found_rule(metric, metric.update_state, given((2, "float32"), (2, "float32")))
    assert (None if rule is None else str(rule)) == expected
    assert [float(np.sum(v.numpy())) for v in metric.variables] == [
        float(np.sum(value)) for value in metric_rules.after_reset(metric)
    ]


def test_large_rows_are_tried_out_with_few_of_them():
    small = given((8, "float32"), (8, "float32"))
    large = given((512, 512, 21, "float32"), (512, 512, 21, "float32"))
    assert len(small.sizes()) > len(large.sizes()) == 1
    for kind in (small, large):
        drawn = max(sum(step) for sizes in kind.sizes() for step in sizes)
        assert drawn * np.prod(kind.structure[0][0].shape[1:]) <= max(2**20, 3 * 512 * 512 * 21)


def test_means_over_rows_are_of_floats():
    with pytest.raises(InputError, match="whole numbers in batches"):
        metric_rules.declared(reduced(Batches(), "rows"))


class Replicas:
    """Three replicas of one process, which hold given values."""

    topology = Topology(0, 1, 0, 1).with_replicas(3)

    def __init__(self, held):
        self.transport, self.exchanges = self, 0
        self._held = {id(variable): np.array(values) for variable, values in held}

    def replica_values(self, variable):
        return list(self._held[id(variable)])

    def sum(self, vector):
        self.exchanges += 1
        return vector


def model_with(*own):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.own = list(own)
    return model


def test_states_are_put_together_by_their_rules_in_one_exchange():
    counted, largest, same = (
        Counted(name="counted"),
        reduced(Largest(), {"most": "max", "least": "min", "n": "sum"}),
        Lowest(name="same"),
    )
    product = reduced(metrics.Sum(name="product"), {"total": lambda values: values.prod(axis=0)})
    model = model_with(counted, largest, same, product)
    for metric in model.metrics:
        metric_rules.begin(metric)
    metric_rules.note_found(same, Rule(("same",)))
    held = [
        (counted.total, [4.0, 3.0, 8.0]),
        (counted.rows, [12, 10, 11]),
        (largest.most, [-5.0, -np.inf, -7.0]),
        (largest.least, [-5.0, np.inf, -8.0]),
        (largest.rows, [2.0, 0.0, 1.0]),
        (same.lowest, [6.0, 6.0, 6.0]),
        (product.total, [2.0, 3.0, 5.0]),
    ]
    backend = Replicas(held)
    states = GlobalStates(model, backend)
    results = {name: float(value) for name, value in states.results().items()}
    assert results == pytest.approx(
        {"error": 9 / 13, "rows": 13, "most": -5, "least": -8, "n": 3, "same": 6, "product": 30}
    )
    states.leave()
    assert backend.exchanges == 1
    assert [float(variable.numpy()) for variable, _ in held] == [9, 13, -5, -8, 3, 6, 30]


def test_a_function_of_all_states_gives_the_one_state():
    rng = np.random.default_rng(0)
    metric, parts = (
        reduced(Correlation(name="correlation"), by=merged),
        [rng.normal(size=(n, 2)).astype("float32") for n in (5, 3)],
    )
    states = [after(metric, part) for part in parts] + [[np.zeros(())] * 6]
    backend = Replicas(list(zip(metric.variables, zip(*states, strict=True), strict=True)))
    found = float(GlobalStates(model_with(metric), backend).results()["correlation"])
    rows = np.concatenate(parts)
    assert found == pytest.approx(np.corrcoef(rows.T)[0, 1], abs=1e-6)


def after(metric, rows):
    metric.reset_state()
    metric.update_state(rows[:, :1], rows[:, 1:])
    values = [variable.numpy() for variable in metric.variables]
    metric.reset_state()
    return values


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("mean", "one of sum, max, min or by a function, received 'mean'"),
        ({"total": "summ"}, "did you mean 'sum'"),
        (3, "or a dict of these by variable name, received int"),
    ],
)
def test_a_declaration_that_is_no_rule_is_refused(by, expected):
    with pytest.raises(InputError, match=expected):
        reduced(metrics.Sum(), by)


def test_only_metrics_are_declared_and_only_their_own_variables():
    with pytest.raises(InputError, match="received function"):
        reduced(spread, "sum")
    with pytest.raises(InputError, match=r"metric 'm' \(Mean\) how it is reduced, total, count, received sum"):
        metric_rules.declared(reduced(metrics.Mean("m"), {"sum": "sum"}))


@pytest.mark.parametrize("answer", [{"total": 1.0}, {"total": 1.0, "count": [1.0, 2.0]}, 3.0])
def test_what_a_function_answers_must_be_a_state(answer):
    metric = reduced(metrics.Mean("m"), by=lambda states: answer)
    backend = Replicas([(variable, [1.0] * 3) for variable in metric.variables])
    with pytest.raises(InputError, match="metric 'm'"):
        GlobalStates(model_with(metric), backend)


def test_variables_of_one_name_are_told_apart():
    class Two(metrics.Metric):
        def __init__(self):
            super().__init__()
            self.one, self.other = metrics.Sum("one"), metrics.Sum("other")

    assert names_of(Two()) == ["one/total", "other/total"]


class Echo:
    """A wire to one more replica, which sends what this one does; counts."""

    def __init__(self):
        self.sent = 0

    def gather(self, tensors, name):
        self.sent += 1
        return [tf.concat([tensor, tensor], axis=0) for tensor in tensors]


@pytest.mark.parametrize("tensor", [tf.constant([True, False]), tf.constant([[1, 2], [3, 4]]), tf.constant([0.5, 1.5])])
def test_rows_are_gathered_once_for_all_metrics_with_their_masks(tensor):
    wire, mask = Echo(), tf.constant([True, False])
    keras.src.backend.set_keras_mask(tensor, mask)
    replica = Here(wire, rows=2, data=[tensor])
    every, again = replica.gathered(tensor), replica.gathered(tensor)
    assert every is again
    assert wire.sent == 2
    assert every.numpy().tolist() == [*tensor.numpy().tolist()] * 2
    assert keras.src.backend.get_keras_mask(every).numpy().tolist() == [True, False] * 2


def test_rows_that_stand_in_for_none_are_left_out():
    assert Here(Echo(), rows=0, data=()).gathered(tf.ones((1, 3))).shape == (0, 3)


def test_the_start_of_a_run_names_metrics_that_are_not_of_keras():
    model = model_with(metrics.AUC(), Largest(name="largest"), reduced(Worst(), "max"))
    (note,) = metric_rules.notes(model)
    assert "(largest)" in note
    assert metric_rules.notes(model_with(metrics.AUC())) == []


X = np.random.default_rng(1).normal(size=(20, 3)).astype("float32")
Y = X.sum(axis=1, keepdims=True)


def loop():
    """A hand-written loop that gives metrics rows, numbers and a constant; its history."""
    keras.utils.set_random_seed(1)
    session = distfit.init()
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    largest, deviation = Largest(), metrics.MeanMetricWrapper(spread, name="spread")
    lowest, mean, steps = Lowest(name="lowest"), metrics.Mean("mean"), metrics.Sum("steps")

    @session.step
    def train(x, y):
        with tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            loss = ops.mean(ops.square(y - y_pred))
            scaled = session.scale_loss(loss)
        weights = model.trainable_variables
        session.apply(optimizer, tape.gradient(scaled, weights), weights)
        largest.update_state(y, y_pred)
        deviation.update_state(y, y_pred)
        lowest.update_state(loss)
        mean.update_state(loss)
        steps.update_state(1.0)

    optimizer = keras.optimizers.SGD(0.05)
    data = session.batches(X[:18], Y[:18], batch_size=8, shuffle=False)
    chosen = [largest, deviation, lowest, mean, steps]
    with session.training(model, optimizer, data, metrics=chosen, epochs=2, verbose=0) as training:
        for _ in training:
            for batch in data:
                train(batch)
    return training.history.history


def test_metrics_of_a_hand_written_loop_are_those_of_one_process():
    expected, found = loop(), run(loop, ranks=3)
    assert expected["steps"] == [3, 3]
    assert found[1] == found[0] == found[2]
    for name, values in expected.items():
        assert found[0][name] == pytest.approx(values, rel=1e-6), name


class Vectors(metrics.Metric):
    """Is given what is neither rows nor a number."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.total = self.add_variable((3,), "zeros", name="total")

    def update_state(self, vector):
        self.total.assign_add(vector)

    def result(self):
        return ops.sum(self.total)


class Hidden(metrics.Metric):
    """Keeps its state where nobody finds it."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.hidden = tf.Variable(0.0)

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.hidden.assign_add(ops.sum(y_pred))

    def result(self):
        return self.hidden + 0.0


class Giving(keras.Model):
    """Gives its metric a sum over the batch."""

    def train_step(self, data):
        self.own.update_state(ops.sum(data[0], axis=0))
        return super().train_step(data)


def refused(compiled, own=None):
    """What a training is refused with; "" if it is not."""
    inputs = keras.Input((3,))
    model = (keras.Model if own is None else Giving)(inputs, keras.layers.Dense(1)(inputs))
    if own is not None:
        model.own = own
    model.compile("sgd", "mse", metrics=compiled)
    try:
        distfit.fit(model, X, Y, batch_size=8, verbose=0)
    except InputError as error:
        return str(error)
    return ""


def test_what_cannot_be_known_is_refused_by_name_on_all_ranks():
    def attempts():
        return [
            refused([], own=Vectors(name="vectors")),
            refused([Hidden(name="hidden")]),
            refused([reduced(Largest(name="largest"), {"most": "max"})]),
            refused([], own=reduced(Vectors(name="vectors"), "sum")),
        ]

    of_ranks = run(attempts, ranks=2)
    assert of_ranks[0] == of_ranks[1]
    vectors, hidden, largest, declared = of_ranks[0]
    assert "metric 'vectors' (Vectors) to be given rows" in vectors
    assert "shape (3,)" in vectors
    assert "distfit.reduced(metric, by=...)" in vectors
    assert "metric 'hidden' (Hidden) to keep its state in variables" in hidden
    assert "tf.Variables in hidden" in hidden
    assert "metric 'largest' (Largest) how it is reduced, most, least, n, received most" in largest
    assert declared == ""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of three ranks said."""
    folder = tmp_path_factory.mktemp("metrics")
    job = launch(["-m", "tests.metrics_script", str(folder)], ranks=3, limit_s=300)
    assert job.code == 0, job.report()
    return json.loads((folder / "ranks.json").read_text())


@pytest.mark.mpi
@pytest.mark.slow
def test_200_rows_over_three_ranks_are_those_of_one_process_and_an_average_of_averages_is_not(ranks):
    expected = metrics_script.evaluated(lambda model, *data, **options: model.evaluate(*data, **options))
    for name in ("auc", "f1"):
        average = np.mean([rank["alone"][name] for rank in ranks])
        assert abs(average - expected[name][0]) > 1e-3, f"averages of {name} would pass"
    for rank in ranks:
        assert_same(rank["evaluated"], expected)


@pytest.mark.mpi
@pytest.mark.slow
def test_a_training_on_three_ranks_shows_the_numbers_of_one_process_with_the_same_bits_everywhere(ranks):
    expected = metrics_script.trained(lambda model, *data, **options: model.fit(*data, **options))
    assert ranks[1]["trained"] == ranks[0]["trained"] == ranks[2]["trained"]
    assert_same(ranks[0]["trained"], expected)


@pytest.mark.mpi
@pytest.mark.slow
def test_uneven_parts_of_which_one_is_empty_count_each_row_once(ranks):
    expected = metrics_script.evaluated(lambda model, *data, **options: model.evaluate(*data, **options))
    by_batch = "spread"  # another number for other batches
    for rank in ranks:
        found = rank["uneven"]
        assert_same({name: value for name, value in found.items() if name != by_batch}, expected)
        assert found["n"] == [metrics_script.ROWS]
        assert_same(rank["left"], found)


@pytest.mark.mpi
@pytest.mark.slow
def test_one_exchange_brings_all_results(ranks):
    assert [rank["exchanges"] for rank in ranks] == [["sum"]] * 3


def assert_same(found, expected):
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name


def running_mean(masked):
    class Running(metrics.Metric):
        """Adds means over valid rows times the number of all, which is no sum where rows are masked."""

        def __init__(self):
            super().__init__()
            self.total = self.add_variable((), "zeros", name="total")
            self.rows = self.add_variable((), "zeros", name="rows")

        def update_state(self, y, y_pred):
            valid = ops.cast(y != masked if masked == masked else ~ops.isnan(y), "float32")
            errors = ops.abs(ops.nan_to_num(ops.cast(y, "float32")) - y_pred)
            rows = ops.cast(ops.shape(y)[0], "float32")
            self.total.assign_add(ops.sum(valid * errors) / ops.sum(valid) * rows)
            self.rows.assign_add(rows)

    return Running()


@pytest.mark.parametrize(("masked", "dtype"), [(-1, "int32"), (255, "uint8"), (-100, "int64"), (np.nan, "float32")])
def test_a_mean_that_leaves_masked_values_out_is_no_sum(masked, dtype):
    metric = running_mean(masked)
    assert found_rule(metric, metric.update_state, given((3, dtype), (3, "float32"))) is None
