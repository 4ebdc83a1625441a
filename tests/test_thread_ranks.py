"""Ranks as threads: they pass what every engine must, train what one device trains, and always end."""

from __future__ import annotations

import logging
import random
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.utils import file_utils

import distfit
from distfit.errors import InputError, RunError
from distfit.thread_ranks import run
from tests.cases import CASES
from tests.cases.engines import Engine, engine_of, precision
from tests.cases.table import FLOAT64
from tests.compare import apart, flat
from tests.conformance import CHECKS

RANKS = 3
ROWS = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
# Of the table that every engine is held to (tests/test_engines.py): a rank without rows, sparse gradients, collectives
# between epochs.
SAME = ("a_last_batch_smaller_than_the_replicas", "embeddings", "accumulation")


def _model():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def _train(**arguments):
    keras.utils.set_random_seed(1)
    model = _model()
    arguments = {"batch_size": 16, "verbose": 0} | arguments
    history = distfit.fit(model, ROWS, ROWS.sum(axis=1, keepdims=True), **arguments).history
    return history, flat(model.weights)


def test_conformance():
    def conform():
        for check in CHECKS.values():
            check(distfit.init())
        return True

    with precision(FLOAT64):
        assert run(conform, RANKS) == [True] * RANKS


@pytest.mark.parametrize("name", SAME)
def test_three_threads_are_one_device(name, tmp_path):
    def numbers():
        return CASES[name].run(Engine("auto", None, tmp_path))

    with precision(FLOAT64):
        expected = CASES[name].run(engine_of("single", tmp_path))
        for received in run(numbers, RANKS):
            assert expected.keys() == received.keys()
            found = apart(expected, received)
            assert max(found.values()) <= CASES[name].tolerance[FLOAT64], found


def test_every_run_ends_with_the_same_bits():
    first, second = (run(lambda: _train(epochs=2), RANKS) for _ in range(2))
    (history, weights), *others = first
    for other_history, other_weights in [*others, *second]:
        assert other_history == history
        assert other_weights.tobytes() == weights.tobytes()


def test_ranks_have_random_states_of_their_own_and_leave_none_behind():
    random.seed(5)
    np.random.seed(5)
    tf.random.set_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()

    def draw(seed):
        session = distfit.init()
        if seed is not None:
            keras.utils.set_random_seed(seed + session.rank)
        drawn = []
        for _ in range(3):
            # Each in its turn: others draw in between.
            session.transport.gather(None)
            drawn.append((random.random(), float(np.random.rand()), float(keras.random.uniform(()))))
        return drawn

    unseeded = run(lambda: draw(None), RANKS)
    assert len({str(drawn) for drawn in unseeded}) == RANKS
    assert run(lambda: draw(7), RANKS) == run(lambda: draw(7), RANKS)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


class _Calls(keras.callbacks.Callback):
    """Calls something after each epoch, on those ranks that want to."""

    def __init__(self, call, wants=lambda session: True):
        super().__init__()
        self._call, self._wants = call, wants

    def on_epoch_end(self, epoch, logs=None):
        if self._wants(distfit.init()):
            self._call(self.model)


def _evaluated(model):
    return distfit.evaluate(model, ROWS, ROWS.sum(axis=1, keepdims=True), batch_size=16, verbose=0)


@pytest.mark.parametrize(
    ("call", "wants", "report"),
    [
        (
            lambda model: distfit.init().transport.broadcast("hello"),
            lambda session: session.is_chief,
            r"rank 0 of 3 called session\.transport\.broadcast in _Calls\.on_epoch_end .*; "
            r'ranks? [12-]+ did not, but waits? in "the end of an epoch"',
        ),
        (
            _evaluated,
            lambda session: not session.is_chief,
            r"called distfit\.evaluate in _Calls\.on_epoch_end .*; rank 0 did not, but waits in",
        ),
    ],
    ids=["the chief", "all but the chief"],
)
def test_collective_that_some_ranks_call_in_a_callback_is_reported_by_name(call, wants, report):
    with pytest.raises(RunError, match=report):
        run(lambda: _train(epochs=2, callbacks=[_Calls(call, wants)]), RANKS)


def test_collective_in_a_callback_of_the_chief_alone_is_refused():
    with pytest.raises(RunError, match=r"_Calls\.on_epoch_end runs on the chief alone and called distfit\.evaluate"):
        run(lambda: _train(callbacks=[distfit.chief_only(_Calls(_evaluated))]), RANKS)


def test_callback_that_evaluates_on_every_rank_changes_nothing():
    def train():
        found = []
        history, weights = _train(epochs=2, callbacks=[_Calls(lambda model: found.append(_evaluated(model)))])
        return found, history, weights

    history, weights = run(lambda: _train(epochs=2), RANKS)[0]
    for found, own_history, own_weights in run(train, RANKS):
        assert (own_history, own_weights.tobytes()) == (history, weights.tobytes())
        # Before and after the steps of the second epoch, around its mean.
        assert found[0] > history["loss"][1] > found[1]


