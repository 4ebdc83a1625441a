"""A step as one traced function, which runs it on every replica of this process.

    function = traced(session, step.train, feed.element_spec, lambda: step.transfers["train"])
    for_each_replica = function(wish, batch)

Ranks trace it at the same time, and compare its collectives before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import tensorflow as tf

from distfit.data.feed import FLAGS, Batch, flags_of
from distfit.training.agreement import same_collectives

if TYPE_CHECKING:
    from distfit.session import Session
    from distfit.training.wire import Transfer

# What all local replicas got from a step: (logs or outputs, flags) each.
OfReplicas: TypeAlias = list[tuple[Any, Any]]


def traced(
    session: Session,
    step: Callable[..., tuple[Any, Any]],
    element_spec: Any,
    transfers: Callable[[], Sequence[Transfer]],
    run_eagerly: bool = False,
    jit_compile: bool = False,
) -> Callable[[Any, Batch], OfReplicas]:
    """The step on all replicas of this process, from (a wish to stop, a batch). Collective.

    Args:
        step: from one replica's (rows, flags, data) to (what it has to say, the summed flags).
        element_spec: of the feed's batches.
        transfers: the step's collectives, as they were traced.
        run_eagerly: not traced; Python runs it each time.
        jit_compile: as one XLA program.

    Raises:
        DistfitError: it cannot be traced on some rank, or ranks traced different collectives; on all ranks.
    """

    def on_all(wish: Any, batch: Batch) -> OfReplicas:
        fingerprint, shards = batch
        # One replica has nobody to agree with; and what else is computed may change how TensorFlow's graph
        # optimiser orders the step's own additions, so that the last bit is no longer Keras'.
        alone = session.num_replicas == 1
        own = tf.zeros([FLAGS], tf.float64) if alone else flags_of(fingerprint, wish)
        # One voice a process: its further replicas add nothing to the flags.
        flags = [own] + [tf.zeros_like(own)] * (len(shards) - 1)
        arguments = [(rows, flag, data) for (rows, data), flag in zip(shards, flags, strict=True)]
        return session.backend.run(step, arguments)

    if run_eagerly:
        return on_all
    function = tf.function(
        tf.autograph.experimental.do_not_convert(on_all),
        input_signature=[tf.TensorSpec([], tf.float64), element_spec],
        jit_compile=jit_compile or None,
    )
    session.agree(function.get_concrete_function)
    same_collectives(session, step.__name__, transfers())
    return function
