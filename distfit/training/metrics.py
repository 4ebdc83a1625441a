"""Every number is global: metrics are computed from their state summed over all replicas.

A metric's variables are each replica's own sums; adding them up and asking for the result once gives what
one device would have had, where an average of results would not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    from distfit.backends.base import Backend


def global_results(model: Any, backend: Backend) -> dict[str, Any]:
    """The model's metrics over all rows since their last reset, by name. Collective; waits for the device."""
    with keras.StatelessScope(state_mapping=_summed_states(model, backend)):
        # Converted here: a result that is the variable itself would be read outside the scope, on one replica.
        return keras.tree.map_structure(tf.convert_to_tensor, model.get_metrics_result())


def leave_global(model: Any, backend: Backend) -> None:
    """Leave the state over all rows in the model's metrics, where Keras leaves it. Collective."""
    for variable, total in _summed_states(model, backend):
        variable.assign(total)


def _summed_states(model: Any, backend: Backend) -> list[tuple[Any, tf.Tensor]]:
    """Every metric variable with its sum over all replicas.

    All states travel as one float64 vector, in which counts up to 2**53 and every float32 are exact.
    """
    variables = [variable for metric in model.metrics for variable in metric.variables]
    local = [np.sum(backend.replica_values(variable), axis=0, dtype=np.float64) for variable in variables]
    packed = np.concatenate([np.zeros(0), *(state.ravel() for state in local)])
    summed = np.split(backend.transport.sum(packed), np.cumsum([state.size for state in local])[:-1])
    states = [
        tf.constant(total.reshape(state.shape), dtype=variable.dtype)
        for total, state, variable in zip(summed, local, variables, strict=False)
    ]
    return list(zip(variables, states, strict=True))
