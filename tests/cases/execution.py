"""How the step is executed."""

from __future__ import annotations

import numpy as np

from tests.cases.engines import dataset
from tests.cases.models import LABEL, WEIGHT, X, adam, classifier, classifying, seeded_input, sgd
from tests.cases.table import Result, case


@case()
def two_steps_per_execution(engine) -> Result:
    """`steps_per_execution=2` with 3 batches, accumulation over 2; evaluate and predict"""
    model = classifier(adam(gradient_accumulation_steps=2), steps_per_execution=2)
    result = engine.fit(model, X, LABEL, sample_weight=WEIGHT)
    result["predicted"] = engine.predict(model, X)
    result["evaluated"] = np.array(engine.evaluate(model, X, LABEL))
    return result


@case()
def three_steps_per_execution(engine) -> Result:
    """`steps_per_execution=3` with 5 batches of a shuffled tf.data.Dataset of named inputs; validation"""
    data = dataset({"x": X}, LABEL).shuffle(67, seed=3).batch(16)
    x = seeded_input(name="x")
    model = classifying({"x": x}, x, steps_per_execution=3)
    return engine.fit(model, data, batch_size=None, validation_data=data.take(2))


@case()
def compiled_by_xla(engine) -> Result:
    """`jit_compile=True`, a short last batch"""
    return engine.fit(classifier(sgd(), jit_compile=True), X, LABEL)


@case()
def run_eagerly(engine) -> Result:
    """`run_eagerly=True`"""
    return engine.fit(classifier(sgd(), run_eagerly=True), X, LABEL, epochs=2)
