"""Batches of any size."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tests.cases.models import LABEL, X, adam, classifier, sgd
from tests.cases.table import Result, case


@case()
def batches_that_divide(engine) -> Result:
    """Batches that divide by 2 and 3; Nesterov momentum, `clipvalue`"""
    return engine.fit(classifier(sgd(nesterov=True, clipvalue=0.01)), X[:48], LABEL[:48], batch_size=12)


@case()
def a_short_last_batch(engine) -> Result:
    """A last batch of 3; evaluate and predict"""
    model = classifier(sgd(), metrics=["accuracy"])
    result = engine.fit(model, X, LABEL)
    result["predicted"] = engine.predict(model, X)
    result["evaluated"] = np.array(engine.evaluate(model, X, LABEL))
    return result


@keras.saving.register_keras_serializable("tests")
class Hits(keras.metrics.Metric):
    """Keras' documented pattern of an own metric, whose result is the variable itself."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.hits = self.add_weight(name="hits", initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        right = keras.ops.equal(keras.ops.argmax(y_pred, -1), keras.ops.cast(y_true, "int64"))
        self.hits.assign_add(keras.ops.sum(keras.ops.cast(right, self.dtype)))

    def result(self) -> Any:
        return self.hits


@case()
def a_last_batch_smaller_than_the_replicas(engine) -> Result:
    """A last batch of 1; a metric of one's own"""
    return engine.fit(classifier(adam(), metrics=[Hits(name="hits")]), X[:65], LABEL[:65])
