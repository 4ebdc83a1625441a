"""The hyper-parameters of a run, as TensorBoard's HParams page reads them from the run's own event files.

    values = of_run(model, facts, epochs=3, own={"width": 64})
    tf.summary.experimental.write_raw_pb(started(values), step=0)    # with a writer of train/ as default
    tf.summary.experimental.write_raw_pb(ended(), step=0)

The page takes each folder with such a beginning for a session of its own, with the scalars of that folder. They are
written into `train/` and into `validation/`, so that both are listed under the names that the scalars have, with the
same hyper-parameters. A session in the folder above, as TensorBoard's tutorial has it, finds no metrics when that very
folder is opened: its run is called ".", and the page looks for "./train".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import numpy as np

from distfit.errors import InputError

Value: TypeAlias = bool | int | float | str

STARTED_TAG = "_hparams_/session_start_info"
ENDED_TAG = "_hparams_/session_end_info"


@dataclass(frozen=True)
class RunFacts:
    """What a training is, beyond its model.

    Attributes:
        engine: its name as users read it; what follows in brackets is left to the start of the run's output.
        ranks: processes of the job.
        replicas: copies of the model that train together, each on a device of its own.
        batch_size: records of one step over all replicas; None when unknown.
        records: records of one epoch; None when unknown, or where an epoch may be more or less than all of them.
        seed: of the order of records and of all that is random.
    """

    engine: str
    ranks: int
    replicas: int
    batch_size: int | None
    records: int | None
    seed: int | None


def checked(own: Mapping[str, Any] | None) -> dict[str, Value]:
    """What a user gives, with plain Python's values.

    Raises:
        InputError: the page could not show it.

    >>> checked({"width": np.int64(64), "activation": "relu"})
    {'width': 64, 'activation': 'relu'}
    """
    found = {name: value.item() if isinstance(value, np.generic) else value for name, value in (own or {}).items()}
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Value):
            raise InputError(
                "Expected hparams by names that are strings, each True or False, a number or a string, as TensorBoard "
                f"shows no others, received {name!r}: {value!r}. Leave it out, or pass str(...) of it."
            )
    return found


def of_run(
    model: keras.Model, facts: RunFacts | None, epochs: int | None, own: Mapping[str, Value]
) -> dict[str, Value]:
    """By name, without what is unknown; the user's own come last and win.

    Args:
        facts: None for a training by keras.Model.fit.
        epochs: the number of the last one.
    """
    of_job = {} if facts is None else _of_job(facts)
    optimizer = _of_optimizer(getattr(model, "optimizer", None))
    found = {**of_job, "epochs": epochs, "precision": model.dtype_policy.name, **optimizer, **own}
    return {name: value for name, value in found.items() if value is not None}


def started(values: Mapping[str, Value]) -> bytes:
    """A session begins: a serialized tf.Summary."""
    from tensorboard.plugins.hparams import summary_v2

    # Without a name of its own, its group is the run: others with the same values stay apart.
    return summary_v2.hparams_pb(dict(values), trial_id="").SerializeToString()


def ended() -> bytes:
    """It has come to its end: a serialized tf.Summary."""
    from tensorboard.plugins.hparams import api_pb2, summary

    return summary.session_end_pb(api_pb2.STATUS_SUCCESS).SerializeToString()


def read(content: bytes) -> dict[str, Value]:
    """The values of a beginning.

    Args:
        content: of the plugin, in the metadata of the tag `STARTED_TAG`.
    """
    from tensorboard.plugins.hparams import metadata

    found = metadata.parse_session_start_info_plugin_data(content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


def _of_job(facts: RunFacts) -> dict[str, Value | None]:
    return {
        "engine": facts.engine.partition(" (")[0],
        "ranks": facts.ranks,
        "replicas": facts.replicas,
        "batch_size": facts.batch_size,
        # A name more than a number, of which the page would show five digits.
        "seed": None if facts.seed is None else str(facts.seed),
    }


def _of_optimizer(optimizer: Any) -> dict[str, Value | None]:
    if optimizer is None:  # hand-written steps may have several, or none that Keras knows
        return {}
    wrapped = getattr(optimizer, "inner_optimizer", optimizer)
    return {"optimizer": type(wrapped).__name__, "learning_rate": _rate(wrapped)}


def _rate(optimizer: Any) -> float | None:
    """The learning rate now; None for an optimizer of several.

    >>> _rate(keras.optimizers.SGD(0.1))
    0.1
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer) or hasattr(optimizer, "optimizers"):
        return None
    # The shortest number that is this float32: 0.1, not 0.10000000149011612.
    return float(str(np.asarray(keras.ops.convert_to_numpy(optimizer.learning_rate)).astype("float32")))