def test_callbacks_see_global_numbers_and_only_the_chief_speaks(caplog):
    def train():
        seen = []
        note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs["loss"]))
        _train(callbacks=[note], verbose=2, epochs=2)
        return seen

    logger = logging.getLogger("distfit")
    records = []
    handler = logging.Handler()
    handler.emit = records.append

    def heard():
        if distfit.init().is_chief:
            logger.addHandler(handler)
        try:
            return train()
        finally:
            logger.removeHandler(handler)

    first, *others = run(heard, RANKS)
    assert len(first) == 2
    assert all(losses == first for losses in others)
    blocks = [record for record in records if "strategy" in record.getMessage()]
    assert len(blocks) == 1
    assert "3 on" in blocks[0].getMessage()


def test_learning_rates_are_scaled_by_the_ranks(tmp_path):
    def train():
        keras.utils.set_random_seed(1)
        model = _model()
        x, y = ROWS, ROWS.sum(axis=1, keepdims=True)
        distfit.fit(model, x, y, batch_size=10, verbose=0, learning_rate_scaling="linear", warmup_epochs=2)
        if distfit.init().is_chief:
            model.save(tmp_path / "model.keras")
        return [float(model.optimizer._learning_rate(step)) for step in (0, 4, 8, 9)]

    rates = run(train, RANKS)
    np.testing.assert_allclose(rates, [[0.1, 0.2, 0.3, 0.3]] * RANKS, rtol=1e-6)
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert [float(loaded._learning_rate(step)) for step in (0, 4, 8, 9)] == rates[0]
    assert loaded.iterations == 4


def test_the_first_error_comes_out_as_it_was_with_its_rank():
    class Broken(Exception):
        pass

    def fail_on_the_last():
        if distfit.init().rank == RANKS - 1:
            raise Broken("no")
        _train()

    hooks = file_utils.urlretrieve, threading.active_count()
    with pytest.raises(Broken, match="no") as failed:
        run(fail_on_the_last, RANKS)
    assert failed.value.__notes__ == ["(on rank 2 of 3, a thread)"]
    assert (file_utils.urlretrieve, threading.active_count()) == hooks


def test_an_error_inside_a_step_ends_the_others_there():
    class Failing(keras.layers.Layer):
        def call(self, x):
            own = distfit.init().rank == 1
            return tf.ensure_shape(
                tf.numpy_function(lambda rows: _refused(rows) if own else rows, [x], x.dtype), x.shape
            )

    def train():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), Failing(), keras.layers.Dense(3)])
        model.compile("sgd", "mse")
        distfit.fit(model, ROWS, ROWS[:, :3], batch_size=12, verbose=0)

    with pytest.raises(tf.errors.InvalidArgumentError, match="these rows are refused") as failed:
        run(train, RANKS)
    assert "(on rank 1 of 3, a thread)" in failed.value.__notes__


def _refused(rows):
    raise ValueError("these rows are refused")


def test_a_refusal_of_all_ranks_is_the_same_one():
    with pytest.raises(InputError, match="Expected epochs to be a whole number"):
        run(lambda: _train(epochs=-1), RANKS)


@pytest.mark.parametrize("elsewhere", ["at a host value", "inside a step"])
def test_a_rank_that_ends_early_is_not_waited_for(elsewhere):
    def leave():
        session = distfit.init()
        if elsewhere == "at a host value":
            return None if session.rank == 1 else session.transport.gather(0)
        (total,) = session.backend.sum([tf.ones([2])], name="all")
        return total if session.rank == 1 else tf.function(session.backend.sum)([total], name="fewer")

    with pytest.raises(RunError, match="waits for the others, of which some have ended"):
        run(leave, RANKS, limit_s=60)


def test_ranks_that_make_different_calls_end_at_the_limit_and_it_is_said_where_they_are():
    def disagree():
        session = distfit.init()
        return session.transport.gather(0) if session.is_chief else session.backend.sum([tf.ones([2])], name="other")

    with pytest.raises(RunError, match=r"3 ranks to end within 2 s, received 3 that did not: rank 0 in .*threads.py"):
        run(disagree, RANKS, limit_s=2)


def test_numbers_of_ranks_that_cannot_be_are_refused():
    for ranks in (0, -1, 2.0):
        with pytest.raises(InputError, match="Expected ranks to be a whole number of at least 1"):
            run(lambda: None, ranks)
    assert run(lambda: distfit.init().size, ranks=1) == [1]


def test_the_session_outside_is_untouched():
    outside = distfit.init()
    inside = run(distfit.init, 2)
    assert [session.size for session in inside] == [2, 2]
    assert distfit.init() is outside
