"""The run of tests/test_metrics.py on real ranks: 200 rows over 3, and what averages of averages would have given.

    mpirun -np 3 python -m tests.metrics_script OUT

The chief writes OUT/ranks.json: what `distfit.evaluate` and `distfit.fit` say on each rank, with uneven parts of the
data too; what each rank's part gives by itself, from which averages are made; how many exchanges a set of results
costs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.utils.python_utils import pythonify_logs

import distfit
from distfit.session import init
from distfit.training.metrics import GlobalStates
from tests.cases.metrics import Largest, spread
from tests.ranks import show_stacks_when_asked

ROWS, BATCH = 200, 32
RNG = np.random.default_rng(7)
# Sorted by a column: the parts of the ranks are not alike, as little as files of a data set are.
X = np.sort(RNG.normal(size=(ROWS, 4)).astype("float32"), axis=0)
Y = (RNG.random((ROWS, 1)) < 1 / (1 + np.exp(-X.sum(axis=1, keepdims=True)))).astype("float32")
# Where the parts begin that ranks read by themselves: 17 rows, 183 and none.
CUTS = [17, 200]


def model() -> keras.Model:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    built = keras.Model(inputs, keras.layers.Dense(1, "sigmoid")(inputs))
    own = [keras.metrics.AUC(name="auc"), keras.metrics.F1Score(threshold=0.5, name="f1"), Largest(), spread]
    built.compile(keras.optimizers.SGD(0.05), "binary_crossentropy", metrics=own, weighted_metrics=["accuracy"])
    return built


def trained(fit: Any) -> dict[str, list[float]]:
    data = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0, "validation_data": (X[:65], Y[:65])}
    return {name: np.ravel(values).tolist() for name, values in fit(model(), X, Y, **data).history.items()}


def evaluated(evaluate: Any) -> dict[str, Any]:
    return plain(evaluate(model(), X, Y, batch_size=BATCH, verbose=0, return_dict=True))


def plain(results: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value, np.float64).ravel().tolist() for name, value in results.items()}


def main(out: str) -> None:
    show_stacks_when_asked()
    session = init()
    parts = [np.split(array, CUTS)[session.rank] for array in (X, Y)]
    local = distfit.local(tf.data.Dataset.from_tensor_slices(tuple(parts)).batch(8))
    left = model()
    uneven = distfit.evaluate(left, local, verbose=0, return_dict=True)
    own = {
        "evaluated": evaluated(distfit.evaluate),
        "trained": trained(distfit.fit),
        "uneven": plain(uneven),
        "left": plain(pythonify_logs(left.get_metrics_result())),
        "alone": plain(by_itself(*np.array_split(np.arange(ROWS), session.size)[session.rank][[0, -1]])),
        "exchanges": exchanges(session),
    }
    ranks = session.transport.gather(own)
    if session.is_chief:
        (Path(out) / "ranks.json").write_text(json.dumps(ranks))


def by_itself(first: int, last: int) -> dict[str, Any]:
    """What one rank finds on its own rows."""
    rows = slice(first, last + 1)
    return model().evaluate(X[rows], Y[rows], batch_size=BATCH, verbose=0, return_dict=True)


def exchanges(session: Any) -> list[str]:
    """Which calls between ranks one set of global results takes."""
    called: list[str] = []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(session.transport, name)

    built = model()
    built.evaluate(X[:2], Y[:2], verbose=0)
    before, session.backend.transport = session.backend.transport, Counted()
    try:
        GlobalStates(built, session.backend).results()
    finally:
        session.backend.transport = before
    return called


if __name__ == "__main__":
    main(*sys.argv[1:])
