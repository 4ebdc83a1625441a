"""Mixed precision. Each replica's part of a gradient is rounded to 8 or 11 bits before the parts are added up, so
these rows have limits of their own: the rounding of one such number. Their controls are far below, as permuted rows
are still rounded as one sum."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tests.cases.engines import precision
from tests.cases.models import LABEL, TARGET, X, adam, classifier, sgd
from tests.cases.table import FLOAT32, Result, case

BFLOAT16 = {FLOAT32: 2.0**-8}
FLOAT16 = {FLOAT32: 2.0**-11}


@case(BFLOAT16, saved=True)
def bfloat16(engine) -> Result:
    """`mixed_bfloat16`, Adam; the saved file"""
    with precision(FLOAT32, "mixed_bfloat16"):
        return engine.fit(classifier(adam()), X, LABEL)


@case(FLOAT16)
def float16(engine) -> Result:
    """`mixed_float16` with the `LossScaleOptimizer` that Keras adds, clipping"""
    with precision(FLOAT32, "mixed_float16"):
        return engine.fit(classifier(sgd(global_clipnorm=0.1)), X, LABEL)


def scales(engine: Any, model: keras.Model, target: np.ndarray) -> Result:
    """A training's numbers, and what its loss scale has come to."""
    result = engine.fit(model, X, target)
    optimizer = model.optimizer
    state = {"scale": optimizer.dynamic_scale, "finite_steps": optimizer.step_counter}
    state["applied"] = optimizer.inner_optimizer.iterations
    return result | {name: variable.numpy() for name, variable in state.items()}


@case(FLOAT16, saved=True)
def an_overflow_on_one_replica(engine) -> Result:
    """An overflow in one row: every replica skips the update and lowers its scale; the saved file"""
    target = TARGET.copy()
    target[40] = 150.0
    with precision(FLOAT32, "mixed_float16"):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        optimizer = sgd(learning_rate=1e-4)
        model.compile(keras.optimizers.LossScaleOptimizer(optimizer, dynamic_growth_steps=3), "mse", metrics=["mae"])
        return scales(engine, model, target)
