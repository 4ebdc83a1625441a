"""What every engine must do: one body of checks, run by `tests.cases` inside each real job.

A check gets the session, runs on every rank alike, and raises AssertionError. A new engine passes all of
them before anything is trained on it.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

from distfit.errors import InputError, RunError
from distfit.session import Session

# From 1 to the next number. NumPy knows no bfloat16.
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SPEC = (tf.TensorSpec([None, 4], tf.float64), tf.TensorSpec([None, 2], tf.float64))


def _run(session: Session, function: Callable, *, traced: bool = True) -> list:
    """The results of all replicas of the job, in order."""
    replicas = session.topology.replicas_per_process
    arguments = [(tf.constant(float(session.topology.first_replica + local)),) for local in range(replicas)]

    def on_all(*numbers):
        return session.backend.run(function, [(number,) for number in numbers])

    on_all = tf.function(on_all) if traced else on_all
    own = tf.nest.map_structure(np.asarray, on_all(*(number for (number,) in arguments)))
    return [result for results in session.transport.gather(own) for result in results]


def replicas_are_numbered_over_the_job(session):
    assert _run(session, lambda number: tf.constant(session.backend.replica())) == list(range(session.num_replicas))
    assert len(session.backend.devices) == session.topology.replicas_per_process


def sums_reach_every_replica_in_each_type(session):
    def on_replica(number):
        tensors = [tf.cast(tf.fill([3], number + 1), kind) for kind in (tf.float32, tf.float64, tf.int64)]
        return session.backend.sum(tensors, name="types")

    expected = sum(range(1, session.num_replicas + 1))
    for traced in (True, False):
        for result in _run(session, on_replica, traced=traced):
            assert [kind.dtype for kind in result] == [np.float32, np.float64, np.int64]
            assert all((values == expected).all() for values in result)


def halves_are_summed_alike_everywhere(session):
    """In the types in which gradients may travel: near the sum of what was sent, and the same bits on every replica."""
    assert set(EPSILON) <= set(session.backend.reduction_dtypes)
    kinds = [getattr(tf, kind) for kind in EPSILON]
    # 7 elements: no number of replicas divides them all.
    shapes = ([7], [3, 5], [], [0])

    def addend(shape, number, kind):
        elements = int(np.prod(shape))
        values = tf.sin(tf.range(elements, dtype=tf.float64) + 10 * tf.cast(number, tf.float64))
        return tf.reshape(tf.cast(values, kind), shape)

    def on_replica(number):
        sent = [addend(shape, number, kind) for kind in kinds for shape in shapes]
        sums = session.backend.sum(sent, name="halves")
        assert [each.dtype for each in sums] == [each.dtype for each in sent]
        return [tf.cast(each, tf.float64) for each in sums]

    for traced in (True, False):
        results = _run(session, on_replica, traced=traced)
        assert len({b"".join(each.tobytes() for each in result) for result in results}) == 1
        sums = iter(results[0])
        for kind in kinds:
            for shape in shapes:
                addends = [tf.cast(addend(shape, number, kind), tf.float64) for number in range(session.num_replicas)]
                # Rounded once for each addition, at most.
                rounded = session.num_replicas**2 * EPSILON[kind.name]
                np.testing.assert_allclose(next(sums), np.sum(addends, axis=0), rtol=0, atol=rounded)


def rows_are_gathered_in_the_order_of_replicas(session):
    """Also those of different lengths, and of each type in which gradients may travel."""
    kinds = [tf.int64, *(getattr(tf, kind) for kind in session.backend.reduction_dtypes)]

    def on_replica(number):
        rows = tf.fill([1 + session.backend.replica(), 2], number)
        gathered = session.backend.gather([tf.cast(rows, kind) for kind in kinds], name="rows")
        return [tf.cast(each, tf.float64) for each in gathered]

    expected = [[replica] * 2 for replica in range(session.num_replicas) for _ in range(1 + replica)]
    for result in _run(session, on_replica):
        assert [rows.tolist() for rows in result] == [expected] * len(kinds)


def constant_inputs_are_summed_once(session):
    """A collective of constants that ran while the graph was optimised would leave the ranks a step apart."""

    def on_replica(number):
        (first,) = session.backend.sum([tf.constant([1.0, 2.0])], name="constant")
        (half,) = session.backend.sum([tf.constant([3.0], tf.bfloat16)], name="half")
        (second,) = session.backend.sum([tf.reshape(number, [1])], name="number")
        return first, tf.cast(half, tf.float32), second

    for _ in range(3):
        for first, half, second in _run(session, on_replica):
            assert first.tolist() == [session.num_replicas, 2 * session.num_replicas]
            assert half.tolist() == [3 * session.num_replicas]
            assert second.tolist() == [sum(range(session.num_replicas))]


def sums_have_the_same_bits_whoever_needs_an_addend_later(session):
    """TensorFlow's `add_n` begins with an addend whose buffer is free, so that its order depends on the rest of the
    graph and on which replica is done first."""

    def summed(free):
        def on_replica(number):
            own = tf.gather(tf.constant([1.0, 1e16, -1e16], tf.float64), tf.cast(number, tf.int32) % 3) * tf.ones(
                [4], tf.float64
            )
            (total,) = session.backend.sum([own], name="addend")
            return total, total if session.backend.replica() == free else own

        return [total.tolist() for total, _ in _run(session, on_replica)]

    found = [summed(free) for free in (None, *range(session.num_replicas))]
    assert found == found[:1] * len(found)


def host_values_travel(session):
    ranks = list(range(session.size))
    assert session.transport.gather({"rank": session.rank}) == [{"rank": rank} for rank in ranks]
    assert session.transport.broadcast(("chief", session.rank)) == ("chief", 0)
    collected = session.transport.collect(session.rank)
    assert collected == (ranks if session.is_chief else None)
    summed = session.transport.sum(np.array([session.rank, 1.0, 2.0**52 + session.rank]))
    assert summed.tolist() == [sum(ranks), session.size, sum(2.0**52 + rank for rank in ranks)]


def checks_are_agreed_on(session):
    assert session.agree(lambda: 7) == 7
    assert session.from_chief(lambda: session.rank) == 0
    last = session.size - 1

    def refuse_on_the_last():
        if session.rank == last:
            raise InputError("no such folder")

    with pytest.raises(InputError, match="no such folder") as refused:
        session.agree(refuse_on_the_last)
    assert refused.value.agreed
    assert session.size == 1 or f"rank {last} of {session.size}" in str(refused.value)
    with pytest.raises(RunError, match="the chief says no"):
        session.from_chief(_refuse)


def _refuse():
    raise RunError("the chief says no")


def an_adopted_model_equals_the_chiefs_and_is_given_back(session):
    keras.utils.set_random_seed(100 + session.rank)
    model = keras.Sequential([keras.layers.Dense(2)])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.build((None, 4))
    keras.utils.set_random_seed(100)
    kernel = model.layers[0].kernel
    before = kernel.numpy()
    chiefs = session.transport.broadcast(before)
    session.backend.build(model, SPEC)
    with session.backend.adopted(model):
        assert model.layers[0].kernel is kernel
        copies = session.backend.replica_values(kernel)
        assert len(copies) == session.topology.replicas_per_process
        assert all((copy == chiefs).all() for copy in copies)
        _run(session, lambda number: _update(session, model))
        inside = session.backend.replica_values(kernel)
    assert all((copy == inside[0]).all() for copy in session.transport.gather(inside[0]))
    assert not (inside[0] == chiefs).all()
    assert (kernel.numpy() == inside[0]).all()
    _is_plain_keras(model)


def _update(session, model):
    with session.backend.updating():
        variables = model.trainable_variables
        model.optimizer.apply([tf.ones_like(variable.value) for variable in variables], variables)
    return tf.constant(0)


def _is_plain_keras(model):
    """Nothing of an engine is left on the model: it trains and saves as if it had never been adopted."""
    assert not any(isinstance(variable._value, tf.distribute.DistributedValues) for variable in model.variables)
    assert "_all_reduce_sum_gradients" not in vars(model.optimizer)
    rows = np.ones((4, 4)), np.ones((4, 2))
    before = model.layers[0].kernel.numpy()
    model.fit(*rows, verbose=0)
    assert not (model.layers[0].kernel.numpy() == before).all()


def random_streams_differ_between_replicas(session):
    dropout = keras.layers.Dropout(0.5, seed=3)
    model = keras.Sequential([keras.Input((64,)), dropout])
    model.compile("sgd", "mse")
    spec = (tf.TensorSpec([None, 64], tf.float64), tf.TensorSpec([None, 64], tf.float64))
    alone = keras.layers.Dropout(0.5, seed=3)(np.ones((1, 64)), training=True)
    session.backend.build(model, spec)
    with session.backend.adopted(model):
        masks = _run(session, lambda number: model(tf.ones((1, 64), tf.float64), training=True))
        assert len({mask.tobytes() for mask in masks}) == session.num_replicas
        assert (masks[0] == np.asarray(alone)).all()
        states = [copy.tolist() for copy in session.backend.replica_values(dropout.seed_generator.state)]
        assert all(state == states[0] for state in states)


CHECKS = {
    check.__name__: check
    for check in (
        replicas_are_numbered_over_the_job,
        sums_reach_every_replica_in_each_type,
        halves_are_summed_alike_everywhere,
        rows_are_gathered_in_the_order_of_replicas,
        constant_inputs_are_summed_once,
        sums_have_the_same_bits_whoever_needs_an_addend_later,
        host_values_travel,
        checks_are_agreed_on,
        an_adopted_model_equals_the_chiefs_and_is_given_back,
        random_streams_differ_between_replicas,
    )
}
