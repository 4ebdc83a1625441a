"""Every metric of Keras, and what users write themselves: each number is that of one process, whatever its state is.

The last batch of a training has 3 rows, that of a validation 1, so that a replica or two have none.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import metrics, ops

import distfit
from tests.cases.models import CLASSES, LABEL, RNG, TARGET, WEIGHT, X, seeded_input, sgd
from tests.cases.table import Result, case

BINARY = (RNG.random((len(X), 1)) < X[:, :1]).astype("float64")
ONE_HOT = np.eye(CLASSES)[LABEL]
# Trained on, and validated on in between, with the same metric objects.
EPOCHS = 2


def model_of(activation: Any, outputs: int = 1, loss: str = "mse", **compiled: Any) -> keras.Model:
    x = seeded_input()
    model = keras.Model(x, keras.layers.Dense(outputs, activation)(x))
    model.compile(sgd(), loss, **compiled)
    return model


def validated(engine: Any, model: keras.Model, y: np.ndarray, weighted: bool = False) -> Result:
    """The history of a training with a validation after each epoch."""
    weight = {"sample_weight": np.maximum(WEIGHT - 0.2, 0.0)} if weighted else {}
    validation = (X[:65], y[:65], WEIGHT[:65]) if weighted else (X[:65], y[:65])
    return engine.fit(model, X, y, **weight, validation_data=validation, epochs=EPOCHS)


def binary() -> list[Any]:
    return [
        metrics.AUC(),
        metrics.AUC(curve="PR", num_thresholds=50, name="auc_pr"),
        metrics.Precision(),
        metrics.Recall(thresholds=[0.4, 0.6]),
        metrics.F1Score(threshold=0.5),
        metrics.FBetaScore(beta=2.0, threshold=0.4),
        metrics.TruePositives(),
        metrics.TrueNegatives(),
        metrics.FalsePositives(),
        metrics.FalseNegatives(),
        metrics.PrecisionAtRecall(0.5),
        metrics.RecallAtPrecision(0.5),
        metrics.SensitivityAtSpecificity(0.5),
        metrics.SpecificityAtSensitivity(0.5),
        metrics.BinaryAccuracy(),
        metrics.BinaryCrossentropy(),
        metrics.BinaryIoU(target_class_ids=[0, 1]),
        metrics.Hinge(),
        metrics.SquaredHinge(),
    ]


def of_classes() -> list[Any]:
    return [
        metrics.CategoricalAccuracy(),
        metrics.CategoricalCrossentropy(),
        metrics.CategoricalHinge(),
        metrics.KLDivergence(),
        metrics.Poisson(),
        metrics.F1Score(average="macro"),
        metrics.AUC(multi_label=True, num_labels=CLASSES, num_thresholds=20),
        metrics.OneHotIoU(num_classes=CLASSES, target_class_ids=[0, 2]),
        metrics.OneHotMeanIoU(num_classes=CLASSES),
    ]


def of_numbers() -> list[Any]:
    return [
        metrics.MeanSquaredError(),
        metrics.RootMeanSquaredError(),
        metrics.MeanAbsoluteError(),
        metrics.MeanAbsolutePercentageError(),
        metrics.MeanSquaredLogarithmicError(),
        metrics.LogCoshError(),
        metrics.R2Score(class_aggregation="variance_weighted_average"),
        metrics.CosineSimilarity(),
    ]


@case()
def metrics_of_two_classes(engine) -> Result:
    """AUC, F1, precision at recall, counts, hinge, IoU; weighted, some by zero, and not; validation in between"""
    model = model_of("sigmoid", loss="binary_crossentropy", metrics=binary()[::3], weighted_metrics=binary())
    return validated(engine, model, BINARY, weighted=True)


@case()
def metrics_of_several_classes(engine) -> Result:
    """Accuracies, cross-entropies, F1, IoU; weighted and not"""
    model = model_of(
        "softmax", CLASSES, "categorical_crossentropy", metrics=of_classes()[::3], weighted_metrics=of_classes()
    )
    return validated(engine, model, ONE_HOT, weighted=True)


@case()
def metrics_of_numbered_classes(engine) -> Result:
    """Sparse accuracy and cross-entropy, mean IoU of classes by number; evaluation"""
    chosen = [
        metrics.SparseCategoricalAccuracy(),
        metrics.SparseCategoricalCrossentropy(),
        metrics.MeanIoU(num_classes=CLASSES, sparse_y_pred=False),
        metrics.IoU(num_classes=CLASSES, target_class_ids=[1], sparse_y_pred=False),
    ]
    model = model_of("softmax", CLASSES, "sparse_categorical_crossentropy", metrics=chosen)
    result = engine.fit(model, X, LABEL, epochs=EPOCHS)
    found = engine.evaluate(model, X[:65], LABEL[:65], return_dict=True)
    return result | {f"history/evaluated {name}": np.array([value]) for name, value in found.items()}


@case()
def metrics_of_each_output(engine) -> Result:
    """R2 and errors of two outputs, weighted metrics of one of them, the parts of the loss"""
    x = seeded_input()
    heads = [keras.layers.Dense(2, "softplus", name=name)(x) for name in ("a", "b")]
    model = keras.Model(x, heads)
    model.compile(
        sgd(), ["mse", "mae"], loss_weights=[1.0, 0.5], metrics=[of_numbers(), ["mae"]], weighted_metrics=[[], ["mse"]]
    )
    return engine.fit(model, X, [TARGET, TARGET[::-1]], sample_weight=WEIGHT, epochs=EPOCHS)


@case()
def metrics_of_correlation(engine) -> Result:
    """Pearson's and Lin's correlation of the numbers of a row; weighted and not"""
    x = seeded_input()
    # Numbers that are far apart and go together: differences and a mean that keep their digits in float32.
    model = keras.Model(x, keras.layers.Dense(6, bias_initializer=lambda shape, dtype: ops.arange(6, dtype=dtype))(x))
    chosen = [metrics.PearsonCorrelation(), metrics.ConcordanceCorrelation()]
    model.compile(sgd(learning_rate=0.01), "mse", metrics=chosen, weighted_metrics=chosen[:1])
    return validated(engine, model, np.arange(6) + np.random.default_rng(1).normal(size=(len(X), 6)), weighted=True)


class Counted(metrics.Metric):
    """Adds up, beginning at a number that is not zero."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # As `reset_state` leaves them: Keras does not reset the metrics of `compile` before the first epoch.
        self.total = self.add_variable((), keras.initializers.Constant(3.0), name="total")
        self.rows = self.add_variable((), keras.initializers.Constant(10), dtype="int64", name="rows")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.total.assign_add(ops.sum(ops.abs(y_true - y_pred)))
        self.rows.assign_add(ops.cast(ops.shape(y_true)[0], "int64"))

    def result(self) -> Any:
        return {"error": self.total / ops.cast(self.rows, self.dtype), "rows": ops.cast(self.rows, self.dtype)}

    def reset_state(self) -> None:
        self.total.assign(3.0)
        self.rows.assign(10)


class Largest(metrics.Metric):
    """Keeps a maximum, a minimum and a count."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.most = self.add_variable((), keras.initializers.Constant(-np.inf), name="most")
        self.least = self.add_variable((), keras.initializers.Constant(np.inf), name="least")
        self.rows = self.add_variable((), "zeros", name="n")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        error = y_true - y_pred
        self.most.assign(ops.maximum(self.most, ops.max(error)))
        self.least.assign(ops.minimum(self.least, ops.min(error)))
        self.rows.assign_add(ops.cast(ops.shape(y_true)[0], self.dtype))

    def result(self) -> Any:
        return {"most": self.most + 0.0, "least": self.least + 0.0, "n": self.rows + 0.0}

    def reset_state(self) -> None:
        self.most.assign(-np.inf)
        self.least.assign(np.inf)
        self.rows.assign(0.0)


class Averaged(metrics.Metric):
    """Adds one number a batch, as much of users' code does."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.total = self.add_variable((), "zeros", name="total")
        self.batches = self.add_variable((), "zeros", name="batches")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.total.assign_add(ops.mean(ops.square(y_true - y_pred)))
        self.batches.assign_add(1.0)

    def result(self) -> Any:
        return self.total / self.batches


class Worst(metrics.Metric):
    """The largest of the batches' mean errors: of no use is what a part of a batch gives."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.worst = self.add_variable((), "zeros", name="worst")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.worst.assign(ops.maximum(self.worst, ops.mean(ops.abs(y_true - y_pred))))

    def result(self) -> Any:
        return self.worst + 0.0


class Correlation(metrics.Metric):
    """Pearson's, of all rows: means and products of deviations, which are no sums (Chan, Golub and LeVeque 1979)."""

    NAMES = ("n", "x", "y", "xx", "yy", "xy")

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.states = [self.add_variable((), "zeros", name=name) for name in self.NAMES]

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        x, y = y_true[:, 0], y_pred[:, 0]
        mean_x, mean_y = ops.mean(x), ops.mean(y)
        batch = {
            "n": ops.cast(ops.shape(x)[0], self.dtype),
            "x": mean_x,
            "y": mean_y,
            "xx": ops.sum(ops.square(x - mean_x)),
            "yy": ops.sum(ops.square(y - mean_y)),
            "xy": ops.sum((x - mean_x) * (y - mean_y)),
        }
        before = {name: state + 0.0 for name, state in zip(self.NAMES, self.states, strict=True)}
        after = self.merged(before, batch)
        for name, state in zip(self.NAMES, self.states, strict=True):
            state.assign(after[name])

    def result(self) -> Any:
        _, _, _, xx, yy, xy = self.states
        return xy / ops.sqrt(xx * yy)

    @staticmethod
    def merged(one: dict, other: dict) -> dict:
        n = one["n"] + other["n"]
        by_x, by_y = other["x"] - one["x"], other["y"] - one["y"]
        both = one["n"] * other["n"] / n
        return {
            "n": n,
            "x": one["x"] + by_x * other["n"] / n,
            "y": one["y"] + by_y * other["n"] / n,
            "xx": one["xx"] + other["xx"] + by_x * by_x * both,
            "yy": one["yy"] + other["yy"] + by_y * by_y * both,
            "xy": one["xy"] + other["xy"] + by_x * by_y * both,
        }


def merged(states: list[dict]) -> dict:
    """Of all replicas that have seen rows."""
    first, *others = [state for state in states if state["n"] > 0]
    for other in others:
        first = Correlation.merged(first, other)
    return first


def spread(y_true: Any, y_pred: Any) -> Any:
    """No mean over rows, though one number a batch."""
    return ops.std(y_pred - y_true)


@case()
def metrics_of_users(engine) -> Result:
    """Sums from a number that is not zero, a maximum and a minimum, one number a batch that is a mean over rows"""
    model = model_of(
        None, metrics=[Counted(), Largest(), Averaged(), distfit.reduced(Averaged(name="rows"), by="rows")]
    )
    return validated(engine, model, TARGET[:, :1])


@case()
def declared_metrics(engine) -> Result:
    """`distfit.reduced`: Pearson's correlation of all rows by a formula, a maximum by name, functions by variable"""
    by_name = {"most": "max", "least": lambda values: values.min(axis=0), "n": "sum"}
    chosen = [distfit.reduced(Correlation(), by=merged), distfit.reduced(Largest(), by=by_name)]
    return validated(engine, model_of(None, metrics=chosen), TARGET[:, :1])


@case()
def gathered_metrics(engine) -> Result:
    """Without a rule, so that rows are gathered: a function, weighted metrics of a user, a correlation over rows"""
    chosen = [spread, Worst(), Correlation(), metrics.PearsonCorrelation(axis=0)]
    model = model_of(None, 2, metrics=chosen, weighted_metrics=[Worst(name="weighted")])
    return engine.fit(model, X, TARGET, sample_weight=WEIGHT, epochs=EPOCHS)


class Measuring(keras.Model):
    """Gives rows, numbers and a constant to metrics in a step of its own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.largest, self.spread = Largest(), metrics.MeanMetricWrapper(spread, name="spread")
        self.lowest, self.steps = Lowest(name="lowest"), metrics.Sum(name="steps")

    def train_step(self, data: Any) -> dict:
        logs = super().train_step(data)
        x, y = data
        y_pred = self(x)
        self.largest.update_state(y, y_pred)
        self.spread.update_state(y, y_pred)
        self.lowest.update_state(ops.mean(ops.square(y - y_pred)))
        self.steps.update_state(1.0)
        return logs | self.get_metrics_result()


class Lowest(metrics.Metric):
    """The lowest of the numbers that it is given."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.lowest = self.add_variable((), keras.initializers.Constant(np.inf), name="lowest")

    def update_state(self, number: Any) -> None:
        self.lowest.assign(ops.minimum(self.lowest, number))

    def result(self) -> Any:
        return self.lowest + 0.0

    def reset_state(self) -> None:
        self.lowest.assign(np.inf)


@case()
def metrics_in_an_own_step(engine) -> Result:
    """A maximum, a function without a rule, the lowest loss and the number of steps, in a `train_step`"""
    x = seeded_input()
    model = Measuring(x, keras.layers.Dense(2)(x))
    model.compile(sgd(), "mse")
    return engine.fit(model, X, TARGET, epochs=EPOCHS)


class Observing(keras.layers.Layer):
    """Tells of its inputs while it is called: a number of the batch, and rows."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.mean, self.rows = metrics.Mean(name="mean"), metrics.Mean(name="rows")

    def call(self, inputs: Any) -> Any:
        self.mean.update_state(ops.mean(inputs))
        self.rows.update_state(ops.max(inputs, axis=-1))
        return inputs


@case()
def metrics_in_a_layer(engine) -> Result:
    """Means in a layer's `call`, of rows and of one number a batch"""
    x = seeded_input()
    model = keras.Model(x, keras.layers.Dense(2)(Observing()(x)))
    model.compile(sgd(), "mse")
    return engine.fit(model, X, TARGET, epochs=EPOCHS)
